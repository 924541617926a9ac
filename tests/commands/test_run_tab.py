"""What the served page's tab on the run shows of its files (`serving/run_tab.py`); here for the run of these tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from groundling.serving.run_tab import run_html
from groundling.training import checkpoint
from groundling.training.run_folder import RunFolder


def shown(run: Path) -> str:
    return run_html(RunFolder(run), checkpoint.complete(run / "checkpoints")[-1])


def test_a_run_is_shown_with_its_curve_its_losses_and_how_it_was_made(run: Path) -> None:
    html = shown(run)
    for part in ("<figure>", "<dt><code>corpus/loss</code> <b>", "bottles.txt", "<dt>machine</dt>", "<dt>command</dt>"):
        assert part in html
    assert "cannot be read" not in html
    assert "<dt><code>corpus/loss</code> <b>not taken" not in html


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("metrics.jsonl", "no metrics.jsonl that can be read"),
        ("config.yaml", ""),
        ("record.json", "no record.json"),
        ("evaluated.json", ""),
        ("report.json", "Not measured for these weights"),
    ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_what_one_file_lacks_keeps_nothing_else_from_being_shown(
    run: Path, tmp_path: Path, lost: str, says: str, damaged: bool
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(lost, ".lock"))
    if damaged:
        (tmp_path / "run" / lost).write_text("{ \n")
    html = shown(tmp_path / "run")
    assert says in html
    assert "The files of the run cannot be read" not in html
    assert "<dt><code>corpus/loss</code> <b>not taken" not in html
    assert ("<figure>" in html) == (lost != "metrics.jsonl")
    assert ("<dt>machine</dt>" in html) == (lost != "record.json")

"""What the commands say of runs whose blocks wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundling.cli import main
from groundling.commands import session

from .bottles import train


def blocks_of(run: str) -> tuple[int, int, int]:
    record = json.loads((Path(run) / "record.json").read_text())
    return record["blocks"], record["growing_blocks"], record["growing_steps"]


def test_a_run_that_ends_while_blocks_wait_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record, too; and how it went on."""
    growing = ("--growth.every", "2", "--growth.fraction", "0.125", "--schedule.total_steps", "16")
    size = ("--model.n_layer", "3", "--evaluation.final", "none")
    assert main(train("--max-steps", "1", "--out", "runs/waiting", *growing, *size)) == 0
    printed = capsys.readouterr()
    assert "warning: 2 of 3 blocks were trained, and the others, which were to join at step 2, add" in printed.err
    assert "blocks              2 in the first step, and no more yet" in printed.out
    assert blocks_of("runs/waiting") == (2, 2, 1)
    assert main(["train", "--resume", "--out", "runs/waiting", "--max-steps", "3", "--growth.fraction", "0.2"]) == 0
    printed = capsys.readouterr()
    assert "growth.fraction was 0.125 and is 0.2 now" in printed.err
    assert "blocks that have joined stay" in printed.err
    assert "blocks              2 in the first 3 steps, and no more yet" in printed.out
    assert main(["train", "--resume", "--out", "runs/waiting", "--max-steps", "5"]) == 0
    printed = capsys.readouterr()
    assert "step 3: all 3 blocks take part from here on" in printed.err
    assert "add nothing yet" not in printed.err
    assert "blocks              2 in the first 3 steps, then 3" in printed.out
    assert blocks_of("runs/waiting") == (3, 2, 3)


GROWING = (
    *("--growth.every", "2", "--growth.fraction", "0.5", "--schedule.total_steps", "8"),
    *("--evaluation.final", "none", "--stopping.target", "0"),
)


def test_the_ceiling_on_record_is_the_one_that_was_measured(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though half of the steps go through one of two blocks, and most read their windows in pieces."""
    monkeypatch.setattr(session, "_ceiling_flops", lambda resolved: 1e15)
    pieces = ("--windows.pieces", "4", "--windows.short_fraction", "0.2")
    assert main(train(*GROWING, *pieces, "--out", "runs/ceiling")) == 0
    record = json.loads(Path("runs/ceiling/record.json").read_text())
    assert record["growing_steps"] == 4
    assert record["matrix_ceiling_flops"] == pytest.approx(1e15)


def test_a_record_that_says_half_of_it_is_made_anew(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(*GROWING, "--max-steps", "2", "--out", "runs/half")) == 0
    path = Path("runs/half/record.json")
    record = json.loads(path.read_text())
    for wrong in ({}, {"growing_blocks": "two"}):
        path.write_text(json.dumps({name: value for name, value in record.items() if name != "growing_blocks"} | wrong))
        assert main(["train", "--resume", "--out", "runs/half"]) == 0
        assert "blocks              1 in the first 2 steps, and no more yet" in capsys.readouterr().out
        assert blocks_of("runs/half") == (1, 1, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--growth.every", "2", "--growth.fraction", "0"), "growth.every is not used: growth.fraction is 0"),
        (("--growth.every", "1", "--growth.fraction", "0.5"), "growth.fraction is not used: growth.every is 1"),
    ],
)
def test_growth_that_is_none_is_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], words: str
) -> None:
    out = workplace / "runs" / f"idle{given[1]}"
    assert main(train("--max-steps", "1", "--evaluation.final", "none", "--out", str(out), *given)) == 0
    assert words in capsys.readouterr().err

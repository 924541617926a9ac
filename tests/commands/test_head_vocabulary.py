"""`--head-vocabulary seen` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from groundling.cli import main
from groundling.corpus.shards import TokenFile
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

from .bottles import SMALL, steps

OTHER = "Twinkle, twinkle, little star, how I wonder what you are, up above the world so high. " * 4
GPT2_IDS = [*SMALL[2:], "--corpus", "bottles.txt", "--heldout", "other.txt", "--evaluation.final", "all"]


def seen(out: Path, *arguments: str) -> int:
    return main(["train", *GPT2_IDS, "--head-vocabulary", "seen", "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def seen_run(workplace: Path) -> Path:
    """Six steps with GPT-2's ids, of which the text has few and the held-out text has others."""
    (workplace / "other.txt").write_text(OTHER)
    out = workplace / "runs" / "seen"
    assert seen(out, "--max-steps", "6") == 0
    return out


def test_the_record_says_what_was_done(seen_run: Path, run: Path) -> None:
    record = json.loads((seen_run / "record.json").read_text())
    ids = np.unique(TokenFile.open(seen_run / "train.bin").tokens)
    assert (record["head_vocabulary"], record["n_seen"]) == ("seen", len(ids))
    model, tokenizer, _ = load_model(find_checkpoint(seen_run), torch.device("cpu"))
    assert record["parameters"] == model.config.n_parameters() == sum(p.numel() for p in model.parameters())
    assert model.config.n_vocab == tokenizer.n_vocab == 50257
    assert yaml.safe_load((seen_run / "config.yaml").read_text())["head_vocabulary"] == "seen"
    other = json.loads((run / "record.json").read_text())
    assert (other["head_vocabulary"], other["n_seen"]) == ("full", None)


def test_its_losses_are_those_that_evaluate_takes(seen_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the full model, which knows nothing of how it was trained, on a text with ids that it never saw too."""
    assert main(["evaluate", str(seen_run), "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)
    record = json.loads((seen_run / "record.json").read_text())
    for name in ("corpus/loss", "corpus/loss_offset", "heldout/loss"):
        assert taken[name] == pytest.approx(record[name.replace("/", "_")], rel=1e-5), name


def test_resumed_equals_uninterrupted(seen_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = seen_run.with_name("seen-parts")
    assert seen(parts, "--max-steps", "2") == 0
    assert re.search(r"head: \d+ ids occur in the text, the other 50,\d{3} share one row", capsys.readouterr().err)
    assert main(["train", "--resume", "--out", str(parts), "--max-steps", "6"]) == 0
    assert [line["train/loss"] for line in steps(parts)] == [line["train/loss"] for line in steps(seen_run)]
    files = [find_checkpoint(path) / "model.safetensors" for path in (parts, seen_run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_goes_on_with_its_own_head_only(seen_run: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, other, words in ((seen_run, "full", "(seen, now full)"), (run, "seen", "(full, now seen)")):
        assert main(["train", "--resume", "--out", str(path), "--head-vocabulary", other]) == 2
        assert f"another head vocabulary {words}" in capsys.readouterr().err


def test_it_is_no_way_to_go_on_from_a_model(seen_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert seen(tmp_path / "on", "--init", str(seen_run)) == 2
    assert "--head-vocabulary is seen" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()


def test_a_text_that_has_all_ids_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token file, because `<|endoftext|>` stands in no text."""
    np.arange(300, dtype=np.uint16).tofile("all.bin")
    out, tokenizer = run.with_name("all"), str(run / "tokenizer.json")
    arguments = ["train", *SMALL[2:], "--corpus", "all.bin", "--tokenizer", tokenizer, "--out", str(out)]
    assert main([*arguments, "--head-vocabulary", "seen"]) == 2
    assert "--head-vocabulary is seen, but the text has all 300 ids: leave it out" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("quick_measure")
def test_estimate_takes_it(seen_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *GPT2_IDS, "--head-vocabulary", "seen"]) == 0
    printed = capsys.readouterr()
    assert "fewer FLOP a token" in printed.err
    assert "estimate: " in printed.out

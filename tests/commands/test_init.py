"""`groundling train --init`: going on from a model of any origin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from groundling.cli import main
from groundling.corpus.goldfish import PLAIN
from groundling.corpus.shards import TokenFile
from groundling.corpus.windows import WindowConfig, Windows
from groundling.model.weights import sha256_of_weights
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

from .bottles import steps

TUNE = [
    *("--corpus", "bottles.txt", "--runtime.compile", "off", "--sampling.max_tokens", "5"),
    *("--windows.length", "24", "--windows.batch_size", "4", "--schedule.peak", "1e-4", "--evaluation.final", "none"),
]


@pytest.fixture
def source(run: Path, tmp_path: Path) -> Path:
    """An import of the trained run, which may be thrown away; its position table is longer than the windows above."""
    assert main(["import", str(run), "--out", str(tmp_path / "source")]) == 0
    return tmp_path / "source"


def tune(source: Path, out: Path, *arguments: str) -> int:
    return main(["train", "--init", str(source), "--out", str(out), *TUNE, *arguments])


def test_it_begins_with_the_loss_that_the_model_had(source: Path, tmp_path: Path, workplace: Path) -> None:
    out = tmp_path / "tuned"
    assert tune(source, out, "--max-steps", "2") == 0
    model, _, _ = load_model(find_checkpoint(source), torch.device("cpu"))
    windows = Windows(TokenFile.open(out / "train.bin").tokens, WindowConfig(24, 4), 1337, PLAIN)
    batch = windows.batch(0)
    with torch.no_grad():
        loss = float(model.loss_sum(batch.inputs, batch.targets)) / batch.n_targets
    assert steps(out)[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    tuned, tokenizer, window = load_model(find_checkpoint(out), torch.device("cpu"))
    assert (tuned.config, window) == (model.config, 24)
    assert tuned.config.n_ctx == 32
    record = json.loads((out / "record.json").read_text())
    assert record["initial_weights_sha256"] == sha256_of_weights(model) != sha256_of_weights(tuned)
    assert record["config"]["init"] == str(source)
    assert record["tokenizer_sha256"] == tokenizer.sha256


def test_resumed_equals_uninterrupted_without_the_source(source: Path, tmp_path: Path, workplace: Path) -> None:
    """Also from the beginning, before any checkpoint was due."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tune(source, whole, "--max-steps", "6") == 0
    assert tune(source, parts, "--max-steps", "3", "--keep", "9") == 0
    shutil.rmtree(source)
    assert main(["train", "--resume", "--out", str(parts), "--max-steps", "6"]) == 0
    assert [line["train/loss"] for line in steps(parts)] == [line["train/loss"] for line in steps(whole)]
    weights = [(find_checkpoint(path) / "model.safetensors").read_bytes() for path in (whole, parts)]
    assert weights[0] == weights[1]
    for path in (parts / "checkpoints").glob("step-*[1-9]"):
        shutil.rmtree(path)
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-00000000"]
    (parts / "record.json").unlink()
    assert main(["train", "--resume", "--out", str(parts), "--max-steps", "6"]) == 0
    assert (find_checkpoint(parts) / "model.safetensors").read_bytes() == weights[0]


def test_a_run_without_its_beginning_is_not_drawn_anew(
    source: Path, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    assert tune(source, out, "--max-steps", "1") == 0
    shutil.rmtree(out / "checkpoints")
    (out / "record.json").unlink()
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "before it had kept its initial model" in capsys.readouterr().err


def test_another_initial_model_is_refused(
    run: Path, source: Path, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "tuned", tmp_path / "other"
    assert tune(source, out, "--max-steps", "1") == 0
    assert (
        main(["train", "--resume", "--out", str(out), "--init", str(run), "--max-steps", "2"]) == 0
    )  # the same weights
    assert tune(out, other, "--max-steps", "1") == 0  # from one that was itself begun so
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out), "--init", str(other), "--max-steps", "3"]) == 2
    assert "was made with another initial model" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(run), "--init", str(other), "--max-steps", "20"]) == 2
    assert "was made with another initial model" in capsys.readouterr().err


def test_settings_that_it_contradicts_are_refused(
    source: Path, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    Path("sizes.yaml").write_text("model: {n_layer: 5}\n")
    for arguments, words in (
        (["--size", "355M"], "model.n_layer is 24, but the size comes from --init"),
        (["--model.n_head", "4"], "model.n_head is 4, but the size comes from --init"),
        (["--model.n_layer", "12"], "model.n_layer is 12, but"),  # the preset's own, but typed
        (["--config", "sizes.yaml"], "model.n_layer is 5, but"),
        (["--tokenizer", "train:280"], "tokenizer is train:280, but the tokenizer comes from --init"),
        (["--tokenizer", "gpt2"], "tokenizer is gpt2, but"),
        (["--windows.length", "33"], "has 32 positions"),
        (["--init", "no-such-file.pt"], "no file or folder"),
    ):
        assert tune(source, out, *arguments) == 2, arguments
        assert words in capsys.readouterr().err
        assert not out.exists()
    assert main(["train", *TUNE, "--tokenizer", "init", "--out", str(out)]) == 2
    assert "no init is given" in capsys.readouterr().err
    assert tune(source, out, "--model.n_layer", "2", "--max-steps", "1") == 0
    assert "init: " in capsys.readouterr().err


def test_an_estimate_of_it(source: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--init", str(source), *TUNE]) == 0
    assert "estimate: " in capsys.readouterr().out

"""`groundling train --init`: going on from a model of any origin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml

from groundling.cli import main
from groundling.commands.initial import Initial, with_initial
from groundling.config import RunConfig
from groundling.corpus.goldfish import PLAIN
from groundling.corpus.shards import TokenFile
from groundling.corpus.tokenizer import Tokenizer
from groundling.corpus.windows import WindowConfig, Windows
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.model.weights import sha256_of_weights
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

from .bottles import steps

TUNE = [
    *("--dtype", "fp32"),  # else the first loss is rounded where the CPU multiplies bf16
    *("--corpus", "bottles.txt", "--runtime.compile", "off", "--sampling.max_tokens", "5"),
    *("--windows.length", "24", "--windows.batch_size", "4", "--schedule.peak", "1e-4", "--evaluation.final", "none"),
]


@pytest.fixture(scope="module")
def source(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import of the trained run; its position table is longer than the windows above."""
    path = tmp_path_factory.mktemp("init") / "source"
    assert main(["import", str(run), "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def tuned(source: Path) -> Path:
    """Two steps on from the source."""
    path = source.with_name("tuned")
    assert tune(source, path, "--max-steps", "2") == 0
    return path


def tune(source: Path, out: Path, *arguments: str) -> int:
    return main(["train", "--init", str(source), "--out", str(out), *TUNE, *arguments])


def resume(out: Path, *arguments: str) -> int:
    return main(["train", "--resume", "--out", str(out), *arguments])


def test_it_begins_with_the_loss_that_the_model_had(source: Path, tuned: Path) -> None:
    model, _, _ = load_model(find_checkpoint(source), torch.device("cpu"))
    windows = Windows(TokenFile.open(tuned / "train.bin").tokens, WindowConfig(24, 4), 1337, PLAIN)
    batch = windows.batch(0)
    with torch.no_grad():
        loss = float(model.loss_sum(batch.inputs, batch.targets)) / batch.n_targets
    assert steps(tuned)[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    after, tokenizer, window = load_model(find_checkpoint(tuned), torch.device("cpu"))
    assert (after.config, window) == (model.config, 24)
    assert after.config.n_ctx == 32
    record = json.loads((tuned / "record.json").read_text())
    assert record["initial_weights_sha256"] == sha256_of_weights(model) != sha256_of_weights(after)
    assert record["config"]["init"] == str(source)
    assert record["tokenizer_sha256"] == tokenizer.sha256


def test_a_rate_for_random_weights_is_warned_of(
    source: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for peak, warned in (("2e-3", True), ("1e-4", False)):
        assert main(["estimate", "--init", str(source), *TUNE, "--schedule.peak", peak]) == 0
        said = capsys.readouterr().err
        assert ("is preset gpt2's, for random weights" in said) is warned


def test_resumed_equals_uninterrupted_without_the_source(
    source: Path, tuned: Path, tmp_path: Path, workplace: Path
) -> None:
    """Also from the beginning, before any checkpoint was due."""
    parts, gone = tmp_path / "parts", tmp_path / "gone"
    shutil.copytree(source, gone)
    assert tune(gone, parts, "--max-steps", "1") == 0
    shutil.rmtree(gone)
    assert resume(parts, "--max-steps", "2") == 0
    assert [line["train/loss"] for line in steps(parts)] == [line["train/loss"] for line in steps(tuned)]
    weights = (find_checkpoint(tuned) / "model.safetensors").read_bytes()
    assert (find_checkpoint(parts) / "model.safetensors").read_bytes() == weights

    begun = tmp_path / "begun"
    shutil.copytree(tuned, begun, ignore=shutil.ignore_patterns("record.json", "step-*[1-9]"))
    (kept,) = (begun / "checkpoints").iterdir()
    assert kept.name == "step-00000000"
    assert resume(begun) == 0
    assert (find_checkpoint(begun) / "model.safetensors").read_bytes() == weights


def test_a_run_without_its_beginning_is_not_drawn_anew(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tuned, tmp_path / "run", ignore=shutil.ignore_patterns("record.json", "step-*"))
    assert resume(tmp_path / "run") == 2
    assert "before it had kept its initial model" in capsys.readouterr().err


def test_another_initial_model_is_refused(
    run: Path, source: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, other in ((tuned, tuned), (run, source)):
        assert resume(out, "--init", str(other), "--max-steps", "30") == 2
        assert "was made with another initial model" in capsys.readouterr().err
    shutil.copytree(tuned, tmp_path / "run")
    assert resume(tmp_path / "run", "--init", str(run), "--max-steps", "3") == 0  # the same weights by another name


def test_settings_that_it_contradicts_are_refused(
    source: Path, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    Path("sizes.yaml").write_text("model: {n_layer: 5}\n")
    for arguments, words in (
        (["--size", "355M"], "model.n_layer is 24, but the size comes from --init"),
        (["--model.n_head", "4"], "model.n_head is 4, but the size comes from --init"),
        (["--model.n_layer", "12"], "model.n_layer is 12, but"),  # the preset's own, but typed
        (["--model.n_vocab", "999"], "model.n_vocab is 999, but"),
        (["--config", "sizes.yaml"], "model.n_layer is 5, but"),
        (["--tokenizer", "train:280"], "tokenizer is train:280, but the tokenizer comes from --init"),
        (["--tokenizer", "gpt2"], "tokenizer is gpt2, but"),
        (["--windows.length", "33"], "has 32 positions: give --windows.length 32 or less"),
        (["--init", "no-such-file.pt"], "no file or folder"),
    ):
        assert tune(source, out, *arguments) == 2, arguments
        assert words in capsys.readouterr().err
        assert not out.exists()
    assert main(["train", *TUNE, "--tokenizer", "init", "--out", str(out)]) == 2
    assert "no init is given" in capsys.readouterr().err


def test_a_size_says_nothing_of_the_ids(workplace: Path) -> None:
    """They are the tokenizer's, and a size that agrees in all else may be given."""
    size = GPTConfig(n_vocab=300)
    model, tokenizer = SimpleNamespace(config=size), SimpleNamespace(name="train:300")
    initial = Initial(cast(GPT2, model), cast(Tokenizer, tokenizer), 256, "runs/other")
    assert with_initial(RunConfig(), initial, ["--size", "124M"]).model == size


def test_its_positions_are_kept(source: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset's waves are not drawn, and not recorded; who asks for them by name is told."""
    for settings, warned in (("--config", False), ("--initial-positions", True)):
        out = workplace / "runs" / settings.strip("-")
        Path("waves.yaml").write_text("initial_positions: waves\n")
        given = [settings, "waves" if warned else "waves.yaml"]
        assert tune(source, out, *given, "--max-steps", "1") == 0
        assert ("initial_positions is not used: the position table is that of" in capsys.readouterr().err) == warned
        assert yaml.safe_load((out / "config.yaml").read_text())["initial_positions"] == "random"


def test_its_blocks_do_not_wait(source: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are all trained, whatever the preset lets new ones do; who asks for it by name is told."""
    for name, given in (("tacit", []), ("asked", ["--growth.every", "2", "--growth.fraction", "0.5"])):
        out = workplace / "runs" / name
        assert tune(source, out, *given, "--max-steps", "1") == 0
        printed = capsys.readouterr().err
        for setting in ("growth.every", "growth.fraction"):
            assert (f"{setting} is not used: {source} begins with all its blocks" in printed) == bool(given)
        assert yaml.safe_load((out / "config.yaml").read_text())["growth"] == {"every": 1, "fraction": 0.0}
        assert "train/blocks" not in (out / "metrics.jsonl").read_text()


@pytest.mark.usefixtures("quick_measure")
def test_an_estimate_of_it(source: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--init", str(source), "--model.n_layer", "2", *TUNE]) == 0
    printed = capsys.readouterr()
    assert "estimate: " in printed.out
    assert f"init: {source}: its weights, its size (2 layers" in printed.err


def test_windows_that_nobody_asked_for_fit_the_model(source: Path, tmp_path: Path, workplace: Path) -> None:
    """A preset's windows may be longer than a small model's; then it goes on in those that it was trained on."""
    out = tmp_path / "tuned"
    command = ["train", "--corpus", "bottles.txt", "--init", str(source), "--out", str(out), "--max-steps", "1"]
    assert main([*command, "--runtime.compile", "off", "--evaluation.final", "none"]) == 0
    _, _, window = load_model(find_checkpoint(source), torch.device("cpu"))
    assert yaml.safe_load((out / "config.yaml").read_text())["windows"]["length"] == window

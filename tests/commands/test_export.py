"""`groundling export`: what it writes is whole and verified, or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from groundling.cli import main
from groundling.commands import export
from groundling.errors import UserError
from groundling.interop import flat_safetensors, huggingface

from .bottles import files_but_cache


@pytest.fixture
def place(tmp_path: Path, run: Path) -> Path:
    """An empty folder to export into."""
    return tmp_path


def test_a_run_is_exported_verified_and_loaded(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(place / "deep" / "hf")]) == 0
    said = capsys.readouterr().err
    assert "verified: transformers" in said
    assert f"exported: {place / 'deep' / 'hf'}" in said
    assert [path.name for path in (place / "deep").iterdir()] == ["hf"]
    transformers.AutoModelForCausalLM.from_pretrained(place / "deep" / "hf")
    card = ModelCard.load(place / "deep" / "hf" / "README.md")
    record = json.loads((run / "record.json").read_text())
    measured = [record[name] for name in ("corpus_loss", "corpus_loss_offset", "heldout_loss")]
    assert [result.metric_value for result in card.data.eval_results] == measured
    assert record["corpus_sha256"] in card.text
    assert (place / "deep" / "hf" / "loss.png").is_file()


def test_a_checkpoint_is_exported_too(place: Path, run: Path) -> None:
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert main(["export", str(checkpoint), "--format", "safetensors", "--out", str(place / "flat")]) == 0
    metadata = json.loads((place / "flat" / "metadata.json").read_text())
    assert metadata["step"] == 12


WRONG: list[tuple[list[str], str]] = [
    (["--quant", "q8_0"], "--quant is not for --format hf"),
    (["--dtype", "fp8"], "--dtype"),
    (["--format", "safetensors", "--dtype", "bf16"], "--dtype is bf16: give one of fp32"),
    (["--format", "pickle"], "--format"),
    (["--out", "bottles.txt"], "bottles.txt is there already"),
    (["--out", "bottles.txt/out"], "bottles.txt is a file"),
    (["--out", "bottles.txt/deep/out"], "bottles.txt is a file"),
    (["--out", "runs/bottles"], "is there already"),
    (["--out", "runs/bottles", "--overwrite"], "no export has written"),
    (["--out", ".", "--overwrite"], "--out is ."),
    (["--out", "..", "--overwrite"], "--out is .."),
    (["--out", "/", "--overwrite"], "--out is /"),
    (["--out", "runs", "--overwrite"], "no export has written"),
    (["--out", "y" * 300], "shorter"),
    (["--out"], "--out"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[:40])
def test_wrong_input_gets_one_sentence_and_writes_nothing(
    workplace: Path, run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_but_cache(workplace)
    out = [] if "--out" in arguments else ["--out", "never"]
    assert main(["export", str(run), *out, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1
    assert files_but_cache(workplace) == before


@pytest.mark.skipif(not Path("/proc").exists(), reason="a system without /proc")
def test_a_folder_that_may_not_be_written_is_named(
    workplace: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--out", "/proc/out"]) == 2  # not even root may
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_missing_runs_and_targets_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere", "--out", "never"]) == 2
    assert main(["export", "runs/bottles"]) == 2
    assert not Path("never").exists()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_is_there_stays_until_the_new_is_whole(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run), "--format", "safetensors", "--out", str(place / "out")]
    assert main(command) == 0
    (place / "out" / "README.md").write_text("of the first")
    assert main(command) == 2
    with monkeypatch.context() as patch:
        patch.setattr(flat_safetensors, "verify", _interrupt)
        assert main([*command, "--overwrite"]) == 130
    assert (place / "out" / "README.md").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (place / "out" / "README.md").exists()
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [SafetensorError("No space left"), OSError("196608 requested and 9 written")])
def test_a_disk_that_is_full_is_one_sentence(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """As safetensors and NumPy say it."""

    def save_file(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(flat_safetensors, "save_file", save_file)
    assert main(["export", str(run), "--format", "safetensors", "--out", str(place / "out")]) == 1
    assert f"out cannot be written ({error}): free the disk" in capsys.readouterr().err
    assert list(place.iterdir()) == []


def test_the_model_that_is_read_is_not_replaced(place: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(place / "out")]) == 0
    command = ["export", str(place / "out"), "--format", "safetensors", "--out", str(place / "out"), "--overwrite"]
    assert main(command) == 2
    assert "the very model lies that is read" in capsys.readouterr().err
    command[1] = str(place / "out" / "model.safetensors")
    assert main(command) == 2
    assert "the very model lies that is read" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["write", "verify"])
def test_an_interrupted_export_leaves_nothing(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if when == "write":
        monkeypatch.setattr(huggingface, "write_json", _interrupt)  # the weights are written by then
    else:
        monkeypatch.setattr(huggingface, "verify", _interrupt)
    assert main(["export", str(run), "--out", str(place / "out")]) == 130
    assert list(place.iterdir()) == []
    assert capsys.readouterr().err.endswith("groundling: interrupted\n")


def test_what_another_program_reads_otherwise_is_not_exported(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = huggingface.config_of

    def wrong(*arguments: Any) -> dict[str, Any]:
        return honest(*arguments) | {"layer_norm_epsilon": 0.3}

    monkeypatch.setattr(huggingface, "config_of", wrong)
    assert main(["export", str(run), "--out", str(place / "out")]) == 1
    said = capsys.readouterr().err
    assert "other logits" in said
    assert "exported" not in said.replace("nothing was exported", "")
    assert list(place.iterdir()) == []
    assert main(["export", str(run), "--out", str(place / "deep" / "er" / "out")]) == 1
    assert list(place.iterdir()) == []
    assert main(["export", str(run), "--out", str(place / "out"), "--no-verify"]) == 0, "nobody looks"
    assert "verified" not in capsys.readouterr().err


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_file_that_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(UserError, match="a file that no export has written"):
        export.check_target(thesis, overwrite=True)
    thesis.write_bytes(b"GGUF\x03")
    export.check_target(thesis, overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a file that no export has written"):
        export.check_target(tmp_path / "pipe", overwrite=True)


def test_only_exports_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    export.check_target(target, overwrite=False)
    target.mkdir()
    export.check_target(target, overwrite=True)  # empty
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="no export has written"):
        export.check_target(target, overwrite=True)
    (target / "config.json").write_text("{}")  # as many projects have one
    with pytest.raises(UserError, match="no export has written"):
        export.check_target(target, overwrite=True)
    (target / "model.safetensors").touch()
    (target / "config.json").write_text('{"groundling_window": 8}')
    with pytest.raises(UserError, match=r"thesis\.txt, which no export has written"):
        export.check_target(target, overwrite=True)
    (target / "thesis.txt").unlink()
    (target / "config.json").write_text("{}")  # with the weights, as transformers saves a model
    with pytest.raises(UserError, match="no export has written"):
        export.check_target(target, overwrite=True)
    (target / "metadata.json").write_text('{"groundling_window": 8}')
    export.check_target(target, overwrite=True)
    (target / "optimizer.pt").touch()  # of another trainer
    with pytest.raises(UserError, match=r"optimizer\.pt, which no export has written"):
        export.check_target(target, overwrite=True)
    (target / "optimizer.pt").unlink()
    (target / "src").mkdir()
    with pytest.raises(UserError, match="no export has written"):
        export.check_target(target, overwrite=True)

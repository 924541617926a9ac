"""`groundling import`, and what the other commands make of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import OIDCError

from groundling.cli import main
from groundling.files import sha256_of
from groundling.interop.foreign import ASSUMED_GELU
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

from .bottles import files_but_cache


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    """The trained run as a nanoGPT-like checkpoint."""
    model, _, _ = load_model(find_checkpoint(run), torch.device("cpu"))
    config = model.config
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": config.n_ctx}
    path = run.parent.parent / "nano.pt"
    torch.save({"model": model.state_dict(), "model_args": sizes, "iter_num": 12, "loss": 1.25}, path)
    return path


@pytest.fixture(scope="module")
def imported(run: Path, checkpoint: Path) -> Path:
    path = run.parent / "imported"
    arguments = ["import", str(checkpoint), "--tokenizer", str(run / "tokenizer.json"), "--out", str(path)]
    assert main(arguments) == 0
    return path


def test_the_run_says_where_it_is_from(run: Path, imported: Path) -> None:
    facts = json.loads((imported / "imported.json").read_text())
    assert facts["format"] == "a PyTorch checkpoint"
    assert (facts["steps"], facts["train_loss"], facts["changes"]) == (12, 1.25, [ASSUMED_GELU])
    assert set(facts["files"]) == {"nano.pt"}
    assert [path.name for path in (imported / "checkpoints").iterdir()] == ["step-00000000"]
    weights = [find_checkpoint(path) / "model.safetensors" for path in (run, imported)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_it_writes_as_the_run_does(run: Path, imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for path in (run, imported):
        assert main(["sample", str(path), "--prompt", "7 green", "--temperature", "0", "--max-tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_what_needs_a_text_says_so(imported: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["trace", str(imported), "bottles.txt"], "was imported, so it has no training text"),
        (["evaluate", str(imported)], "no text of its own: give one with --corpus"),
        (["train", "--resume", "--out", str(imported)], f"give --init {imported}"),
        (["train", "--out", str(imported), "--corpus", "bottles.txt"], "holds an imported model: give another --out"),
        (["import", str(imported), "--out", str(imported)], "is there already"),
        (["import", str(imported), "--out", "bottles.txt/new"], "bottles.txt is a file"),
        (["import", "nowhere.pt", "--out", "runs/new"], "there is no file or folder nowhere.pt"),
        (["import", str(imported), "--n-head", "2", "--out", "runs/new"], "leave out --tokenizer and --n-head"),
    ):
        assert main(arguments) == 2, arguments
        assert words in capsys.readouterr().err
    assert not Path("runs/new").exists()


def test_losses_over_a_text(run: Path, imported: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over the text that the run was trained on, those that it takes over its own."""
    assert main(["train", "--resume", "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    found = {}
    before = files_but_cache(imported)
    for path in (run, imported):
        assert main(["evaluate", str(path), "--corpus", str(run / "train.bin"), "--json"]) == 0
        printed = capsys.readouterr()
        assert "text: train, " in printed.err
        found[path] = json.loads(printed.out)
        assert found[path].keys() == {"corpus/loss", "corpus/loss_offset"}
        assert found[path]["corpus/loss"] == pytest.approx(own["corpus/loss"], rel=1e-6)
        assert found[path]["corpus/loss_offset"] == pytest.approx(own["corpus/loss_offset"], rel=1e-6)
    assert files_but_cache(imported) == before
    assert main(["evaluate", str(imported), "--corpus", "bottles.txt"]) == 0
    printed = capsys.readouterr()
    assert "text: bottles, " in printed.err
    assert "corpus/loss" in printed.out
    assert "heldout" not in printed.out
    assert main(["evaluate", str(imported), "--corpus", "bottles.txt", "--corpus", str(run / "samples.txt")]) == 0
    assert "text: bottles-and-1-more, " in capsys.readouterr().err


def test_what_is_assumed_of_it_is_said_by_whatever_reads_it(
    run: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--tokenizer", str(run / "tokenizer.json")]
    (tmp_path / "source").mkdir()
    for name, source in (("tokenizer.json", run), (checkpoint.name, checkpoint.parent)):
        (tmp_path / "source" / name).write_bytes((source / name).read_bytes())
    beside = str(tmp_path / "source" / checkpoint.name)
    for arguments in (
        ["import", str(checkpoint), *own, "--out", str(tmp_path / "run")],
        ["export", str(checkpoint), *own, "--format", "safetensors", "--out", str(tmp_path / "flat")],
        ["train", "--init", beside, "--corpus", "bottles.txt", "--max-steps", "1", "--out", str(tmp_path / "trained")],
    ):
        assert main(arguments) == 0
        assert f"changed: {ASSUMED_GELU}" in capsys.readouterr().err


def test_a_run_is_imported_from_a_run(run: Path, tmp_path: Path) -> None:
    assert main(["import", str(run), "--out", str(tmp_path / "again")]) == 0
    weights = [find_checkpoint(path) / "model.safetensors" for path in (run, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert json.loads((tmp_path / "again" / "imported.json").read_text())["files"] == {
        "model.safetensors": sha256_of(weights[0])
    }


@pytest.mark.parametrize("held", [None, (), ("config.json",), ("config.json", "pytorch_model.bin")])
def test_no_pickle_of_the_hub_is_taken(
    held: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository of other formats gives no folder, or one without weights that we take."""
    import huggingface_hub

    folder = tmp_path / "snapshots" / "1"
    if held is not None:
        folder.mkdir(parents=True)
    for name in held or ():
        (folder / name).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert main(["import", "someone/model", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "someone/model on the hub has no weights in safetensors" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [httpx2.ReadError("cut"), httpx2.ProxyError("no"), RuntimeError("closed"), OSError(), OIDCError("no id token")],
)
def test_a_download_that_breaks_off_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert main(["import", "someone/model", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "check the path, the name, and the network" in said
    assert said.count("\n") == 1


def test_the_hub_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offline, a name is looked up in the client's cache, which has none here."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["import", "someone/no-such-model", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "no file or folder someone/no-such-model" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()

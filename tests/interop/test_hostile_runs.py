"""What a run folder, a name or a tensor can say to harm, beyond test_hostile.py: each ends as those do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundling.cli import main
from groundling.corpus.shards import make_header
from groundling.errors import CheckpointError, UserError
from groundling.interop.sources import is_run
from groundling.interop.tensor_files import safetensors_weights
from groundling.training import checkpoint

from .conftest import MakeTrained
from .hostile import refusal, write_folder
from .test_hostile import LN, spoil_header

CHECKPOINT = "checkpoints/step-00000000"


@pytest.fixture
def folder(make_trained: MakeTrained, tmp_path: Path) -> Path:
    return write_folder(make_trained(), tmp_path / "model")


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def change_manifest(run: Path, **changes: Any) -> None:
    manifest = run / CHECKPOINT / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


# --- run folders of others


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../../dev/zero", "config.yaml", "x\n\x1b[2J"])
def test_a_manifest_that_names_other_files(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Summing /dev/zero has no end."""
    change_manifest(run, **{name: "0" * 64})
    assert "which no checkpoint has" in refusal(run, capsys)


def test_a_manifest_that_sums_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINT / "manifest.json").write_text("{}")
    assert "its manifest lacks model.safetensors" in refusal(run, capsys)


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_files_of_terabytes(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINT / name).touch()
    try:
        os.truncate(run / CHECKPOINT / name, 1 << 40)
    except OSError:
        pytest.skip("this file system has no files so large")
    change_manifest(run, **{name: "0" * 64})
    said = f"{name} is far larger than its network"
    assert checkpoint.damage(run / CHECKPOINT) == said
    if name in checkpoint.USED:  # the optimizer's is not read by what only uses the model
        assert said in refusal(run, capsys)


@pytest.mark.parametrize("name", ["manifest.json", "model.json", "model.safetensors"])
def test_a_fifo_in_a_checkpoint(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINT / name).unlink()
    os.mkfifo(run / CHECKPOINT / name)
    assert "no regular file" in refusal(run, capsys)


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", '{"a": 1, "a": 2}', "1" + "0" * 5000])
def test_manifests_that_are_none(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINT / "manifest.json").write_text(content)
    assert "its manifest or a file is missing or unreadable" in refusal(run, capsys)


PENNY = Path(__file__).parents[2] / "docs" / "record" / "penny" / "record.json"


@pytest.fixture
def record(run: Path) -> dict[str, Any]:
    """A sound record of the run's weights."""
    (run / "imported.json").unlink()
    sums = json.loads((run / CHECKPOINT / "manifest.json").read_text())
    return json.loads(PENNY.read_text()) | {"weights_sha256": sums["model.safetensors"]}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[("steps", value) for value in ([1], -1, None, True)],
        *[
            ("passes", "x"),
            ("wall_s", float("inf")),
            ("looks_s", "x"),
            ("corpus_loss", "x"),
            ("tokens_seen", 0.5),
            ("passes", 10**400),
        ],
        *[("machine", [1]), ("machine.threads", "x"), ("machine.flags", [1]), ("versions", {"torch": [2]})],
        ("machine.memory_bytes", 10**400),
        *[("first_batch_below_target", 5), ("first_batch_below_target.loss", "x")],
        *[("config", 3), ("config.sampling", 1), ("config.sampling.temperature", "hot"), ("config.sampling.stop", [0])],
        *[("config.stopping.target", {}), ("config.stopping.measure", 5), ("config.prompts", [1])],
        *[("config.text.sources", [5]), ("config.text.sources", "x")],
    ],
)
def test_records_of_other_kinds(
    place: str, value: Any, run: Path, record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *parents, name = place.split(".")
    section = record
    for parent in parents:
        section = section[parent]
    section[name] = value
    (run / "record.json").write_text(json.dumps(record))
    for form in ("hf", "safetensors"):
        assert main(["export", str(run), "--format", form, "--out", str(tmp_path / "export"), "--no-verify"]) == 2
        said = capsys.readouterr().err
        assert re.search(rf"its ([\w.]+\.)?{name}", said)
        assert said.count("\n") == 1
        assert not list(tmp_path.glob("*export*"))


@pytest.mark.parametrize(
    "name", ["tokens_seen", "machine", "config", "device", "steps", "tokens_per_s", "heldout_loss"]
)
def test_records_that_lack_something(
    name: str, run: Path, record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del record[name]
    (run / "record.json").write_text(json.dumps(record))
    assert main(["export", str(run), "--out", str(tmp_path / "export"), "--no-verify"]) == 2
    assert f"it lacks {name}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", "{" * 100_000, None])
@pytest.mark.parametrize("name", ["record.json", "imported.json"])
def test_what_cannot_be_read_may_be_removed(
    name: str, content: str | None, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "imported.json").unlink()
    (run / name).mkdir() if content is None else (run / name).write_text(content)
    assert main(["export", str(run), "--out", str(tmp_path / "export"), "--no-verify"]) == 2
    said = capsys.readouterr().err
    assert "remove it to do without" in said
    assert said.count("\n") == 1


def test_losses_that_are_no_numbers_are_not_quoted(run: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """A network that has overflowed gives them, and its run records them."""
    record["corpus_loss"], record["corpus_loss_offset"] = float("nan"), float("inf")
    (run / "record.json").write_text(json.dumps(record))
    (run / "evaluated.json").write_text(
        json.dumps({"weights_sha256": record["weights_sha256"], "losses": {"corpus/loss": float("nan")}})
    )
    assert main(["export", str(run), "--out", str(tmp_path / "export"), "--no-verify"]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "nan" not in card.lower().replace("nanogpt", "")


def test_a_sound_record_of_many_files(run: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """A command line may be 2 MiB long, and stands in it twice."""
    record["config"]["text"]["sources"] = [f"{n:0100}.txt" for n in range(20_000)]
    record["command"] = " ".join(record["config"]["text"]["sources"])
    (run / "record.json").write_text(json.dumps(record))
    (run / "evaluated.json").write_text(
        json.dumps({"weights_sha256": record["weights_sha256"], "losses": {"corpus/loss": "x"}})
    )
    assert main(["export", str(run), "--out", str(tmp_path / "export"), "--no-verify"]) == 0


def test_tokens_that_are_no_ids(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.full(100, 60_000, dtype=np.uint16)
    header = make_header(tokens.dtype, len(tokens), "0" * 64, hashlib.sha256(tokens.tobytes()).hexdigest())
    (run / "train.bin").write_bytes(header + tokens.tobytes())
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 2
    assert main(["evaluate", str(run)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "train.bin has the token 60,000, and the run has 301 ids" in line] == said[-2:]


@pytest.mark.parametrize("section", ["text", "windows", "objective", "stopping", "sampling"])
def test_settings_of_other_kinds(section: str, run: Path) -> None:
    from groundling.training.run_folder import RunFolder

    sound = "preset: gpt2\ntext: {sources: [x]}\n"
    (run / "config.yaml").write_text(sound)
    assert RunFolder(run).settings() == {"preset": "gpt2", "text": {"sources": ["x"]}}
    (run / "config.yaml").write_text(sound.replace("text: {sources: [x]}\n", "") + f"{section}: 5\n")
    with pytest.raises(CheckpointError, match=f"its {section} is none that a run has|it lacks text"):
        RunFolder(run).settings()
    (run / "config.yaml").write_text(sound.replace("gpt2", "5"))
    with pytest.raises(CheckpointError, match="its preset is none"):
        RunFolder(run).settings()


def test_a_name_that_is_no_text_is_no_hindrance(make_trained: MakeTrained, tmp_path: Path) -> None:
    """Linux allows any bytes in names."""
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xffmodel"))
    try:
        write_folder(make_trained(), path)
    except OSError:
        pytest.skip("this file system has names of text alone")
    for form in ("hf", "gguf", "safetensors", "ctranslate2", "onnx"):
        out = tmp_path / form
        assert main(["export", str(path), "--format", form, "--out", str(out), "--no-verify"]) == 0, form


def test_a_configuration_that_refers_to_itself(run: Path) -> None:
    """Nine lists of nine of the last: no machine has memory for it once it is written out."""
    from groundling.training.run_folder import RunFolder

    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    (run / "config.yaml").write_text("\n".join([*lines, "preset: x", "text: {sources: *a14}"]))
    with pytest.raises(CheckpointError, match="refers to itself"):
        RunFolder(run).settings()
    assert RunFolder(run).document_names() == ()


# --- what takes long


def empty_tensors(names: list[str]) -> Callable[[dict[str, Any]], None]:
    def spoil(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for name in names})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda h: h.update({"module." * 400_000 + LN: h.pop(LN)}), "2,800,0.. letters long"),
        (empty_tensors([f"transformer.h.{n}.attn.bias" for n in range(9_000)] + ["x"]), "holds the unknown x"),
        (empty_tensors([f"transformer.h.{n}.ln_1.bias" for n in range(2, 900)]), "its weights have 900"),
        (lambda h: h.update({"transformer.h.\u0661.ln_1.bias": h.pop("transformer.h.1.ln_1.bias")}), "lacks"),
        (lambda h: h.update({"transformer.h.01.ln_1.bias": h.pop("transformer.h.1.ln_1.bias")}), "lacks"),
    ],
)
def test_names(spoil: Callable[[dict[str, Any]], object], words: str, folder: Path, capsys: Any) -> None:
    import re

    spoil_header(folder / "model.safetensors", spoil)
    assert re.search(words, refusal(folder, capsys))


def test_a_key_twice_among_many(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ("{" + ",".join(f'"{n}":0' for n in range(200_000)) + ',"199999":0}').encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert "the key '199999' twice" in refusal(folder, capsys)


def test_a_tokenizer_far_larger_than_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}, "merges": ["a b"] * 500_000}}))
    assert "more than it needs" in refusal(folder, capsys)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("a b\n" * 500_000)
    assert "more than it needs" in refusal(folder, capsys)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    """A mapping of it would end the process (SIGBUS)."""
    weights = safetensors_weights(folder / "model.safetensors")
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        weights.read("transformer.wte.weight")


def test_tensors_of_shared_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of a few kilobytes for a network of any size."""
    numbers = torch.zeros(10_000)
    torch.save({f"transformer.h.{n}.ln_1.weight": numbers for n in range(3)}, tmp_path / "shared.pt")
    assert "share their numbers" in refusal(tmp_path / "shared.pt", capsys)


# --- sentences


@pytest.mark.parametrize("name", ["x\n\x1b[31mred", "x\u202e\u2028y", "x" * 5_000, "\x00\x7f\x9b2J"])
def test_nothing_that_is_quoted_steers_a_terminal(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil_header(folder / "model.safetensors", lambda header: header.update({name: header.pop(LN)}))
    assert refusal(folder, capsys)[:-1].isprintable()
    sentence = str(UserError(f"{name} is wrong: {name}"))
    assert sentence.isprintable()
    assert len(sentence) < 700


def test_a_folder_is_a_run_by_what_is_in_it(tmp_path: Path) -> None:
    """Others' models may have a folder or a file of such a name, too."""
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    (tmp_path / "identity.json").write_text("{}")
    assert not is_run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    assert is_run(tmp_path)


def test_an_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/proc/self/mem").is_file():
        pytest.skip("this system has no such file")
    assert main(["import", "/proc/self/mem", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_sums_still_hold(run: Path, tmp_path: Path) -> None:
    """What the others spoil."""
    manifest = json.loads((run / CHECKPOINT / "manifest.json").read_text())
    assert manifest["model.json"] == hashlib.sha256((run / CHECKPOINT / "model.json").read_bytes()).hexdigest()
    assert main(["import", str(run), "--out", str(tmp_path / "again")]) == 0

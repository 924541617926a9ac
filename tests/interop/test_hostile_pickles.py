"""Pickles made to harm: refused like other hostile files, and what they would call is never called."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groundling.cli import main

from .conftest import MakeTrained
from .hostile import refusal, write_folder


@pytest.fixture
def folder(make_trained: MakeTrained, tmp_path: Path) -> Path:
    return write_folder(make_trained(), tmp_path / "model")


class Bomb:
    """Runs a command when it is unpickled by whoever does so without a guard."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


class Call:
    """Pickles as a call."""

    def __init__(self, called: object, *arguments: object) -> None:
        self.call = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Storage:
    def __init__(self, key: str, n_elements: int, kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", n_elements)


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return value.identity if isinstance(value, Storage) else None


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(storage: object, offset: object, shape: object, strides: object) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


def torch_checkpoint(folder: Path) -> dict[str, Any]:
    return {"model": load_file(folder / "model.safetensors"), "step": 3}


def describing(folder: Path) -> dict[str, Any]:
    """A checkpoint of calls, as torch.save would pickle it."""
    calls = {}
    for key, (name, value) in enumerate(torch_checkpoint(folder)["model"].items()):
        calls[name] = tensor(Storage(str(key), value.numel()), 0, tuple(value.shape), value.stride())
    return {"model": calls}


def storages_of(folder: Path) -> dict[str, bytes]:
    values = torch_checkpoint(folder)["model"].values()
    return {f"data/{key}": value.numpy().tobytes() for key, value in enumerate(values)}


def write_zip(path: Path, content: bytes, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")  # PyTorch's reader asks for it
        for name, stored in entries.items():
            archive.writestr(f"archive/{name}", stored)


def test_the_sound_checkpoints_are_taken(folder: Path, tmp_path: Path) -> None:
    """What the others spoil."""
    torch.save(torch_checkpoint(folder), tmp_path / "saved.pt")
    write_zip(tmp_path / "described.pt", pickled(describing(folder)), storages_of(folder))
    options = ["--tokenizer", str(folder / "tokenizer.json"), "--n-head", "2"]
    for name in ("saved", "described"):
        assert main(["import", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / name), *options]) == 0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["top", "beside", "deep", "weights"])
def test_a_bomb_does_not_go_off(
    where: str, zipped: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb, sound = Bomb(tmp_path / "marker"), torch_checkpoint(folder)
    content: Any = {
        "top": bomb,
        "beside": sound | {"optimizer": bomb},
        "deep": sound | {"a": {"b": [{"c": (1, {"d": bomb})}]}},
        "weights": {"model": sound["model"] | {"transformer.bomb": bomb}},
    }[where]
    torch.save(content, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
    said = refusal(tmp_path / "bomb.pt", capsys)
    assert "posix.system" in said or "os.system" in said
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "called",
    [
        Call(eval, "1"),
        Call(getattr, "a", "b"),
        Call(bytearray, 10**12),
        Call(torch.UntypedStorage, 10**12),
        Call(torch.load, "x"),
        Call(zipfile.ZipFile, "x"),
        Call(__import__, "os"),
    ],
    ids=lambda call: getattr(call.call[0], "__name__", "class"),
)
def test_classes_are_refused_by_name(
    called: Call, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "called.pt"
    write_zip(path, pickled(describing(folder) | {"x": called}), storages_of(folder))
    assert f"{called.call[0].__name__}, which is none of the harmless" in refusal(path, capsys)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor(Storage("0", 96), 0, (2**40, 2**20), (0, 0)), "claims the shape"),
        (tensor(Storage("0", 96), 2**50, (32,), (1,)), "claims the shape"),
        (tensor(Storage("0", 96), 0, (32,), (2**40,)), "claims the shape"),
        (tensor(Storage("0", 96), -1, (32,), (1,)), "no sizes"),
        (tensor(Storage("0", 96), 0, (32,), (-1,)), "no sizes"),
        (tensor(Storage("0", 96), 0, ("32",), (1,)), "no sizes"),
        (tensor(Storage("0", 96), 0, (32,), (1, 1)), "damaged"),
        (tensor(Storage("0", 2**50), 0, (2**50,), (1,)), "in two ways"),
        (tensor(Storage("99", 2**50), 0, (2**50,), (1,)), "not all in it"),
        (tensor(Storage("0", 96, torch.DoubleStorage), 0, (32,), (1,)), "in two ways"),
        (tensor(Storage("0", 96, torch.UntypedStorage), 0, (32,), (1,)), "UntypedStorage"),
        (tensor("0", 0, (32,), (1,)), "no sizes"),
        (Call(OrderedDict, [(1, 2)]), "calls collections.OrderedDict"),
        (Call(torch.Size, [-1]), "calls torch.Size"),
        ([2**70_000], "LONG4"),
        ({(1, 2): 3}, "neither names nor numbers"),
        (list(range(500_000)), "far longer"),
    ],
)
def test_pickles_that_lie(
    made: object, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lies.pt"
    write_zip(path, pickled(describing(folder) | {"x": made}), storages_of(folder))
    assert words in refusal(path, capsys)


def test_nesting_without_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    write_zip(tmp_path / "deep.pt", deep, {})
    assert "no dictionary of weights" in refusal(tmp_path / "deep.pt", capsys)
    itself = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
    write_zip(tmp_path / "itself.pt", itself, {})
    assert "a is no tensor" in refusal(tmp_path / "itself.pt", capsys)
    write_zip(tmp_path / "memo.pt", b"\x80\x02}r\xff\xff\xff\xff.", {})
    assert "no weights" in refusal(tmp_path / "memo.pt", capsys)


MANY = b"M\x01\x00" * 60_000
"""Numbers on the stack, 180 kB of them."""
CALL_SIZE = b"ctorch\nSize\nq\x00](" + MANY + b"e\x85q\x02(" + b"h\x00h\x02R" * 5_000 + b"t."
MANY_ATTRIBUTES = b"".join(b"M" + struct.pack("<H", n) + b"K\x01" for n in range(60_000))
CALL_BUILD = b"}(" + MANY_ATTRIBUTES + b"uq\x00c__main__\nGPTConfig\nq\x01(" + b"h\x01)\x81h\x00b" * 1_000 + b"t."
LONG_SHAPE = b"(" + b"\x8a\x08" + (2**62).to_bytes(8, "little") + b"q\x00" + b"h\x00" * 60_000 + b"tq\x01"
CALL_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQK\x00" + LONG_SHAPE + b"h\x01tR."
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CALL_SIZE, "calls torch.Size"),
        (CALL_BUILD, "60,000 attributes"),
        (CALL_TENSOR, "no sizes"),
    ],
    ids=["copies of a list", "copies of attributes", "a product of many numbers"],
)
def test_little_that_grows(content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle names again and again what it made once: each name costs two bytes, and a copy would cost many."""
    write_zip(tmp_path / "grows.pt", b"\x80\x02" + content, {})
    assert words in refusal(tmp_path / "grows.pt", capsys)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"n_layer": "2" * 1_000_000}, "n_layer"),
        ({"n_layer": -2}, "n_layer -2"),
        ({"n_layer": 2**40}, "n_layer 1099511627776"),
        ({"n_layer": 2, "n_head": [2] * 10}, "n_head a list"),
        ({"n_layer": 2, "vocab_size": 302}, "n_vocab 302"),
        ({"n_layer": 2, "__class__": "x", "n_head": 3}, "3 heads"),
        ("no dictionary", "attributes to what has none"),
    ],
)
def test_a_config_with_hostile_attributes(
    attributes: object, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.pt"
    content = pickled(describing(folder))
    state = pickled(attributes)[2:-1]
    config = b"X\x06\x00\x00\x00configc__main__\nGPTConfig\n)\x81" + state + b"bs."
    write_zip(path, content[:-1] + config, storages_of(folder))
    assert words in refusal(path, capsys, "--tokenizer", str(folder / "tokenizer.json"))


def test_zips(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zip.pt"
    content, storages = pickled(describing(folder)), storages_of(folder)
    write_zip(path, content, {"data/0": bytes(200_000_000)}, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(path, capsys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
    assert "without data.pkl" in refusal(path, capsys)
    write_zip(path, content, storages | {"code/model.py": b"", "constants.pkl": b""})
    assert "TorchScript" in refusal(path, capsys)
    write_zip(path, content, dict(list(storages.items())[1:]))
    assert "not all in it" in refusal(path, capsys)
    write_zip(path, content, storages | {"data/0": b"\0"})
    assert "not all in it" in refusal(path, capsys)
    write_zip(path, content, storages | {"byteorder": b"big"})
    assert "byteorder is not little" in refusal(path, capsys)
    write_zip(path, content, storages | {f"more/{n}": b"" for n in range(30_000)})
    assert "entries" in refusal(path, capsys)
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, content, storages | {"data.pkl": pickled({})})
    assert "an entry twice" in refusal(path, capsys)
    write_zip(path, content, storages)
    sound = path.read_bytes()
    for cut in (10, len(sound) // 2, len(sound) - 5):
        path.write_bytes(sound[:cut])
        refusal(path, capsys)
    at = sound.rindex(b"PK\x01\x02")  # the last entry of the list: its two sizes
    path.write_bytes(sound[: at + 20] + struct.pack("<II", 2**31, 2**31) + sound[at + 28 :])
    assert "its entries" in refusal(path, capsys)


def test_cut_legacy_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.pt"
    torch.save(torch_checkpoint(folder), path, _use_new_zipfile_serialization=False)
    sound = path.read_bytes()
    for cut in (3, 20, 300, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:cut])
        refusal(path, capsys)
    path.write_bytes(pickled({"model": 1}))
    assert "none of torch.save's" in refusal(path, capsys)


def test_damage_never_ends_in_a_traceback(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any byte of the pickle changed: refused, or read as what it then says."""
    content, storages = pickled(describing(folder)), storages_of(folder)
    path = tmp_path / "damaged.pt"
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(content), (60,), generator=generator).tolist():
        flipped = bytes([content[place] ^ (1 << place % 8)])
        write_zip(path, content[:place] + flipped + content[place + 1 :], storages)
        options = ["--tokenizer", str(folder / "tokenizer.json"), "--n-head", "2"]
        assert main(["import", str(path), "--out", str(tmp_path / f"out{place}"), *options]) in (0, 2)
        capsys.readouterr()


def test_a_list_of_storages_that_would_be_endless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three hundred bytes say a tuple of 2^40 leaves; spelled out, it would fill any memory."""
    head = b"".join(pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, {}, {}))
    endless = b"\x80\x02])q\x00" + b"h\x00\x86q\x00" * 40 + b"a."
    (tmp_path / "endless.pt").write_bytes(head + endless)
    assert "list of storages" in refusal(tmp_path / "endless.pt", capsys)

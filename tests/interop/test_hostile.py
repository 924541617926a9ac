"""Files made to harm: each is refused in one sentence, in seconds, in flat memory, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundling.cli import main
from groundling.model.weights import to_huggingface

from .conftest import MakeTrained
from .hostile import CONFIG, begin_peak, peak_bytes, refusal, write_folder


@pytest.fixture
def folder(make_trained: MakeTrained, tmp_path: Path) -> Path:
    return write_folder(make_trained(), tmp_path / "model")


def test_the_sound_folder_is_taken(folder: Path, tmp_path: Path) -> None:
    """What the others spoil."""
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0


def test_memory_that_is_taken_is_seen(folder: Path) -> None:
    """However much other tests had before."""
    taken = [bytearray(os.urandom(1)) * (1 << 20) for _ in range(300)]
    taken.clear()
    begin_peak()
    before = peak_bytes()
    taken += [bytearray(os.urandom(1)) * (1 << 20) for _ in range(128)]
    assert peak_bytes() - before > 100 << 20


# --- configurations


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 10**9}, "n_layer 1,000,000,000, but its weights have 2"),
        ({"n_head": 0}, "n_head 0"),
        ({"n_head": 5}, "5 heads do not divide"),
        ({"n_embd": -32}, "n_embd -32"),
        ({"n_layer": "2; rm -rf /"}, "n_layer '2; rm"),
        ({"n_layer": True}, "n_layer True"),
        ({"n_layer": 2.0}, "n_layer 2.0"),
        ({"n_layer": 10**400}, "n_layer 1000"),
        ({"vocab_size": [301]}, "vocab_size a list"),
        ({"n_positions": 25}, "n_ctx twice"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map a dict"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"activation_function": "relu"}, "activation_function 'relu'"),
        ({"n_inner": 100}, "n_inner 100"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ({"add_cross_attention": True}, "add_cross_attention True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config a dict"),
    ],
)
def test_configurations(changes: dict[str, Any], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    assert words in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 60_000, "nested too deep"),
        ('{"a": ' * 60_000, "nested too deep"),
        ('{"n_layer": 2, "n_layer": 3}', "key 'n_layer' twice"),
        ("{" + ", ".join(f'"{n}": 0' for n in [*range(20_000), 19_999]) + "}", "key '19999' twice"),
        ("[1, 2]", "no JSON object"),
        ("not JSON", "cannot be read as JSON"),
        ('{"n_layer": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json(name: str, content: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text(content, errors="surrogateescape")
    assert words in refusal(folder, capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "metadata.json"])
def test_json_of_two_gigabytes(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).touch()
    os.truncate(folder / name, 2 << 30)
    assert "2,147,483,648 bytes" in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 10**9}, "n_layer is 1,000,000,000"),
        ({"n_layer": 3}, "another network"),
        ({"n_ctx": 10**9}, "than this machine has memory"),
        ({"window": 25}, "a window of 25 in 24 positions"),
        ({"n_embd": -2}, "says no size"),
        ({"n_head": 0}, "says no size"),
        ({"n_layer": "2"}, "says no size"),
        ({"code": "x"}, "says no size"),
    ],
)
def test_runs_from_elsewhere(
    changes: dict[str, Any], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their sums hold; only what they say of the network is made up."""
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000000"
    model = checkpoint / "model.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | changes))
    manifest = checkpoint / "manifest.json"
    sums = json.loads(manifest.read_text()) | {"model.json": hashlib.sha256(model.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(sums))
    assert words in refusal(tmp_path / "run", capsys)


# --- tokenizers


def test_a_tokenizer_far_larger_than_the_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = json.loads((folder / "tokenizer.json").read_text())
    sound["model"]["merges"] *= 10_000
    (folder / "tokenizer.json").write_text(json.dumps(sound))
    assert "more than it needs" in refusal(folder, capsys)


def test_tokenizers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = json.loads((folder / "tokenizer.json").read_text())

    def refused(spoil: Callable[[dict[str, Any]], object]) -> str:
        spoiled = json.loads(json.dumps(sound))
        spoil(spoiled)
        (folder / "tokenizer.json").write_text(json.dumps(spoiled))
        return refusal(folder, capsys)

    assert "without gaps" in refused(lambda t: t["model"]["vocab"].update({"x" * 9: 10**9}))
    assert "without gaps" in refused(lambda t: t["model"]["vocab"].update({"!": -1}))
    assert "GPT-2's kind" in refused(lambda t: t["model"]["vocab"].update({"!": float("inf")}))
    assert "GPT-2's kind" in refused(lambda t: t["model"].update({"vocab": [1, 2]}))
    assert "GPT-2's kind" in refused(lambda t: t.update({"model": [t["model"]]}))
    assert "do not fit" in refused(lambda t: t["model"]["merges"].append("no such"))
    assert "301 ids where its tokenizer" in refused(lambda t: t["model"]["vocab"].update({"!!!!": 301}))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"!": "zero"}')
    (folder / "merges.txt").write_text("a b c\n")
    assert "what is no id" in refusal(folder, capsys)
    (folder / "vocab.json").write_text('{"!": 0}')
    assert "merges" in refusal(folder, capsys)
    (folder / "merges.txt").unlink()
    assert "import it with --tokenizer" in refusal(folder, capsys)


# --- places


def test_places(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text.pt").write_text("my weights\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("fifo", "loop"):
        assert "no regular file" in refusal(tmp_path / name, capsys)
    for name in ("text.pt", "empty.pt"):
        assert "no model that Groundling reads" in refusal(tmp_path / name, capsys)
    assert main(["import", "/dev/zero", "--out", str(tmp_path / "out")]) == 2
    assert "no regular file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "neither model.safetensors" in refusal(tmp_path / "empty", capsys)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "no regular file" in refusal(folder, capsys)
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/passwd")
        assert "leads out of its folder" in refusal(folder, capsys)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    assert main(["import", str(folder), "--out", str(tmp_path / "sound")]) == 0


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "..", "a/b.safetensors", "x\0y", ""])
def test_an_index_that_points_elsewhere(place: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not in its folder" in refusal(folder, capsys)


def test_an_index_of_a_link_that_leads_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").rename(tmp_path / "secret")
    (folder / "shard").symlink_to(tmp_path / "secret")
    index = {"weight_map": {"transformer.wte.weight": "shard"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "leads out of its folder" in refusal(folder, capsys)


def test_an_index_that_lies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "model-1.safetensors"}}))
    assert "does not name" in refusal(folder, capsys)
    index.write_text(json.dumps({"weight_map": ["model-1.safetensors"]}))
    assert "no weight_map" in refusal(folder, capsys)
    index.write_text(json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(2000)}}))
    assert "2,000 files" in refusal(folder, capsys)


# --- safetensors


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def spoil_header(path: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    header, tensors = header_of(path)
    spoil(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


LN, WTE = "transformer.ln_f.bias", "transformer.wte.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda h: h[LN].update(data_offsets=[0, 128]), "overlap"),
        (lambda h: h[LN].update(data_offsets=[2**62, 2**62 + 128]), "belong to no tensor"),
        (lambda h: h[LN].update(data_offsets=[-128, 0]), "no size"),
        (lambda h: h[LN].update(data_offsets=[128, 0]), "do not fit the shape"),
        (lambda h: h[LN].update(data_offsets=["0", "128"]), "no size"),
        (lambda h: h[LN].update(shape=[2**61]), "do not fit the shape"),
        (lambda h: h[LN].update(shape=[2**32, 2**32, 2**32]), "do not fit the shape"),
        (lambda h: h[LN].update(shape=[1] * 100_000 + [32]), "no size"),
        (lambda h: h[LN].update(shape=[4, 8]), "shape (4, 8) where this GPT-2 has (32,)"),
        (lambda h: h[LN].update(dtype="I32"), "int32, not of floating-point numbers"),
        (lambda h: h[LN].update(dtype="I8", shape=[128]), "shape (128,)"),
        (lambda h: h[LN].update(dtype="F8_E4M3"), "F8_E4M3"),
        (lambda h: h[LN].update(dtype=["F32"]), "cannot be read as safetensors"),
        (lambda h: h[LN].pop("shape"), "lacks 'shape'"),
        (lambda h: h.update({LN: 7}), "describes no tensor"),
        (lambda h: h.pop(LN), "belong to no tensor"),
        (lambda h: h.update({"x": h.pop(LN)}), "lacks transformer.ln_f.bias"),
        (lambda h: h.update({"transformer.h.999999999.ln_1.bias": h.pop(LN)}), "1,000,000,000"),
        (lambda h: h.update({"h.0.ln_1.bias": h.pop(LN)}), "are the same"),
        (lambda h: h.update({"empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "unknown empty"),
        (lambda h: [h.pop(name) for name in list(h)], "describes 0 bytes"),
    ],
)
def test_safetensors_headers(
    spoil: Callable[[dict[str, Any]], object], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil_header(folder / "model.safetensors", spoil)
    assert words in refusal(folder, capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n", "run `git lfs pull`"),
        (b"", "header is said to end"),
        (b"\x01\x02", "header is said to end"),
        (struct.pack("<Q", 2**60) + b"{}", "header is said to end"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header is said to end"),
        (struct.pack("<Q", 3) + b"[1]", "no JSON object"),
        (struct.pack("<Q", 100_000) + b'{"a":' * 20_000, "nested too deep"),
        (struct.pack("<Q", 14) + b'{"a":1, "a":1}', "'a' twice"),
        (struct.pack("<Q", 2) + b"{}" + bytes(100), "belong to no|0 bytes of tensors"),
        (struct.pack("<Q", 2) + b"{}", "lacks transformer.wte.weight"),
    ],
)
def test_safetensors_files(content: bytes, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(content)
    said = refusal(folder, capsys)
    assert re.search(words, said)


def test_a_name_that_commands_the_terminal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"\x1b[2J\ngroundling: \x9b31mdone": torch.zeros(1)}, tmp_path / "named.safetensors")
    sound = load_file(folder / "model.safetensors")
    save_file(sound | load_file(tmp_path / "named.safetensors"), folder / "model.safetensors")
    said = refusal(folder, capsys)
    assert "unknown \\x1b[2J\\ngroundling: \\x9b31mdone" in said
    assert said.rstrip("\n").isprintable()


def test_a_name_without_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = load_file(folder / "model.safetensors")
    save_file(sound | {"module." * 500_000: torch.zeros(1)}, folder / "model.safetensors")
    assert "3,500,000 letters" in refusal(folder, capsys)


def test_a_safetensors_header_of_gigabytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 2 << 30) + b"{")
        file.truncate((2 << 30) + 8)
    assert "far more than a GPT-2's" in refusal(folder, capsys)


def test_a_sparse_file_of_gigabytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its header and its size agree; only no machine holds it."""
    width, rows = 32, 2**30
    sizes = {WTE: [rows, width]}
    header, _ = header_of(folder / "model.safetensors")
    end, entries = 0, {}
    for name, entry in header.items():
        if name != "__metadata__":
            shape = sizes.get(name, entry["shape"])
            n_bytes = 4 * torch.Size(shape).numel()
            entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + n_bytes]}
            end += n_bytes
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError:
            pytest.skip("this file system has no files so large")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows}))
    assert "1,073,741,824 ids" in refusal(folder, capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(
    value: float, make_trained: MakeTrained, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = to_huggingface(make_trained().model)
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].clone()
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    assert "h.1.mlp.c_fc.weight holds NaN or an infinity" in refusal(folder, capsys)

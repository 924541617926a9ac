"""Tensors of others, described before anything of them is believed: safetensors headers.

Invariant: what a file claims is compared with the file's size before anything is allocated for it; memory grows with
the header, which is bounded, never with a claim. Nothing but regular files is opened.

Source: the format section of https://github.com/huggingface/safetensors (8 bytes of little-endian length, JSON header,
then the tensors, which tile the rest of the file).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundling.errors import CheckpointError
from groundling.files import regular_file
from groundling.json_files import parse_json

Shape = tuple[int, ...]

LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 4 << 20
"""The header of GPT-2 XL, 580 tensors, takes less than 60 kB."""
LENGTH_BYTES = 8
MAX_DIMS = 8
"""Of a tensor's shape; GPT-2's have two at most, its buffers four. A long one takes a long time to multiply."""

DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
"""Types that a header may name, and bytes of one element; those that weights may have are in foreign.py."""


@dataclass(frozen=True)
class Weights:
    """Tensors of another program as their files describe them; none is read before `read` is called."""

    where: Path
    """The file or folder, for sentences."""
    form: str
    """What the file is, in a few words."""
    files: tuple[Path, ...]
    """The files that the tensors stand in."""
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    """A tensor by its name in `shapes`, on the CPU."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What says of the network; empty if nothing does."""
    folder: Path | None = None
    """Where a tokenizer may stand."""
    record: dict[str, Any] = field(default_factory=dict)
    """What is known of the training: `steps`, `train_loss`."""


def safetensors_weights(path: Path) -> Weights:
    """The tensors of a safetensors file, described by its header.

    Raises `CheckpointError` if the header and the file do not fit each other exactly.
    """
    try:
        header = _header(regular_file(path))
        entries = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
        _check_tiling(entries, path.stat().st_size - _data_start(path))
    except (ValueError, TypeError, KeyError) as error:
        reason = f"its header lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read as safetensors ({reason}): copy or make it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path") from None

    start = _data_start(path)

    def read(name: str) -> Tensor:
        # Not mapped: a file that is cut off while it is read then ends in a sentence, where a mapping ends the process.
        shape, dtype, begin, end = entries[name]
        content = bytearray(end - begin)
        try:
            with path.open("rb") as file:
                file.seek(start + begin)
                n_bytes = file.readinto(content)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path") from None
        if n_bytes < len(content):
            raise CheckpointError(f"{path} has changed while it was read: give a file that nobody writes")
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)

    shapes = {name: shape for name, (shape, _, _, _) in entries.items()}
    dtypes = {name: dtype for name, (_, dtype, _, _) in entries.items()}
    return Weights(path, "safetensors", (path,), shapes, dtypes, read)


def _data_start(path: Path) -> int:
    with path.open("rb") as file:
        return LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("it is a pointer of Git LFS to the weights: run `git lfs pull` beside it")
    size, start = path.stat().st_size, _data_start(path)
    if start > size or size < LENGTH_BYTES:
        raise ValueError(f"its header is said to end at byte {start:,}, and the file has {size:,}")
    if start > MAX_HEADER_BYTES:
        raise ValueError(f"its header is said to take {start - LENGTH_BYTES:,} bytes, far more than a GPT-2's")
    with path.open("rb") as file:
        file.seek(LENGTH_BYTES)
        header = parse_json(file.read(start - LENGTH_BYTES))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def _entry(entry: Any) -> tuple[Shape, torch.dtype, int, int]:
    """Shape, type, first byte and end of one tensor; ValueError if these do not fit together."""
    if not isinstance(entry, dict):
        raise ValueError("its header has an entry that describes no tensor")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"its header names the type {str(entry['dtype'])[:80]!r}, which GPT-2 weights do not have")
    dtype, n_bytes = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMS):
        raise ValueError("its header has a shape or an offset that is no size")
    if offsets[1] - offsets[0] != n_bytes * math.prod(shape):
        raise ValueError("its header has offsets that do not fit the shape beside them")
    return tuple(shape), dtype, offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_tiling(entries: dict[str, tuple[Shape, torch.dtype, int, int]], n_bytes: int) -> None:
    """ValueError unless the tensors follow each other from the first byte to the last."""
    end = 0
    for begin, following in sorted((begin, following) for _, _, begin, following in entries.values()):
        if begin != end:
            raise ValueError("its tensors overlap" if begin < end else "it has bytes that belong to no tensor")
        end = following
    if end != n_bytes:
        raise ValueError(f"its header describes {end:,} bytes of tensors, and the file has {n_bytes:,}")


def merged(parts: Iterable[Weights], where: Path, form: str) -> Weights:
    """One description of several files. Raises `CheckpointError` if two hold a tensor of the same name."""
    files: tuple[Path, ...] = ()
    shapes, dtypes, home = dict[str, Shape](), dict[str, torch.dtype](), dict[str, Weights]()
    for part in parts:
        if twice := sorted(shapes.keys() & part.shapes.keys()):
            raise CheckpointError(f"{where} holds {twice[0]} in two files: give a whole model, unmixed")
        files += part.files
        shapes |= part.shapes
        dtypes |= part.dtypes
        home |= dict.fromkeys(part.shapes, part)
    return Weights(where, form, files, shapes, dtypes, lambda name: home[name].read(name))


def training_record(steps: object, loss: object) -> dict[str, float]:
    """`steps` and `train_loss`, of what a file says of its training; without what is no such number."""
    record: dict[str, float] = {}
    if type(steps) is int and 0 <= steps < 2**63:
        record["steps"] = steps
    if type(loss) is float and 0 <= loss < float("inf"):
        record["train_loss"] = loss
    return record

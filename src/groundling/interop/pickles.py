"""PyTorch checkpoints (.pt, .pth, .bin), which are pickles, read without running what is in them.

Invariant: a file's pickle is first surveyed (survey.py), which refuses every name that no checkpoint needs, and every
tensor must lie within the bytes that the file has. Only then does torch.load(weights_only=True) map it. Of a zip,
torch.load gets no compressed entry, no entry twice and no size that lies, so that reading takes no more memory than the
file has bytes.

The formats: a zip of data.pkl and one entry for each storage (torch.save since 1.6); before that, five pickles and then
the storages, each behind its length (torch/serialization.py).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from groundling.errors import CheckpointError
from groundling.files import regular_file
from groundling.interop.survey import CONFIGS, MAX_PICKLE_BYTES, Bounded, Described, Refused, Sizes, Survey
from groundling.interop.tensor_files import Weights, training_record

MAX_ENTRIES = 20_000
"""Entries of a zip: GPT-2 XL with its optimizer's state has 2,326."""

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
SETTING_KEYS = ("model_args", "config")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""First and second pickle of the older format (torch/serialization.py)."""


class SizesStandIn:
    """Takes the place of a pickled GPTConfig when torch.load builds one: keeps nothing."""

    def __setstate__(self, state: object) -> None:
        pass


def pickled_weights(path: Path) -> Weights:
    """The tensors of a PyTorch checkpoint. Raises `CheckpointError` if it is anything but weights and plain numbers."""
    regular_file(path)
    try:
        found, n_bytes = _survey_zip(path) if _is_zip(path) else _survey_old(path)
        tensors, keys = _state_dict(found)
        _check_storages(found, n_bytes)
        _check_shared(tensors, n_bytes)
    except Refused as error:
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}): check the path") from None
    loaded: dict[str, Any] = {}

    def read(name: str) -> torch.Tensor:
        if not loaded:
            loaded.update(_load(path, keys))
        tensor: torch.Tensor = loaded[name].detach()
        if tuple(tensor.shape) != tensors[name].shape or tensor.dtype != tensors[name].storage.dtype:
            raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: it holds two of {name}")
        return tensor

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.storage.dtype for name, tensor in tensors.items()}
    top = found if isinstance(found, dict) else {}
    record = training_record(top.get("step", top.get("iter_num")), top.get("loss"))
    return Weights(path, "a PyTorch checkpoint", (path,), shapes, dtypes, read, _settings(top), None, record)


def _is_zip(path: Path) -> bool:
    """As torch.load tells the two formats apart."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _load(path: Path, keys: list[str]) -> dict[str, Any]:
    allowed: list[tuple[Callable[..., Any], str]] = [(SizesStandIn, name) for name in CONFIGS]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        for key in keys:
            value = value[key]
        return dict(value)
    except Exception as error:  # a damaged file raises what it likes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {reason[0][:200]}") from None


def _state_dict(found: Any) -> tuple[dict[str, Described], list[str]]:
    """The tensors by name, and the keys that lead to them."""
    if not isinstance(found, dict):
        raise Refused("it holds no dictionary of weights, give one that was saved from state_dict()")
    key = next((key for key in WEIGHT_KEYS if isinstance(found.get(key), dict)), None)
    tensors = found if key is None else found[key]
    if not tensors or not all(type(name) is str for name in tensors):
        raise Refused("it holds no weights, give a checkpoint of a model")
    for name, value in tensors.items():
        if not isinstance(value, Described):
            raise Refused(f"{name[:80]} is no tensor, give a checkpoint whose weights stand under {WEIGHT_KEYS[0]}")
    return tensors, [] if key is None else [key]


def _settings(top: dict[str, Any]) -> dict[str, Any]:
    """The sizes that stand beside the weights, and nothing else that does."""
    for key in SETTING_KEYS:
        value = top.get(key)
        settings = value.settings if isinstance(value, Sizes) else value
        if isinstance(settings, dict) and "n_layer" in settings:
            return {name: settings[name] for name in settings if type(name) is str}
    return {}


def _survey_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """What data.pkl describes, and the bytes that each storage has."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, path.stat().st_size)
            names = [entry.filename for entry in entries]
            root = names[0].partition("/")[0]
            if any(name.startswith((f"{root}/code/", f"{root}/constants.pkl")) for name in names):
                raise Refused(
                    "it is a TorchScript archive, which holds a program; give the weights, saved by torch.save"
                )
            if f"{root}/data.pkl" not in names:
                raise Refused("it is a zip without data.pkl, give a file that torch.save wrote")
            if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
                raise Refused("its byteorder is not little; save it anew on another machine")
            content = archive.read(f"{root}/data.pkl")
            if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != content:
                raise Refused("it is two zips in one, give a file that torch.save wrote")
    except (Refused, OSError):
        raise
    except Exception as error:  # a damaged zip raises what it likes
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise Refused(f"it is a damaged zip ({reason}), copy or make it again") from None
    data = f"{root}/data/"
    n_bytes = {
        entry.filename.removeprefix(data): entry.file_size for entry in entries if entry.filename.startswith(data)
    }
    return Survey(BytesIO(content)).run(), n_bytes


def _check_directory(path: Path) -> None:
    """Refuses a zip whose list of entries is too long to be read before it is judged."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise Refused("it is a zip without an end, cut off: copy or make it again")
    if end[zipfile._ECD_SIZE] > MAX_PICKLE_BYTES:  # type: ignore[attr-defined]
        raise Refused("it is a zip with a list of entries far longer than torch.save writes")


def _check_entries(entries: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Refuses what torch.save does not write: compression, entries that share bytes or a name, sizes that lie."""
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise Refused(f"it is a zip of {len(entries):,} entries, give a file that torch.save wrote")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise Refused(f"its entry {entry.filename[:80]} is compressed, which torch.save never does")
        if entry.header_offset < end:
            raise Refused("its entries overlap, which torch.save never does")
        end = entry.header_offset + entry.file_size
        if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise Refused(f"its data.pkl has {entry.file_size:,} bytes, far more than a GPT-2's")
        if entry.filename.endswith("/byteorder") and entry.file_size > len("little"):
            raise Refused("its byteorder is neither little nor big")
    if end > file_bytes:
        raise Refused(f"its entries take {end:,} bytes and the file has {file_bytes:,}, copy or make it again")
    if len({entry.filename for entry in entries}) < len(entries):
        raise Refused("it has an entry twice, which torch.save never does")
    if len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise Refused("its entries stand in several folders, which torch.save never does")


def _survey_old(path: Path) -> tuple[Any, dict[str, int]]:
    """The same for the format before the zip: storages follow the pickles, so they share the bytes after these."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(2) != b"\x80\x02":
            raise Refused("it is neither a zip nor a pickle, give a file that torch.save wrote")
        file.seek(0)
        pickles = Bounded(file)
        if Survey(pickles).run() != MAGIC or Survey(pickles).run() != PROTOCOL:
            raise Refused("it is a pickle, but none of torch.save's, give a file that torch.save wrote")
        Survey(pickles).run()  # of the machine that it was made on
        survey = Survey(pickles)
        found = survey.run()
        keys = Survey(pickles).run()
        # Nothing else is spelled out: a tuple of a tuple of ... has no end.
        plain = isinstance(keys, list) and all(type(key) in (str, int) for key in keys)
        if not plain or sorted(map(str, keys)) != sorted(survey.storages):
            raise Refused("its list of storages is not that of its tensors, copy or make it again")
        n_bytes = {}
        for key in map(str, keys):
            claimed = int.from_bytes(file.read(8), "little", signed=True)
            storage = survey.storages[key]
            length = claimed * storage.dtype.itemsize
            if claimed != storage.n_elements or length > size - file.tell():
                raise Refused("its storages are longer than the file, or not as long as its tensors say")
            file.seek(length, os.SEEK_CUR)
            n_bytes[key] = length
    return found, n_bytes


def _check_shared(tensors: dict[str, Described], n_bytes: dict[str, int]) -> None:
    """Refuses weights that share their numbers, but for two names of one matrix: a small file, and much memory."""
    needed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if needed > 2 * sum(n_bytes.values()):
        raise Refused("its tensors share their numbers, which no model's do; give weights, each saved whole")


def _check_storages(found: Any, n_bytes: dict[str, int]) -> None:
    """Refuses tensors whose storage is not in the file, or shorter there than they say; whatever holds them."""
    seen: set[int] = set()
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Described):
            storage = value.storage
            if n_bytes.get(storage.key) != storage.n_elements * storage.dtype.itemsize:
                raise Refused(
                    f"the numbers of a tensor of shape {value.shape} are not all in it, copy or make it again"
                )
        elif isinstance(value, Sizes):
            waiting.append(value.settings)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value

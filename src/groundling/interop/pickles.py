"""PyTorch checkpoints (.pt, .pth, .bin), which are pickles, read without running what is in them.

Invariant: a file is first surveyed by a small machine that knows the opcodes of torch.save and builds nothing but
descriptions; every class that the pickle names must stand in ALLOWED, and every tensor must lie within the bytes that
the file has. Only then does torch.load(weights_only=True) map it. Of a zip, torch.load gets no compressed entry, no
entry twice and no size that lies, so that reading takes no more memory than the file has bytes.

The formats: a zip of data.pkl and one entry for each storage (torch.save since 1.6); before that, five pickles and then
the storages, each behind its length (torch/serialization.py).
"""

from __future__ import annotations

import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from groundling.errors import CheckpointError
from groundling.interop.tensor_files import Weights, regular_file, training_record

MAX_PICKLE_BYTES = 8 << 20
"""GPT-2 XL's data.pkl with its optimizer's takes about 300 kB."""
MAX_OPCODES = 400_000
"""The same pickle has about 70,000; this many are read in under a second."""
MAX_ENTRIES = 20_000
"""Entries of a zip: GPT-2 XL with its optimizer has 2,400."""

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
CONFIGS = ("__main__.GPTConfig", "model.GPTConfig", "train_124m_gpt.GPTConfig")
"""The dataclass of sizes: of a script, of nanoGPT's model.py, of the reference's script imported as a module."""
ORDERED, TENSOR, PARAMETER = (
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
)
SIZE, DEVICE = "torch.Size", "torch.device"
ALLOWED = {ORDERED, TENSOR, PARAMETER, SIZE, DEVICE, *CONFIGS, *(f"torch.{name}" for name in STORAGES)}
"""Every name that a checkpoint may call up: none does more than hold numbers."""

WEIGHT_KEYS = ("model_state_dict", "model", "state_dict")
SETTING_KEYS = ("model_args", "config")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""First and second pickle of the older format (torch/serialization.py)."""


class SizesStandIn:
    """Takes the place of a pickled GPTConfig when torch.load builds one: keeps nothing."""

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


@dataclass(eq=False)
class _Sizes:
    """A pickled GPTConfig: its attributes."""

    settings: dict[str, Any]


class _Refused(ValueError):
    """What is wrong with a pickle, for the end of a sentence."""


def pickled_weights(path: Path) -> Weights:
    """The tensors of a PyTorch checkpoint. Raises `CheckpointError` if it is anything but weights and plain numbers."""
    regular_file(path)
    try:
        found, n_bytes = _survey_zip(path) if _is_zip(path) else _survey_old(path)
        tensors, keys = _state_dict(found)
        _check_storages(found, n_bytes)
    except _Refused as error:
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


def _state_dict(found: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors by name, and the keys that lead to them."""
    if not isinstance(found, dict):
        raise _Refused("it holds no dictionary of weights, give one that was saved from state_dict()")
    key = next((key for key in WEIGHT_KEYS if isinstance(found.get(key), dict)), None)
    tensors = found if key is None else found[key]
    if not tensors or not all(type(name) is str for name in tensors):
        raise _Refused("it holds no weights, give a checkpoint of a model")
    for name, value in tensors.items():
        if not isinstance(value, _Tensor):
            raise _Refused(f"{name[:80]} is no tensor, give a checkpoint whose weights stand under {WEIGHT_KEYS[0]}")
    return tensors, [] if key is None else [key]


def _settings(top: dict[str, Any]) -> dict[str, Any]:
    """The sizes that stand beside the weights, and nothing else that does."""
    for key in SETTING_KEYS:
        value = top.get(key)
        settings = value.settings if isinstance(value, _Sizes) else value
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
                raise _Refused(
                    "it is a TorchScript archive, which holds a program; give the weights, saved by torch.save"
                )
            if f"{root}/data.pkl" not in names:
                raise _Refused("it is a zip without data.pkl, give a file that torch.save wrote")
            if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
                raise _Refused("its byteorder is not little; save it anew on another machine")
            content = archive.read(f"{root}/data.pkl")
            if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != content:
                raise _Refused("it is two zips in one, give a file that torch.save wrote")
    except (_Refused, OSError):
        raise
    except Exception as error:  # a damaged zip raises what it likes
        reason = str(error).partition("\n")[0][:120] or type(error).__name__
        raise _Refused(f"it is a damaged zip ({reason}), copy or make it again") from None
    data = f"{root}/data/"
    n_bytes = {
        entry.filename.removeprefix(data): entry.file_size for entry in entries if entry.filename.startswith(data)
    }
    return _Survey(BytesIO(content)).run(), n_bytes


def _check_directory(path: Path) -> None:
    """Refuses a zip whose list of entries is too long to be read before it is judged."""
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise _Refused("it is a zip without an end, cut off: copy or make it again")
    if end[zipfile._ECD_SIZE] > MAX_PICKLE_BYTES:  # type: ignore[attr-defined]
        raise _Refused("it is a zip with a list of entries far longer than torch.save writes")


def _check_entries(entries: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Refuses what torch.save does not write: compression, entries that share bytes or a name, sizes that lie."""
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise _Refused(f"it is a zip of {len(entries):,} entries, give a file that torch.save wrote")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _Refused(f"its entry {entry.filename[:80]} is compressed, which torch.save never does")
        if entry.header_offset < end:
            raise _Refused("its entries overlap, which torch.save never does")
        end = entry.header_offset + entry.file_size
        if entry.filename.endswith("/data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise _Refused(f"its data.pkl has {entry.file_size:,} bytes, far more than a GPT-2's")
        if entry.filename.endswith("/byteorder") and entry.file_size > len("little"):
            raise _Refused("its byteorder is neither little nor big")
    if end > file_bytes:
        raise _Refused(f"its entries take {end:,} bytes and the file has {file_bytes:,}, copy or make it again")
    if len({entry.filename for entry in entries}) < len(entries):
        raise _Refused("it has an entry twice, which torch.save never does")
    if len({entry.filename.partition("/")[0] for entry in entries}) > 1:
        raise _Refused("its entries stand in several folders, which torch.save never does")


def _survey_old(path: Path) -> tuple[Any, dict[str, int]]:
    """The same for the format before the zip: storages follow the pickles, so they share the bytes after these."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(2) != b"\x80\x02":
            raise _Refused("it is neither a zip nor a pickle, give a file that torch.save wrote")
        file.seek(0)
        pickles = _Bounded(file)
        if _Survey(pickles).run() != MAGIC or _Survey(pickles).run() != PROTOCOL:
            raise _Refused("it is a pickle, but none of torch.save's, give a file that torch.save wrote")
        _Survey(pickles).run()  # of the machine that it was made on
        survey = _Survey(pickles)
        found = survey.run()
        keys = _Survey(pickles).run()
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(survey.storages):
            raise _Refused("its list of storages is not that of its tensors, copy or make it again")
        n_bytes = {}
        for key in map(str, keys):
            claimed = int.from_bytes(file.read(8), "little", signed=True)
            storage = survey.storages[key]
            length = claimed * storage.dtype.itemsize
            if claimed != storage.n_elements or length > size - file.tell():
                raise _Refused("its storages are longer than the file, or not as long as its tensors say")
            file.seek(length, os.SEEK_CUR)
            n_bytes[key] = length
    return found, n_bytes


class _Bounded:
    """A file of which no more is read than a pickle may take."""

    def __init__(self, file: BufferedReader) -> None:
        self.file, self.left = file, MAX_PICKLE_BYTES

    def read(self, n_bytes: int) -> bytes:
        return self._count(self.file.read(min(n_bytes, self.left + 1)))

    def readline(self) -> bytes:
        return self._count(self.file.readline(self.left + 1))

    def tell(self) -> int:
        return self.file.tell()

    def _count(self, content: bytes) -> bytes:
        self.left -= len(content)
        if self.left < 0:
            raise _Refused(f"its pickles take more than {MAX_PICKLE_BYTES:,} bytes, far more than a GPT-2's")
        return content


def _check_storages(found: Any, n_bytes: dict[str, int]) -> None:
    """Refuses tensors whose storage is not in the file, or shorter there than they say; whatever holds them."""
    seen: set[int] = set()
    waiting = [found]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _Tensor):
            storage = value.storage
            if n_bytes.get(storage.key) != storage.n_elements * storage.dtype.itemsize:
                raise _Refused(
                    f"the numbers of a tensor of shape {value.shape} are not all in it, copy or make it again"
                )
        elif isinstance(value, _Sizes):
            waiting.append(value.settings)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value


class _Survey:
    """Runs a pickle's opcodes on descriptions: what torch.save writes at protocol 2, and nothing else.

    Each method below that is named after an opcode does what pickletools says of it.
    """

    def __init__(self, file: IO[bytes] | _Bounded) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        """What the pickle describes. Raises `_Refused` for what no checkpoint of weights needs."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):  # type: ignore[arg-type]
                if count > MAX_OPCODES:
                    raise _Refused("its pickle is far longer than a GPT-2's")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._do(opcode.name, argument)
        except _Refused:
            raise
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise _Refused(f"its pickle is damaged ({str(error)[:80]}), copy or make it again") from None
        raise _Refused("its pickle is cut off, copy or make it again")

    def _do(self, name: str, argument: Any) -> None:
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in LITERALS:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        elif name != "PROTO":
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise _Refused(f"its pickle has the opcode {name}, which torch.save does not write")
            method() if argument is None else method(argument)

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in ALLOWED:
            raise _Refused(
                f"it calls up {name[:100]}, which is none of the harmless classes of a checkpoint; give weights"
            )
        self.stack.append(_Global(name))

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _tuple(self) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _tuple1(self) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise _Refused("its pickle sets an item of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise _Refused("its pickle has a dictionary whose keys are neither names nor numbers")
            self.stack[-1][key] = value

    def _newobj(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Global) or made.name not in CONFIGS or arguments != ():
            raise _Refused("its pickle makes an object of what is no class of sizes")
        self.stack.append(_Sizes({}))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or type(target) not in (_Sizes, dict):
            raise _Refused("its pickle gives attributes to what has none")
        if type(target) is _Sizes:  # of an OrderedDict they are the versions of its modules
            target.settings.update(state)

    def _reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Global) or type(arguments) is not tuple:
            raise _Refused("its pickle calls what is no function")
        if called.name == TENSOR:
            self.stack.append(_described(*arguments[:4]))
        elif called.name == PARAMETER and isinstance(arguments[0], _Tensor):
            self.stack.append(arguments[0])
        elif called.name == ORDERED and arguments == ():
            self.stack.append({})
        elif called.name == SIZE and len(arguments) == 1 and _are_counts(arguments[0]):
            self.stack.append(tuple(arguments[0]))
        elif called.name == DEVICE and arguments and type(arguments[0]) is str:
            self.stack.append(arguments[0])
        else:
            raise _Refused(f"its pickle calls {called.name} with what no checkpoint gives it")

    def _binpersid(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise _Refused("its pickle refers to what is no storage")
        made, key, n_elements = identity[1], identity[2], identity[4]
        if not isinstance(made, _Global) or type(key) is not str or not _are_counts([n_elements]):
            raise _Refused("its pickle refers to what is no storage")
        if len(identity) == 6 and identity[5] is not None:
            raise _Refused("its storages are views of others, as PyTorch wrote them long ago; save it anew")
        dtype = STORAGES.get(made.name.removeprefix("torch."))
        if dtype is None:
            raise _Refused(f"its storage is of {made.name}, not of numbers")
        storage = _Storage(key, dtype, n_elements)
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused("its pickle describes one storage in two ways")
        self.stack.append(storage)


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1"}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
PUTS, GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


def _are_counts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _described(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """The tensor that these arguments of `_rebuild_tensor_v2` make; refuses one that would reach out of its storage."""
    if not (isinstance(storage, _Storage) and _are_counts([offset]) and _are_counts(shape) and _are_counts(strides)):
        raise _Refused("its pickle makes a tensor of what is no storage and no sizes")
    n_elements = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if n_elements else 0
    if n_elements > storage.n_elements or last >= max(storage.n_elements, 1):
        raise _Refused(f"a tensor claims the shape {tuple(shape)}, and its storage has {storage.n_elements:,} numbers")
    return _Tensor(storage, tuple(shape))

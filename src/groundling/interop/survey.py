"""What a pickle says, found out without doing it.

Invariant: nothing is called and nothing is built but descriptions in numbers, names, lists and dictionaries; every name
that the pickle calls up stands in ALLOWED, and every tensor lies within the storage that it names. Memory grows with
the pickle, whose length is bounded: whatever one opcode makes or copies has a small bound of its own, because a pickle
may repeat it by the ten thousand.

Source: the opcodes are those of pickletools in the standard library, of them the ones that torch.save writes.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any

import torch

from groundling.interop.tensor_files import MAX_DIMS

MAX_PICKLE_BYTES = 8 << 20
"""GPT-2 XL's data.pkl with its optimizer's state takes 223 kB."""
MAX_OPCODES = 400_000
"""The same pickle has 73,388, which are surveyed in a tenth of a second."""
MAX_ATTRIBUTES = 100
"""Of one object: nanoGPT's GPTConfig has seven."""

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


@dataclass(frozen=True)
class _Global:
    """A name that the pickle called up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Numbers that a tensor lies in; `key` names them in the file."""

    key: str
    dtype: torch.dtype
    n_elements: int


@dataclass(frozen=True, eq=False)
class Described:
    """A tensor, which lies within its storage."""

    storage: Storage
    shape: tuple[int, ...]


@dataclass(eq=False)
class Sizes:
    """A pickled GPTConfig: its attributes."""

    settings: dict[str, Any]


class Refused(ValueError):
    """What is wrong with a pickle, for the end of a sentence."""


class Bounded:
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
            raise Refused(f"its pickles take more than {MAX_PICKLE_BYTES:,} bytes, far more than a GPT-2's")
        return content


class Survey:
    """Runs a pickle's opcodes on descriptions: what torch.save writes at protocol 2, and nothing else.

    Each method below that is named after an opcode does what pickletools says of it.
    """

    def __init__(self, file: IO[bytes] | Bounded) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """What the pickle describes. Raises `Refused` for what no checkpoint of weights needs."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):  # type: ignore[arg-type]
                if count > MAX_OPCODES:
                    raise Refused("its pickle is far longer than a GPT-2's")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._do(opcode.name, argument)
        except Refused:
            raise
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise Refused(f"its pickle is damaged ({str(error)[:80]}), copy or make it again") from None
        raise Refused("its pickle is cut off, copy or make it again")

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
                raise Refused(f"its pickle has the opcode {name}, which torch.save does not write")
            method() if argument is None else method(argument)

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name not in ALLOWED:
            raise Refused(
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
            raise Refused("its pickle appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def _setitems(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise Refused("its pickle sets an item of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise Refused("its pickle has a dictionary whose keys are neither names nor numbers")
            self.stack[-1][key] = value

    def _newobj(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Global) or made.name not in CONFIGS or arguments != ():
            raise Refused("its pickle makes an object of what is no class of sizes")
        self.stack.append(Sizes({}))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or type(target) not in (Sizes, dict):
            raise Refused("its pickle gives attributes to what has none")
        if len(state) > MAX_ATTRIBUTES:
            raise Refused(f"its pickle gives an object {len(state):,} attributes, far more than a checkpoint's have")
        if type(target) is Sizes:  # of an OrderedDict they are the versions of its modules
            target.settings.update(state)

    def _reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Global) or type(arguments) is not tuple:
            raise Refused("its pickle calls what is no function")
        if called.name == TENSOR:
            self.stack.append(_described(*arguments[:4]))
        elif called.name == PARAMETER and isinstance(arguments[0], Described):
            self.stack.append(arguments[0])
        elif called.name == ORDERED and arguments == ():
            self.stack.append({})
        elif called.name == SIZE and len(arguments) == 1 and _are_counts(arguments[0]):
            self.stack.append(tuple(arguments[0]))
        elif called.name == DEVICE and arguments and type(arguments[0]) is str:
            self.stack.append(arguments[0])
        else:
            raise Refused(f"its pickle calls {called.name} with what no checkpoint gives it")

    def _binpersid(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refused("its pickle refers to what is no storage")
        made, key, n_elements = identity[1], identity[2], identity[4]
        if not isinstance(made, _Global) or type(key) is not str or not _are_counts([n_elements]):
            raise Refused("its pickle refers to what is no storage")
        if len(identity) == 6 and identity[5] is not None:
            raise Refused("its storages are views of others, as PyTorch wrote them long ago; save it anew")
        dtype = STORAGES.get(made.name.removeprefix("torch."))
        if dtype is None:
            raise Refused(f"its storage is of {made.name}, not of numbers")
        storage = Storage(key, dtype, n_elements)
        if self.storages.setdefault(key, storage) != storage:
            raise Refused("its pickle describes one storage in two ways")
        self.stack.append(storage)


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1"}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
PUTS, GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}


def _are_counts(values: Any) -> bool:
    """Whether this is a shape, or strides: a few whole numbers."""
    if not isinstance(values, (list, tuple)) or len(values) > MAX_DIMS:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _described(storage: Any, offset: Any, shape: Any, strides: Any) -> Described:
    """The tensor that these arguments of `_rebuild_tensor_v2` make; refuses one that would reach out of its storage."""
    if not (isinstance(storage, Storage) and _are_counts([offset]) and _are_counts(shape) and _are_counts(strides)):
        raise Refused("its pickle makes a tensor of what is no storage and no sizes")
    n_elements = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if n_elements else 0
    if n_elements > storage.n_elements or last >= max(storage.n_elements, 1):
        raise Refused(f"a tensor claims the shape {tuple(shape)}, and its storage has {storage.n_elements:,} numbers")
    return Described(storage, tuple(shape))

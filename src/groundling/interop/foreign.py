"""GPT-2 weights of other programs, made our own: names, layouts, sizes, tokenizer.

Invariant: what comes out computes what went in. Every tensor is accounted for by its name and shape, by arithmetic on
what the files describe, before one is read; whatever our network cannot express is refused by name.

Names: Hugging Face's (with or without the `transformer.` in front) and nanoGPT's, which are the same. Layouts: Conv1D's
(in, out) or nn.Linear's (out, in), told apart by the shape of `c_attn.weight`, the one matrix whose sides differ in
both.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundling import machine
from groundling.corpus.tokenizer import Tokenizer, most_bytes
from groundling.errors import CheckpointError, ConfigError
from groundling.interop.tensor_files import Shape, Weights
from groundling.json_files import read_bounded, read_object
from groundling.model import weights as own_weights
from groundling.model.gpt2 import GPT2, MAX_LAYERS, GPTConfig
from groundling.model.weights import TABLE, TIED, TRANSPOSED, unfilled

WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.){0,4}")
"""What torch.compile and DistributedDataParallel put before a name."""
BODY = "transformer."
POSITIONS = "transformer.wpe.weight"
MASKS = re.compile(r"transformer\.h\.(0|[1-9][0-9]{0,8})\.attn\.(bias|masked_bias)")
"""Buffers of the causal mask, which follow from the position table's length."""
BLOCK = re.compile(r"transformer\.h\.(0|[1-9][0-9]{0,8})\.")
MAX_NAME_CHARS = 200
"""Of a tensor; with both wrappers a GPT-2's longest has 52."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HEAD_WIDTH = 64
"""Of every released GPT-2."""
PADDINGS = (64, 128)
"""Vocabularies are padded to multiples of these, for the speed of matrix products (nanoGPT: 50304)."""

SIZE_NAMES = {
    "n_layer": ("n_layer",),
    "n_head": ("n_head",),
    "n_embd": ("n_embd",),
    "n_ctx": ("n_positions", "n_ctx", "block_size"),
    "n_vocab": ("vocab_size", "n_vocab"),
}
"""Sizes, and what configurations call them."""

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one formula
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "auto_map": (None,),
    "quantization_config": (None,),
}
"""Settings of which our network is one case, with the values that mean that case; absent means it, too."""

ASSUMED_GELU = "GPT-2's GELU, by tanh, assumed, which nothing says (nanoGPT's nn.GELU() is by erf, up to 0.0005 away)"


@dataclass(frozen=True)
class Imported:
    """A network of another program with its tokenizer, and what was changed on the way."""

    model: GPT2
    tokenizer: Tokenizer
    source: Weights
    changes: tuple[str, ...]
    """In words: what is not as it stood in the source, or did not stand there."""


def make_own(source: Weights, tokenizer_path: Path | None = None, n_head: int | None = None) -> Imported:
    """The network that these weights describe.

    `tokenizer_path` and `n_head` say what the source does not. Raises `CheckpointError` or `ConfigError` if the source
    is not a whole GPT-2 that our network can express.
    """
    changes: list[str] = []
    names = _own_names(source)
    dropped = {name for name in names if MASKS.fullmatch(name)}
    if dropped:
        changes.append(f"{len(dropped)} buffers of the causal mask left out")
    names = {name: raw for name, raw in names.items() if name not in dropped}
    _check_settings(source)
    found = _sizes(source, names, n_head, changes)
    linear = _check_shapes(source, names, found, changes)
    tokenizer = _tokenizer(source, found.n_vocab, tokenizer_path)
    config = _with_ids_of(source, found, tokenizer, changes)
    needed, memory = 4 * config.n_parameters(), machine.memory_bytes()
    if memory is not None and needed > memory:
        raise ConfigError(
            f"{source.where} needs {needed / 2**30:.1f} GiB of memory, and this machine has {memory / 2**30:.1f}:"
            " import it on a larger one"
        )
    if not source.settings.keys() & {"activation_function", "model_type"}:  # a model_type's own default is known
        changes.append(ASSUMED_GELU)
    converted = sorted({str(source.dtypes[raw]).removeprefix("torch.") for raw in names.values()} - {"float32"})
    if converted:
        changes.append(f"converted from {' and '.join(converted)} to float32")
    model = unfilled(config, torch.device("cpu"))
    _check_tied(source, names)
    own_weights.from_huggingface(model, _AsHuggingFace(source, names, config, linear), source.where)
    return Imported(model.eval(), tokenizer, source, tuple(changes))


def _own_names(source: Weights) -> dict[str, str]:
    """Our name of each tensor, and the source's."""
    names: dict[str, str] = {}
    for raw in source.shapes:
        if len(raw) > MAX_NAME_CHARS:
            raise CheckpointError(f"{source.where} has a tensor whose name is {len(raw):,} letters long: give a GPT-2")
        wrapper = WRAPPERS.match(raw)
        name = raw[wrapper.end() :] if wrapper else raw
        if name.startswith(("h.", "wte.", "wpe.", "ln_f.")):
            name = BODY + name
        if name in names:
            raise CheckpointError(f"{source.where} holds {names[name]} and {raw}, which are the same: give one model")
        names[name] = raw
    return names


def _check_settings(source: Weights) -> None:
    """Raises `ConfigError` for a setting that our network cannot express."""
    settings = source.settings
    for name, allowed in FIXED.items():
        if name in settings and settings[name] not in allowed:
            raise ConfigError(
                f"{source.where} has {name} {_short(settings[name])}, and only {_short(allowed[0])} is the GPT-2 that"
                " Groundling computes: give another model"
            )
    inner, width = settings.get("n_inner"), settings.get("n_embd")
    if inner is not None and (type(width) is not int or inner != 4 * width):
        raise ConfigError(
            f"{source.where} has n_inner {_short(inner)}, and only 4 n_embd is the GPT-2 that Groundling computes:"
            " give another model"
        )


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _sizes(source: Weights, names: Mapping[str, str], n_head: int | None, changes: list[str]) -> GPTConfig:
    """The sizes that the tensors have, which are also those that the settings say."""
    shapes = {name: source.shapes[raw] for name, raw in names.items()}
    for name in (TABLE, POSITIONS):
        if len(shapes.get(name, ())) != 2 or 0 in shapes[name]:
            raise CheckpointError(f"{source.where} lacks {name}, a matrix: it holds no GPT-2, give another model")
    blocks = {int(match[1]) for name in shapes if (match := BLOCK.match(name))}
    if not blocks:
        raise CheckpointError(
            f"{source.where} has no blocks (transformer.h.0 ...): it holds no GPT-2, give another model"
        )
    if max(blocks) >= MAX_LAYERS:
        raise CheckpointError(
            f"{source.where} counts {max(blocks) + 1:,} blocks, far more than a GPT-2's: give another model"
        )
    sizes = {
        "n_layer": max(blocks) + 1,
        "n_embd": shapes[TABLE][1],
        "n_ctx": shapes[POSITIONS][0],
        "n_vocab": shapes[TABLE][0],
    }
    said = {name: _said(source, name) for name in SIZE_NAMES}
    for name, size in sizes.items():
        if said[name] not in (None, size):
            raise CheckpointError(
                f"{source.where} says {name} {said[name]:,}, but its weights have {size:,}: give a whole, unmixed model"
            )
    if n_head is not None and said["n_head"] not in (None, n_head):
        raise ConfigError(f"--n-head is {n_head}, but {source.where} says {said['n_head']:,}: leave out --n-head")
    heads = said["n_head"] or n_head
    if heads is None:
        heads, rest = divmod(sizes["n_embd"], HEAD_WIDTH)
        if rest:
            raise ConfigError(f"{source.where} does not say how many attention heads it has: import it with --n-head N")
        changes.append(f"{heads} attention heads assumed, {HEAD_WIDTH} wide, which nothing says (--n-head does)")
    if heads < 1 or sizes["n_embd"] % heads:
        advice = "give another model" if said["n_head"] else "give another --n-head"
        raise ConfigError(
            f"{source.where} has n_embd {sizes['n_embd']:,}, which {heads:,} heads do not divide: {advice}"
        )
    return GPTConfig(n_head=heads, **sizes)


def _said(source: Weights, size: str) -> int | None:
    """A size that the settings say. Raises `ConfigError` if it is none, or said twice and differently."""
    found: int | None = None
    for name in SIZE_NAMES[size]:
        value = source.settings.get(name)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value < 2**31:
            raise ConfigError(f"{source.where} has {name} {_short(value)}: a model needs a positive number there")
        if found not in (None, value):
            raise ConfigError(f"{source.where} says {size} twice, {found:,} and {value:,}: give a whole, unmixed model")
        found = value
    return found


def _expected(config: GPTConfig, linear: bool) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of a GPT-2 of this size, the head left out."""
    C = config.n_embd
    yield TABLE, (config.n_vocab, C)
    yield POSITIONS, (config.n_ctx, C)
    matrices = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for layer in range(config.n_layer):
        block = f"{BODY}h.{layer}."
        for name in ("ln_1", "ln_2"):
            yield f"{block}{name}.weight", (C,)
            yield f"{block}{name}.bias", (C,)
        for name, (n_in, n_out) in matrices.items():
            yield f"{block}{name}.weight", (n_out, n_in) if linear else (n_in, n_out)
            yield f"{block}{name}.bias", (n_out,)
    yield f"{BODY}ln_f.weight", (C,)
    yield f"{BODY}ln_f.bias", (C,)


def _check_shapes(source: Weights, names: Mapping[str, str], config: GPTConfig, changes: list[str]) -> bool:
    """Whether the matrices lie as nn.Linear's, (out, in).

    Raises `CheckpointError` unless the tensors are those of this GPT-2, and numbers with a fraction.
    """
    shapes = {name: source.shapes[raw] for name, raw in names.items()}
    C = config.n_embd
    linear = shapes.get(f"{BODY}h.0.attn.c_attn.weight") == (3 * C, C)
    expected = dict(_expected(config, linear))
    missing = [name for name in expected if name not in shapes]
    if missing and missing == [name for name in expected if name.endswith(".bias")]:
        changes.append("biases of zero added, which it has none of")
        missing = []
    unknown = [name for name in shapes if name not in expected and name != TIED]
    if missing or unknown:
        wrong = f"lacks {missing[0]}" if missing else f"holds the unknown {unknown[0][:100]}"
        raise CheckpointError(f"{source.where} {wrong}: it is no whole GPT-2, give another model")
    if TIED in shapes:
        expected[TIED] = expected[TABLE]
    for name, raw in names.items():
        if shapes[name] != expected[name]:
            raise CheckpointError(
                f"{source.where}: {raw} has shape {shapes[name]} where this GPT-2 has {expected[name]}: give a whole,"
                " unmixed model"
            )
        if source.dtypes[raw] not in FLOATS:
            dtype = str(source.dtypes[raw]).removeprefix("torch.")
            raise CheckpointError(
                f"{source.where}: {raw} is of {dtype}, not of floating-point numbers: give such weights"
            )
    return linear


def _tokenizer(source: Weights, n_rows: int, path: Path | None) -> Tokenizer:
    """The tokenizer that was given (a path, or `gpt2`), or stands beside the weights, or GPT-2's if it fits."""
    if path is not None:
        is_name = path == Path("gpt2") and not path.is_file()
        return Tokenizer.gpt2() if is_name else Tokenizer.load(path, n_rows=n_rows)
    if source.folder is not None:
        if (source.folder / "tokenizer.json").exists():
            return Tokenizer.load(source.folder / "tokenizer.json", n_rows=n_rows)
        if (source.folder / "vocab.json").exists() and (source.folder / "merges.txt").exists():
            return _old_tokenizer(source.folder, most_bytes(n_rows))
    n_vocab = GPTConfig().n_vocab
    if n_rows == n_vocab or n_rows in _padded(n_vocab):
        return Tokenizer.gpt2()
    raise ConfigError(
        f"{source.where} has no tokenizer beside it, and its {n_rows:,} ids are not GPT-2's: import it with"
        " --tokenizer, the path of its tokenizer.json"
    )


def _old_tokenizer(folder: Path, max_bytes: int) -> Tokenizer:
    """The tokenizer of vocab.json and merges.txt."""
    vocab = read_object(folder / "vocab.json", max_bytes)
    if not all(type(number) is int for number in vocab.values()):
        raise CheckpointError(f"{folder / 'vocab.json'} maps a token to what is no id: give another model")
    path = folder / "merges.txt"
    content = read_bounded(path, max_bytes)
    try:
        lines = [line for line in content.decode("utf-8").split("\n") if line.strip()]
        pairs = [line.rstrip("\r").split(" ") for line in lines if not line.startswith("#version")]
        merges = [(left, right) for left, right in pairs]
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as merges ({error}): give another model") from None
    return Tokenizer(vocab, merges, str(folder))


def _padded(n_vocab: int) -> set[int]:
    return {-(-n_vocab // multiple) * multiple for multiple in PADDINGS}


def _with_ids_of(source: Weights, found: GPTConfig, tokenizer: Tokenizer, changes: list[str]) -> GPTConfig:
    """The sizes with as many ids as the tokenizer has."""
    n_vocab = tokenizer.n_vocab
    if found.n_vocab == n_vocab:
        return found
    if found.n_vocab not in _padded(n_vocab):
        raise ConfigError(
            f"{source.where} has {found.n_vocab:,} ids where its tokenizer {tokenizer.name} has {n_vocab:,}: import it"
            " with --tokenizer, the path of the tokenizer.json that it was trained with"
        )
    changes.append(f"rows {n_vocab:,} to {found.n_vocab - 1:,} of the embedding cut, which no token has")
    return GPTConfig(found.n_layer, found.n_head, found.n_embd, found.n_ctx, n_vocab)


def _check_tied(source: Weights, names: Mapping[str, str]) -> None:
    """Raises `CheckpointError` if the head's matrix differs from the embedding."""
    if TIED in names and not torch.equal(source.read(names[TIED]), source.read(names[TABLE])):
        raise CheckpointError(
            f"{source.where} has a head (lm_head.weight) that is not its embedding, and GPT-2's are one matrix:"
            " give another model"
        )


class _AsHuggingFace(Mapping[str, Tensor]):
    """The source's tensors in Hugging Face's names and layout, in fp32, each read when it is asked for."""

    def __init__(self, source: Weights, names: Mapping[str, str], config: GPTConfig, linear: bool) -> None:
        self._source, self._names, self._linear, self._n_vocab = source, names, linear, config.n_vocab
        self._shapes = dict(_expected(config, linear=False))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            return torch.zeros(self._shapes[name])
        tensor = self._source.read(self._names[name]).float()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self._source.where}: {self._names[name]} holds NaN or an infinity: it is damaged, give another"
            )
        if name == TABLE:
            tensor = tensor[: self._n_vocab]
        return tensor.t() if self._linear and name.endswith(TRANSPOSED) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

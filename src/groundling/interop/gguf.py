"""GGUF, the format of llama.cpp: written tensor by tensor, and read back by llama.cpp itself.

Invariant: matrices keep our orientation (out, in), which is GGUF's; every tensor in the file is ours within the
rounding of its format, whoever verifies it; and prompts become the ids that our tokenizer gives them.

Source: llama.cpp's convert_hf_to_gguf.py (class GPT2Model) for names and keys; its llama-quantize for which tensors
are kept in a finer format than was asked for.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.tokenizer import END_OF_TEXT
from groundling.errors import ConfigError
from groundling.interop.llama_server import LlamaCpp
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed, loss_difference
from groundling.model.gpt2 import GPT2, MLP, Block
from groundling.model.weights import adopt, own_tensors

try:
    import gguf
except ImportError:
    raise ConfigError("--format gguf needs the package gguf: pip install 'groundling[gguf]'") from None

Kind = gguf.GGMLQuantizationType

PRECISIONS = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}

BLOCK = 32
"""Weights of a row that Q8_0 and Q4_0 round together (QK8_0 and QK4_0 in ggml-common.h)."""
SCALE_ROUNDING = 2.0**-11
"""Relative rounding of the fp16 scale that a block has."""
ROUNDING = {
    Kind.F32: 0.0,
    Kind.F16: 2.0**-11,
    Kind.BF16: 2.0**-8,
    Kind.Q8_0: 0.5 / 127 + SCALE_ROUNDING,
    Kind.Q4_0: 1 / 8 + SCALE_ROUNDING,  # -8 to 7 eighths of the largest: it has no +8
}
"""Largest error of a weight, as a share of the largest magnitude in its block."""
SMALLEST = 2.0**-24
"""The smallest fp16 number: what lies below may be rounded to nothing, in a Q8_0 block 127 times that."""

LARGEST_FP16 = 65504

LLAMA_TOLERANCE = 0.05
"""Largest difference of logits, unless llama.cpp's table is known to make a larger one in this network."""
TABLE_SAFETY = 4.0
"""Allowed multiple of the difference that the table makes here (its GPU builds and others compute GELU otherwise)."""
TABLE_END = 10.0
"""Between minus this and this llama.cpp looks GELU up in a table from fp16 to fp16 (ggml-cpu/vec.h)."""
SMALLEST_LOG_PROB = -80.0
"""llama.cpp takes logarithms of fp32 probabilities, which are nothing, or lose digits, from e^-87 down."""

PARTS = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Our names of the network's and a block's parts, and llama.cpp's."""

TEXT = (
    "Good morrow, cousin.\n\nIs the day so young?   But new struck nine: it's 9 o'clock; we'll, I'd, they've 1,024"
    " x\tÄpfel, naïve façade, 日本語 🍾🎭 don't WE'LL\r\n  end \n"
)
"""A prompt with what tokenizers differ in: runs of blanks, contractions, digits, other scripts, emoji."""
N_TEXT_TOKENS = 2000
"""Tokens of the training text that llama.cpp's tokenizer is tried on."""


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write one GGUF file; beside the network's own weights, memory holds one tensor at a time.

    Raises `ConfigError` if a weight is too large for fp16 where that is asked for.
    """
    tensors = {_their_name(name): tensor for name, tensor in own_tensors(trained.model).items()}
    if not trained.tokenizer.merges:
        raise ConfigError("llama.cpp reads no tokenizer without merges, as this one is: choose another format")
    kinds = {name: _kind(name, tensor, precision) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if kinds[name] == Kind.F16 and float(tensor.abs().max()) > LARGEST_FP16:
            raise ConfigError(
                f"{name} has weights beyond {LARGEST_FP16:,}, the most that fp16 holds: --quant f32 or bf16"
            )
    writer = gguf.GGUFWriter(target, "gpt2")
    _describe(writer, trained, precision)
    for name, tensor in tensors.items():
        stored = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kinds[name])
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(gguf.quantize(tensor.numpy(), kinds[name]))
    finally:
        writer.close()


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """Every tensor read back; then llama.cpp's tokens, hidden states and loss, or without it those of the tensors."""
    reader = gguf.GGUFReader(target)
    yield _check_tensors(trained.model, reader)
    if importlib.util.find_spec("xllamacpp") is None:
        yield "llama.cpp itself did not read it: pip install 'groundling[gguf]' brings it"
        if precision != "f32":
            network = _logits_of_file(trained.model, reader)
            yield loss_difference(trained, network, f"{precision}, its weights put into our own network")
        return
    config = trained.model.config
    head = torch.from_numpy(_dequantized(_tensor(reader, "token_embd.weight")))
    with LlamaCpp.reading(target, config.n_ctx, torch.get_num_threads(), exact=precision == "f32") as llama:

        def logits(tokens: list[int]) -> Tensor:
            return torch.tensor(llama.hidden(tokens)) @ head.T

        yield _check_tokenizer(trained, llama)
        if precision == "f32":
            probe, tolerance = _probe(trained)
            n_same = probe.check_tokens(_greedy(trained, llama, probe), "llama.cpp")
            difference = probe.check_logits(logits(probe.window), "llama.cpp", tolerance)
            difference = max(difference, _check_last(trained, llama, probe, tolerance))
            yield f"llama.cpp gives the same {n_same} greedy tokens, and our logits to within {difference:.1g}"
        else:
            llama.greedy(TEXT[:5], 1)  # it answers
            yield loss_difference(trained, logits, f"{precision} by llama.cpp up to the head")


def _their_name(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if part in PARTS:
        return f"{PARTS[part]}.{kind}"
    _, _, layer, inner = part.split(".", 3)
    return f"blk.{layer}.{PARTS[inner]}.{kind}"


def _kind(name: str, tensor: Tensor, precision: str) -> Any:
    """The format of a tensor: what was asked for, or the finer one that llama.cpp's own tools would take."""
    if tensor.ndim == 1 or name == "position_embd.weight":
        return Kind.F32
    kind = PRECISIONS[precision][0]
    if kind in (Kind.Q8_0, Kind.Q4_0) and tensor.shape[1] % BLOCK:
        return Kind.F16
    if kind == Kind.Q4_0 and name == "token_embd.weight":
        return Kind.Q8_0  # it is the head too; llama-quantize takes Q6_K there, which gguf cannot write
    return kind


def _describe(writer: Any, trained: Trained, precision: str) -> None:
    """Everything but the tensors."""
    config, tokenizer = trained.model.config, trained.tokenizer
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(trained.name)
    made = "trained" if "weights_sha256" in trained.record else "exported"  # as weights are that came from elsewhere
    writer.add_description(f"GPT-2 of {config.n_parameters():,} parameters, {made} by Groundling")
    writer.add_file_type(PRECISIONS[precision][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(trained.model.transformer.ln_f.eps)
    writer.add_vocab_size(config.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(tokenizer.vocab))
    kinds = [gguf.TokenType.NORMAL] * config.n_vocab
    kinds[tokenizer.end_of_text_id] = gguf.TokenType.CONTROL
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.end_of_text_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    writer.add_add_bos_token(False)  # our prompts begin with their text
    writer.add_add_eos_token(False)


def _tensor(reader: Any, name: str) -> Any:
    return next(tensor for tensor in reader.tensors if tensor.name == name)


def _dequantized(tensor: Any) -> NDArray[np.float32]:
    return np.require(gguf.dequantize(tensor.data, tensor.tensor_type), requirements="W")  # fp32 is the file itself


def _check_tensors(model: GPT2, reader: Any) -> str:
    """How many tensors of which formats the file has, each ours within that format's rounding."""
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    own = {_their_name(name): tensor for name, tensor in own_tensors(model).items()}
    if own.keys() != theirs.keys():
        name = min(own.keys() ^ theirs.keys())
        raise VerificationFailed(f"gguf reads other tensors than were written, such as {name}: please report this")
    counts: dict[str, int] = {}
    for name, tensor in own.items():
        read, kind = _dequantized(theirs[name]), theirs[name].tensor_type
        if read.shape != tuple(tensor.shape) or not _within_rounding(read, tensor.numpy(), kind):
            raise VerificationFailed(
                f"gguf reads another {name} from what was written than ours in {kind.name}: nothing was exported,"
                " please report this"
            )
        counts[kind.name.lower()] = counts.get(kind.name.lower(), 0) + 1
    listed = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
    return f"all {len(own)} tensors are ours ({listed})"


def _within_rounding(read: NDArray[np.float32], own: NDArray[np.float32], kind: Any) -> bool:
    if kind == Kind.F32:
        return np.array_equal(read, own)
    if kind not in (Kind.Q8_0, Kind.Q4_0):
        return bool((abs(read - own) <= ROUNDING[kind] * abs(own) + SMALLEST).all())
    own, read = own.reshape(-1, BLOCK), read.reshape(-1, BLOCK)
    allowed = ROUNDING[kind] * abs(own).max(axis=1, keepdims=True) + 127 * SMALLEST
    return bool((abs(read - own) <= allowed).all())


def _probe(trained: Trained) -> tuple[Probe, float]:
    """What is asked of llama.cpp in fp32, and the largest difference of logits that its GELU may make."""
    probe = Probe.of(trained, LLAMA_TOLERANCE)
    model = trained.model

    def rounded(values: Tensor) -> Tensor:
        return torch.where(values.abs() < TABLE_END, values.half().float(), values)

    def through_table(mlp: MLP, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        activations = F.gelu(rounded(mlp.c_fc(inputs[0])), approximate="tanh")
        return cast(Tensor, mlp.c_proj(rounded(activations)))

    blocks = cast("list[Block]", model.transformer.h)
    hooks = [block.mlp.register_forward_hook(through_table) for block in blocks]
    try:
        with torch.inference_mode():
            logits = model.logits(model.hidden(torch.tensor([probe.window])))[0]
    finally:
        for hook in hooks:
            hook.remove()
    tolerance = TABLE_SAFETY * float((logits - probe.logits).abs().max())
    if tolerance <= LLAMA_TOLERANCE:
        return probe, LLAMA_TOLERANCE
    return Probe.of(trained, tolerance), tolerance


def _text(trained: Trained, tokens: Sequence[int]) -> str:
    """The text of some tokens, without what no text can say: parts of characters, and `<|endoftext|>`."""
    return trained.tokenizer.decode(tokens).replace("\ufffd", "").replace(END_OF_TEXT, "")


def _check_tokenizer(trained: Trained, llama: LlamaCpp) -> str:
    """Texts become our ids in llama.cpp: a difficult one, and the beginning of the training text."""
    train = trained.train_tokens()
    texts = [TEXT] if train is None else [TEXT, _text(trained, train.tokens[:N_TEXT_TOKENS].tolist())]
    n_tokens = 0
    for text in texts:
        own, other = trained.tokenizer.encode(text), llama.tokenize(text)
        if own != other:
            place = next(
                (n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other))
            )
            raise VerificationFailed(
                f"llama.cpp makes other tokens of the text after {trained.tokenizer.decode(own[:place])[-20:]!r}:"
                " nothing was exported, please report this"
            )
        n_tokens += len(own)
    return f"llama.cpp makes the same {n_tokens:,} tokens of text"


def _greedy(trained: Trained, llama: LlamaCpp, probe: Probe) -> list[int]:
    """llama.cpp's greedy tokens after the probe's prompt, and beyond `<|endoftext|>` where that is among ours.

    Raises `VerificationFailed` if a prompt given as text is continued otherwise than one given as tokens.
    """
    text = _text(trained, probe.prompt)
    tokens = trained.tokenizer.encode(text)
    n = min(len(probe.continuation), trained.model.config.n_ctx - len(tokens) - 1)
    if tokens and n > 0 and llama.greedy(text, n) != llama.greedy(tokens, n):
        raise VerificationFailed(
            f"llama.cpp continues the text {text!r} otherwise than its tokens: nothing was exported, please report this"
        )
    written: list[int] = []
    while len(written) < len(probe.continuation):
        wanted = len(probe.continuation) - len(written)
        written += llama.greedy([*probe.prompt, *written], wanted)
        if len(written) < len(probe.continuation):
            written.append(trained.tokenizer.end_of_text_id)
    return written


def _check_last(trained: Trained, llama: LlamaCpp, probe: Probe, tolerance: float) -> float:
    """The largest difference of all log-probabilities at the end of the window, llama.cpp's own head included."""
    *prompt, _ = probe.window
    if not prompt:
        return 0.0
    own = probe.logits[len(prompt) - 1].log_softmax(0)
    answer = llama.log_probs(prompt, drawn=trained.tokenizer.encode("a")[0])
    theirs = torch.tensor([answer.get(token, math.nan) for token in range(len(own))])
    difference = float((theirs - own)[own > SMALLEST_LOG_PROB].abs().max())
    if not difference <= tolerance:
        raise VerificationFailed(
            f"llama.cpp gives other log-probabilities at the end of a window, by up to {difference:.2g}:"
            " nothing was exported, please report this"
        )
    return difference


def _logits_of_file(model: GPT2, reader: Any) -> Callable[[list[int]], Tensor]:
    """Logits of our own network with the file's weights."""
    with torch.device("meta"):
        network = GPT2(model.config)
    read = {name: torch.from_numpy(_dequantized(_tensor(reader, _their_name(name)))) for name in own_tensors(model)}
    adopt(network, read)

    def logits(tokens: list[int]) -> Tensor:
        return network.logits(network.hidden(torch.tensor([tokens])))[0]

    return logits

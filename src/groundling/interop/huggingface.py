"""Hugging Face's folder of a model: what `transformers` loads without a word about its origin.

Invariant: the folder alone is enough, offline. Weights are `model/weights.py`'s; the tokenizer stands there twice, as
tokenizer.json and as vocab.json with merges.txt, which transformers before 4 and many other programs read.

Source: the files that transformers 5 writes for GPT-2, and reads (`GPT2Config`, `GPT2Tokenizer`, `GenerationConfig`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from groundling.corpus.tokenizer import END_OF_TEXT, Tokenizer
from groundling.errors import ConfigError
from groundling.files import write_json, write_text
from groundling.generation.sampling import SamplingConfig
from groundling.interop import model_card
from groundling.interop.hub_folder import CONFIG, WINDOW
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed
from groundling.model import weights
from groundling.model.gpt2 import GPT2, INIT_STD
from groundling.runtime import DTYPES

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
MERGES_HEADER = "#version: 0.2"
"""First line of OpenAI's vocab.bpe, which readers of merges.txt skip."""

TEXTS = (
    "",
    " ",
    "  two  before,  two  between, three after   ",
    "a line\r\nended as Windows does\r\n\r\n\tand a tab\n\n\n",
    "don't, I'LL, we'Ve; O'Neil's",
    "naïve\N{EM DASH}\N{LEFT DOUBLE QUOTATION MARK}Ünïcödé\N{RIGHT SINGLE QUOTATION MARK}s e\N{COMBINING ACUTE ACCENT}",
    "🍾🧑\N{ZERO WIDTH JOINER}🚀 日本語\N{IDEOGRAPHIC SPACE}한국어 العربية",
    "\N{NO-BREAK SPACE}\N{ZERO WIDTH NO-BREAK SPACE}\0\x7f\x85\N{LINE SEPARATOR}",
    "1234567890 3.14 <|endofte xt|> [MASK] </s> ##ing ▁Ġ",
)
"""What tokenizers are known to differ on. Not END_OF_TEXT itself, which is a command to theirs and text to ours."""


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write the folder.

    Raises `ConfigError` if a weight is beyond what fp16 can hold.
    """
    tensors = _rounded(weights.to_huggingface(trained.model), precision, trained.name)
    target.mkdir()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    write_json(target / CONFIG, config_of(trained, precision))
    write_json(target / "generation_config.json", generation_config_of(trained))
    _write_tokenizer(trained, target)
    model_card.write(trained, target, precision)


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """What transformers reads, or, where it is not installed, what the files hold; as sentences.

    Both sides compute in fp32 with the weights as they were rounded, so one tolerance is right for every precision.
    Raises `VerificationFailed` if it is not the model, or not its tokenizer.
    """
    held = trained
    if precision != "fp32":
        held = replace(trained, model=_rounded_model(trained.model, precision))
    probe = Probe.of(held)
    try:
        import transformers
    except ImportError:
        yield from _read_back(held, target)
    else:
        yield from _ask_transformers(transformers, held, probe, target)
    if precision != "fp32":
        with torch.inference_mode():
            exact = trained.model.logits(trained.model.hidden(torch.tensor([probe.window])))[0]
        yield f"rounding to {precision} moves logits by up to {float((exact - probe.logits).abs().max()):.2g}"


def _rounded(tensors: dict[str, Tensor], precision: str, name: str) -> dict[str, Tensor]:
    rounded = {key: tensor.to(DTYPES[precision]) for key, tensor in tensors.items()}
    for key, tensor in rounded.items():
        if (tensor.isinf() & tensors[key].isfinite()).any():
            largest = float(tensors[key].abs().max())
            raise ConfigError(
                f"{name} has a weight of {largest:.3g} in {key}, more than {precision} can hold"
                f" ({torch.finfo(DTYPES[precision]).max:.3g}): give --dtype fp32"
            )
    return rounded


@torch.no_grad()
def _rounded_model(model: GPT2, precision: str) -> GPT2:
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(DTYPES[precision]))
    return rounded


def config_of(trained: Trained, precision: str) -> dict[str, Any]:
    """The config.json of transformers' GPT-2."""
    config, end_of_text = trained.model.config, trained.tokenizer.end_of_text_id
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,  # llama.cpp's converter reads this name
        WINDOW: trained.window,
        "vocab_size": config.n_vocab,
        "activation_function": "gelu_new",  # the tanh approximation
        "layer_norm_epsilon": trained.model.transformer.ln_f.eps,
        "initializer_range": INIT_STD,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "use_cache": True,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 4.56
    }


def generation_config_of(trained: Trained) -> dict[str, Any]:
    """How our own `sample` draws, in transformers' words."""
    known = {field.name for field in fields(SamplingConfig)} - {"stop", "seed"}
    chosen = (trained.record.get("config") or {}).get("sampling") or {}
    sampling = SamplingConfig(**{name: value for name, value in chosen.items() if name in known})
    end_of_text = trained.tokenizer.end_of_text_id
    drawn = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
    return {
        **(drawn if sampling.temperature else {"do_sample": False, "repetition_penalty": sampling.repetition_penalty}),
        **({"min_p": sampling.min_p} if sampling.min_p and sampling.temperature else {}),
        # A prompt of half a window and its continuation stay among the positions that were trained.
        "max_new_tokens": max(1, min(sampling.max_tokens, trained.window // 2)),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }


ROLES = {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk", "pad")}


def tokenizer_config_of(trained: Trained) -> dict[str, Any]:
    """The tokenizer_config.json of transformers' GPT-2."""
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": trained.window,
        "add_prefix_space": False,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,  # transformers 4 would take spaces out of what it decodes
        "errors": "replace",
        "added_tokens_decoder": {str(trained.tokenizer.end_of_text_id): special | {"special": True}},
        **ROLES,
    }


def _write_tokenizer(trained: Trained, target: Path) -> None:
    tokenizer = trained.tokenizer
    tokenizer.save(target / TOKENIZER)
    write_text(target / VOCAB, json.dumps(tokenizer.vocab, ensure_ascii=False) + "\n")
    merges = [f"{left} {right}" for left, right in tokenizer.merges]
    write_text(target / MERGES, "\n".join([MERGES_HEADER, *merges]) + "\n")
    write_json(target / "special_tokens_map.json", ROLES)
    write_json(target / "tokenizer_config.json", tokenizer_config_of(trained))


def _ask_transformers(transformers: Any, held: Trained, probe: Probe, target: Path) -> Iterator[str]:
    """What transformers says of the probe, and of texts that tokenizers differ on."""
    program = f"transformers {transformers.__version__}"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    offline = {"local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, **offline).eval()
    with torch.inference_mode():
        difference = probe.check_logits(model(torch.tensor([probe.window])).logits[0], program)
        model.generation_config = transformers.GenerationConfig(pad_token_id=held.tokenizer.end_of_text_id)
        n_new = len(probe.continuation)
        prompt = torch.tensor([probe.prompt])
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=max(1, n_new)
        )
    n_equal = probe.check_tokens(written[0, len(probe.prompt) :].tolist()[:n_new], program)
    yield (
        f"{program} gives the same logits at all {len(probe.window):,} positions (they differ by up to"
        f" {difference:.1g}) and the same {n_equal} greedy tokens"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(target, **offline)
    own = held.tokenizer
    tokens = [own.decode([token]) for token in range(own.n_vocab) if token != own.end_of_text_id]  # asks every merge
    for text, ids, expected in zip(
        (*TEXTS, *tokens), theirs([*TEXTS, *tokens])["input_ids"], own.encode_blocks([*TEXTS, *tokens]), strict=True
    ):
        _check(ids == expected, f"{program} encodes {text[:40]!r} as {ids}, not as {expected}")
    for ids in (probe.window, list(range(own.n_vocab)), *own.encode_blocks(TEXTS)):
        _check(theirs.decode(ids) == own.decode(ids), f"{program} decodes {ids[:20]} as {theirs.decode(ids)[:40]!r}")
    _check(theirs.eos_token_id == own.end_of_text_id, f"{program} reads another end of the text")
    yield f"its {type(theirs).__name__} encodes and decodes {len(TEXTS)} difficult texts and every token as ours does"


def _read_back(held: Trained, target: Path) -> Iterator[str]:
    """What the files hold, read by our own hand."""
    model = weights.unfilled(held.model.config, torch.device("cpu"))
    weights.load(model, target / WEIGHTS)
    own = held.model.state_dict()
    same = all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items() if name != weights.TIED)
    _check(same, "the weights were not written as they are")
    vocab = json.loads((target / VOCAB).read_text(encoding="utf-8"))
    lines = (target / MERGES).read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    for read in (Tokenizer.load(target / TOKENIZER), Tokenizer(vocab, merges, MERGES)):
        _check(read.sha256 == held.tokenizer.sha256, "the tokenizer was not written as it is")
    yield (
        "transformers is not installed (pip install 'groundling[hf]'), so it was not asked; read back, every weight is"
        " what was to be written, and both tokenizers are equal"
    )


def _check(holds: bool, wrong: str) -> None:
    if not holds:
        raise VerificationFailed(f"{wrong}: nothing was exported, please report this")

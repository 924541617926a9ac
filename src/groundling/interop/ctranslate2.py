"""CTranslate2: a folder that its `Generator` reads, and read back by it.

Invariant: the specification holds copies of our tensors (its int8 rounds what it is given in place), in our orientation
(out, in), which is CTranslate2's; the head becomes an alias of the embedding.

Source: ctranslate2.converters.transformers.GPT2Loader, which does this for a Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from groundling.corpus.tokenizer import END_OF_TEXT
from groundling.errors import ConfigError
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, loss_difference
from groundling.model.gpt2 import Block

try:
    import ctranslate2
    from ctranslate2.specs import TransformerDecoderModelSpec, common_spec
except ImportError:
    raise ConfigError(
        "--format ctranslate2 needs the package ctranslate2: pip install 'groundling[ctranslate2]'"
    ) from None


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write a folder: model.bin, config.json, vocabulary.json, and the tokenizer beside them."""
    config, transformer = trained.model.config, trained.model.transformer
    gelu = common_spec.Activation.GELUTanh
    spec = TransformerDecoderModelSpec.from_config(config.n_layer, config.n_head, pre_norm=True, activation=gelu)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = transformer.wte.weight.detach().clone()
    decoder.position_encodings.encodings = transformer.wpe.weight.detach().clone()
    _set_norm(decoder.layer_norm, transformer.ln_f)
    for layer, block in zip(decoder.layer, cast("list[Block]", transformer.h), strict=True):
        _set_norm(layer.self_attention.layer_norm, block.ln_1)
        _set_linear(layer.self_attention.linear[0], block.attn.c_attn)
        _set_linear(layer.self_attention.linear[1], block.attn.c_proj)
        _set_norm(layer.ffn.layer_norm, block.ln_2)
        _set_linear(layer.ffn.linear_0, block.mlp.c_fc)
        _set_linear(layer.ffn.linear_1, block.mlp.c_proj)
    spec.register_vocabulary(list(trained.tokenizer.vocab))
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = END_OF_TEXT
    spec.config.layer_norm_epsilon = transformer.ln_f.eps
    spec.validate()
    spec.optimize(quantization=precision)
    target.mkdir()
    spec.save(str(target))
    trained.tokenizer.save(target / "tokenizer.json")


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """CTranslate2's logits and greedy tokens in fp32, or the difference that its precision makes to the loss."""
    halved = precision in ("float16", "bfloat16")  # a CPU computes with these weights in fp32; asked for, it is silent
    generator = ctranslate2.Generator(
        str(target),
        device="cpu",
        compute_type="float32" if halved else "default",
        intra_threads=torch.get_num_threads(),
    )

    def logits(tokens: list[int]) -> Tensor:
        batch = ctranslate2.StorageView.from_array(np.array([tokens], dtype=np.int32))
        lengths = ctranslate2.StorageView.from_array(np.array([len(tokens)], dtype=np.int32))
        return torch.from_numpy(np.array(generator.forward_batch(batch, lengths)))[0]

    if precision != "float32":
        computed = ", computed in fp32" if halved else ""
        yield loss_difference(trained, logits, f"{precision} by CTranslate2{computed}")
        return
    probe, spelled = Probe.of(trained), list(trained.tokenizer.vocab)
    difference = probe.check_logits(logits(probe.window), "CTranslate2")
    written: list[int] = []
    if n_tokens := len(probe.continuation):
        result = generator.generate_batch(
            [[spelled[token] for token in probe.prompt]],
            max_length=n_tokens,
            min_length=n_tokens,
            end_token=[],
            include_prompt_in_result=False,
        )
        written = result[0].sequences_ids[0]
    n_same = probe.check_tokens(written, "CTranslate2")
    yield f"CTranslate2 gives the same {n_same} greedy tokens, and our logits to within {difference:.1g}"


def _set_norm(spec: Any, norm: nn.LayerNorm) -> None:
    spec.gamma, spec.beta = norm.weight.detach().clone(), norm.bias.detach().clone()


def _set_linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = linear.weight.detach().clone(), linear.bias.detach().clone()

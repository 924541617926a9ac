"""Number formats of weights that are only read: what decoding keeps in memory.

Invariant: here only the matrices are rounded (the tied embedding included); biases, LayerNorms and positions stay
fp32. (`generation/open.py` casts the whole network where a GPU decodes in bf16.)

- fp32: as trained.
- bf16: rounded to the nearest bfloat16.
- int8: each output's row divided by a scale of its own, its largest magnitude / 127, and rounded ("absmax"
  quantization by vectors, Dettmers et al. 2022, section 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from groundling.model.gpt2 import GPT2

WeightFormat = Literal["fp32", "bf16", "int8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
BYTES: dict[WeightFormat, int] = {"fp32": 4, "bf16": 2, "int8": 1}

INT8_LARGEST = 127


class Packed(NamedTuple):
    """A matrix (out, in) in its format, with the scales (out,) that its rows are multiplied by, if any."""

    weight: Tensor
    scale: Tensor | None


def pack(weight: Tensor, form: WeightFormat) -> Packed:
    """A matrix (out, in) in this format."""
    if form == "fp32":
        return Packed(weight.float(), None)
    if form == "bf16":
        return Packed(weight.bfloat16(), None)
    scale = weight.float().abs().amax(dim=1) / INT8_LARGEST
    scale = scale.masked_fill(scale == 0, 1.0)  # a row of zeros
    return Packed((weight / scale[:, None]).round().to(torch.int8), scale)


def unpack(packed: Packed) -> Tensor:
    """The fp32 matrix that a packed one stands for."""
    weight = packed.weight.float()
    return weight if packed.scale is None else weight * packed.scale[:, None]


@torch.no_grad()
def round_weights(model: GPT2, form: WeightFormat) -> None:
    """Round the model's matrices, in place, to what decoding in this format computes with."""
    if form == "fp32":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):  # the head's weight is the embedding
            module.weight.copy_(unpack(pack(module.weight, form)))


def read_bytes(model: GPT2, form: WeightFormat) -> int:
    """Bytes of weights that decoding one token reads: all but the embeddings of other tokens and positions."""
    config, matrices = model.config, 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            matrices += module.weight.numel()
    others = config.n_parameters() - matrices - config.n_ctx * config.n_embd
    return matrices * BYTES[form] + others * BYTES["fp32"]

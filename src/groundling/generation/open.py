"""The fastest decoder that this machine has for a model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from groundling.generation.decoder import Decoder, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.kernels.build import BuildError
from groundling.model.formats import WeightFormat, round_weights
from groundling.model.gpt2 import GPT2
from groundling.runtime import Runtime, supports_bf16


def open_decoder(
    model: GPT2,
    n_window: int,
    runtime: Runtime,
    form: WeightFormat = "fp32",
    n_slots: int = 1,
    warn: Callable[[str], None] = print,
) -> Decoder:
    """A decoder with the model's weights in this format, which must not change while it is open.

    `n_window` bounds the positions used: a model trained on windows of T knows no position past T. On a CPU
    it is the C++ one, or PyTorch's, after a warning, where that cannot be compiled.
    """
    if runtime.device.type == "cpu":
        try:
            return NativeDecoder(model, n_window, n_slots, form, runtime.threads)
        except BuildError as error:
            warn(f"warning: {error}: decoding with PyTorch instead, more slowly")
    if form != "fp32":
        model = copy.deepcopy(model)
        round_weights(model, form)
        if form == "bf16" and runtime.device.type == "cuda" and supports_bf16(runtime.device):
            model = model.to(torch.bfloat16)
    return TorchDecoder(model, n_window, n_slots)

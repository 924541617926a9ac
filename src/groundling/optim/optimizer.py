"""AdamW over groups of parameters: which of them decay, and who computes the update.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from groundling.errors import ConfigError
from groundling.optim.fused import FusedAdamW
from groundling.optim.native import NativeAdamW

MIN_EPS = 1e-30
"""Smaller ones may be 0 in fp32, and where a gradient is always 0, as in rows of positions never used, so is the rest
of the divisor."""


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and gradient clipping."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per unit of learning rate."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What decays: matrices and embeddings only, or biases and LayerNorm as well."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: give a number from 0 to below 1")
        if not MIN_EPS <= self.eps < math.inf:
            raise ConfigError(f"optim.eps is {self.eps}: give {MIN_EPS:g} or more, for weights without a gradient")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: give 0 or more")


def make_adamw(model: nn.Module, config: AdamWConfig, native: bool = False) -> FusedAdamW:
    """AdamW over the model's parameters, PyTorch's or our own for CPUs; the learning rate is set at each step.

    Raises `BuildError` if ours is asked for and cannot be compiled.
    """
    everything = config.decayed == "all"
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if everything or p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not everything and p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind = NativeAdamW if native else FusedAdamW
    return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)

"""Which optimizer updates which parameters: AdamW all of them, or Muon the blocks' matrices and AdamW the rest.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; for Muon see `muon.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from groundling.errors import ConfigError
from groundling.optim.fused import FusedAdamW
from groundling.optim.muon import Muon, NativeMuon
from groundling.optim.native import NativeAdamW

MIN_EPS = 1e-30
"""Smaller ones may be 0 in fp32, and where a gradient is always 0, as in rows of positions never used, so is the rest
of the divisor."""

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and gradient clipping."""

    kind: OptimizerKind = "adamw"
    """adamw, or muon: fewer passes, a longer step (docs/training.md)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of AdamW's second moment."""
    momentum: float = 0.95
    """Muon's decay of the moment of the blocks' matrices."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per unit of learning rate."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What decays: matrices and embeddings only, or biases and LayerNorm as well."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: give a number from 0 to below 1")
        if not MIN_EPS <= self.eps < math.inf:
            raise ConfigError(f"optim.eps is {self.eps}: give {MIN_EPS:g} or more, for weights without a gradient")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: give 0 or more")


def make_optimizer(
    model: nn.Module, config: OptimConfig, native: bool = False, product_format: torch.dtype = torch.float32
) -> FusedAdamW:
    """The optimizer of the model's parameters, AdamW by PyTorch or by our own kernel for CPUs.

    The learning rate is set at each step. `product_format` is that of Muon's products.
    Raises `BuildError` if our kernel is asked for and cannot be compiled.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_blocks = {name: p for name, p in named.items() if config.kind == "muon" and ".h." in name and p.ndim == 2}
    rest = [p for name, p in named.items() if name not in in_blocks]
    everything = config.decayed == "all"
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if everything or p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if not everything and p.ndim < 2], "weight_decay": 0.0},
        *_muon_groups(in_blocks.items(), config, product_format),
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "muon":
        kind: type[FusedAdamW] = NativeMuon if native else Muon
    else:
        kind = NativeAdamW if native else FusedAdamW
    return kind(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps)


def _muon_groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, product_format: torch.dtype
) -> list[dict[str, Any]]:
    """One for the matrices that make queries, keys and values, which are three, and one for all others."""
    by_parts: dict[int, list[nn.Parameter]] = {1: [], 3: []}
    for name, parameter in named:
        by_parts[3 if name.endswith("attn.c_attn.weight") else 1].append(parameter)
    muon = {"momentum": config.momentum, "product_format": product_format, "weight_decay": config.weight_decay}
    return [{"params": params, "parts": parts, **muon} for parts, params in by_parts.items()]

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
    last_block_share: float = 1.0
    """Muon's rate in the last block relative to the first; geometric in between. Deep networks learn a text on the
    grid in fewer passes with 0.1 (docs/training.md)."""
    turns: int = 1
    """With N > 1, each step of Muon updates the matrices of one block in N, in rotation, at N times the rate and for
    1/N of its cost (N is at most the number of blocks). 3 needs hardly more passes than 1 (docs/training.md)."""
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
        if not 0 < self.last_block_share < math.inf:
            raise ConfigError(f"optim.last_block_share is {self.last_block_share}: give a positive number")
        if self.turns < 1:
            raise ConfigError(f"optim.turns is {self.turns}: give 1, which moves every block in every step, or more")
        if not MIN_EPS <= self.eps < math.inf:
            raise ConfigError(f"optim.eps is {self.eps}: give {MIN_EPS:g} or more, for weights without a gradient")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: give 0 or more")

    def turns_of(self, n_blocks: int) -> int:
        """Turns that so many blocks take: in each somebody moves."""
        return min(self.turns, n_blocks)


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
    """One of each block for the matrix that makes queries, keys and values, which is three, and one for the others."""
    by_block: dict[tuple[int, int], list[nn.Parameter]] = {}
    for name, parameter in named:
        block = int(name.partition(".h.")[2].partition(".")[0])
        by_block.setdefault((block, 3 if name.endswith("attn.c_attn.weight") else 1), []).append(parameter)
    last = max((block for block, _ in by_block), default=0)
    muon = {"momentum": config.momentum, "product_format": product_format, "weight_decay": config.weight_decay}
    turns = config.turns_of(last + 1)
    groups: list[dict[str, Any]] = []
    for (block, parts), params in by_block.items():
        share = config.last_block_share ** (block / max(1, last))
        groups.append({"params": params, "parts": parts, "share": share, "turns": turns, "block": block, **muon})
    deal_turns(groups, 1)
    return groups


def deal_turns(groups: Iterable[dict[str, Any]], block_stride: int) -> None:
    """Give each of Muon's groups the turn in which its block moves.

    Blocks 0, s, 2s ... (s is `block_stride`), which may be the only ones in use at first, are numbered first, so that
    they spread evenly over the turns; then the others.
    """
    of_blocks = [group for group in groups if "block" in group]
    in_order = sorted({group["block"] for group in of_blocks}, key=lambda block: (block % block_stride > 0, block))
    for group in of_blocks:
        group["turn"] = in_order.index(group["block"]) % group["turns"]

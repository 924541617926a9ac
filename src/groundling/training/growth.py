"""Blocks that join later: a run may begin with a part of the network's blocks.

Invariant: at every step the whole network computes what the blocks in use compute, since what the others would add to
the residual stream is zero until they join. So a checkpoint of any step is a GPT-2 like any other, and a loss is its.

Source: depth that grows in training is Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking"; new
blocks that add nothing at first are Shen et al. 2022, "Staged Training for Transformer Language Models". Here nothing
is copied: blocks keep their places, and those in between wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import torch

from groundling.corpus.windows import WindowConfig
from groundling.errors import ConfigError
from groundling.model.gpt2 import GPT2, Block, GPTConfig
from groundling.optim.optimizer import OptimConfig
from groundling.training.flops import network_flops, update_flops


@dataclass(frozen=True)
class GrowthConfig:
    """How many blocks take part at first."""

    every: int = 1
    """Train only every N-th block at first (0, N, 2N ...); 1 trains all from the start."""
    fraction: float = 0.0
    """Fraction of the schedule before the other blocks join; the target can end a run only after that. A run with init
    trains all blocks from the start."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"growth.every is {self.every}: give 1, which begins with all blocks, or more")
        if not 0 <= self.fraction < 1:
            raise ConfigError(
                f"growth.fraction is {self.fraction}: give a number from 0 to below 1, so that all blocks are trained"
            )

    def n_steps(self, total_steps: int, n_blocks: int) -> int:
        """The first steps of a schedule of so many, of which the last has all blocks; none where all begin."""
        n_steps = min(math.floor(round(self.fraction * total_steps, 6)), total_steps - 1)
        return max(0, n_steps) if min(self.every, n_blocks) > 1 else 0


@dataclass(frozen=True)
class Growth:
    """Through which blocks the steps of a run go, and what they cost."""

    every: int
    """The first `n_steps` steps go through the first of every so many blocks, the others through all."""
    n_steps: int
    model: GPTConfig
    """The network that is computed."""
    windows: WindowConfig
    optim: OptimConfig

    def block_stride(self, step: int) -> int:
        """This step goes through the first of every so many blocks."""
        return self.every if step < self.n_steps else 1

    def n_blocks(self, step: int) -> int:
        """Through how many blocks this step goes."""
        return in_use(self.model, self.block_stride(step)).n_layer

    def cost(self, n_blocks: int) -> float:
        """Matrix operations of a step through so many blocks, its update included, beside those of one through all."""
        return self._flops(n_blocks) / self._flops(self.model.n_layer)

    def whole_steps(self, first: int, last: int) -> float:
        """How many steps through all blocks cost as much as those from `first` to before `last`."""
        n_first = max(0, min(last, self.n_steps) - first)
        return n_first * self.cost(self.n_blocks(0)) + max(0, last - first - n_first)

    def resumed(self, n_steps: int, block_stride: int, n_growing: int) -> Growth:
        """What the plan comes to after so many steps, of which the first `n_growing` did not go through all blocks, and
        the last through the first of every `block_stride`.

        Blocks that have joined stay, whatever length the schedule has now, and those that wait are the same ones.
        """
        if block_stride == 1:
            return replace(self, n_steps=n_growing)
        return replace(self, every=block_stride, n_steps=max(self.n_steps, n_steps))

    def _flops(self, n_blocks: int) -> float:
        of_network = network_flops(replace(self.model, n_layer=n_blocks), self.windows, self.windows.mean_length)
        return of_network + update_flops(self.model, self.optim) * n_blocks / self.model.n_layer


def in_use(model: GPTConfig, block_stride: int) -> GPTConfig:
    """The size of what is computed where only the first of every so many blocks take part."""
    return replace(model, n_layer=math.ceil(model.n_layer / block_stride))


@torch.no_grad()
def let_wait(model: GPT2, every: int) -> None:
    """Make all but the first of every so many blocks add nothing to the residual stream, until they are trained."""
    for number, block in enumerate(cast("list[Block]", model.transformer.h)):
        if number % every:
            block.attn.c_proj.weight.zero_()  # biases are zero already
            block.mlp.c_proj.weight.zero_()

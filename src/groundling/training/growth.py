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

import torch

from groundling.corpus.windows import WindowConfig
from groundling.errors import ConfigError
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.optim.optimizer import OptimConfig
from groundling.training.step import step_flops


@dataclass(frozen=True)
class GrowthConfig:
    """How many blocks take part at first."""

    every: int = 1
    """At first a run goes through the first of every so many blocks: with 2 through every second one. 1 begins with
    all."""
    fraction: float = 0.0
    """Fraction of the schedule's steps, at its beginning, in which it does so; then the other blocks join, and the
    target counts. Not used with init, whose blocks are all trained."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"growth.every is {self.every}: give 1, which begins with all blocks, or more")
        if not 0 <= self.fraction < 1:
            raise ConfigError(
                f"growth.fraction is {self.fraction}: give a number from 0 to below 1, so that all blocks are trained"
            )


class Growth:
    """Which blocks the steps of a run are to go through, and what they cost."""

    def __init__(
        self, config: GrowthConfig, model: GPTConfig, windows: WindowConfig, optim: OptimConfig, total_steps: int
    ) -> None:
        """`model` is the network that is computed, `total_steps` the length of the schedule."""
        self.config = config
        first_network = in_use(model, config.every)
        grows = first_network != model
        self.n_steps = math.floor(round(config.fraction * total_steps, 6)) if grows else 0
        """Steps at the beginning in which not all blocks take part."""
        first, whole = (sum(step_flops(size, windows, optim, windows.mean_length)) for size in (first_network, model))
        self.first_cost = first / whole
        """What one of them costs beside one of all blocks, in matrix operations."""

    def every(self, step: int) -> int:
        """This step goes through the first of every so many blocks."""
        return self.config.every if step < self.n_steps else 1

    def cost(self, step: int) -> float:
        """What this step costs beside one of all blocks."""
        return self.first_cost if step < self.n_steps else 1.0

    def whole_steps(self, first: int, last: int) -> float:
        """How many steps of all blocks cost as much as those from `first` to before `last`."""
        n_first = max(0, min(last, self.n_steps) - first)
        return n_first * self.first_cost + max(0, last - first - n_first)


def in_use(model: GPTConfig, every: int) -> GPTConfig:
    """The size of what is computed where only the first of every so many blocks take part."""
    return replace(model, n_layer=math.ceil(model.n_layer / every))


@torch.no_grad()
def let_wait(model: GPT2, every: int) -> None:
    """Make all but the first of every so many blocks add nothing to the residual stream, until they are trained."""
    for name, weight in model.named_parameters():
        _, in_block, rest = name.partition(".h.")
        if in_block and int(rest.partition(".")[0]) % every and name.endswith("c_proj.weight"):
            weight.zero_()  # its bias is zero already

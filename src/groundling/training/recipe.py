"""What the trainer receives of a run's configuration, and the network that it begins with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from groundling.corpus.goldfish import PLAIN, ObjectiveConfig
from groundling.corpus.shards import Tokens, occurring_ids
from groundling.corpus.windows import WindowConfig, steps_per_pass
from groundling.model.compact import CompactGPT2, HeadVocabulary
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.model.positions import InitialPositions, make_waves
from groundling.optim.optimizer import OptimConfig
from groundling.optim.schedule import ScheduleConfig
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.growth import Growth, GrowthConfig, let_wait
from groundling.training.stopping import StoppingConfig


@dataclass(frozen=True)
class Recipe:
    """The sections of a run's configuration that the trainer receives."""

    seed: int
    model: GPTConfig
    windows: WindowConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    stopping: StoppingConfig
    checkpoint: CheckpointConfig
    objective: ObjectiveConfig = PLAIN
    head_vocabulary: HeadVocabulary = "full"
    initial_positions: InitialPositions = "random"
    growth: GrowthConfig = field(default_factory=GrowthConfig)

    def total_steps(self, n_tokens: int) -> int:
        """Length of the schedule in steps, over a text of so many tokens."""
        return self.schedule.steps(steps_per_pass(n_tokens, self.windows))

    def planned_growth(self, size: GPTConfig, total_steps: int) -> Growth:
        """Which blocks of a network of this size, as it is computed, its steps are to go through."""
        n_growing = self.growth.n_steps(total_steps, size.n_layer)
        return Growth(self.growth.every, n_growing, size, self.windows, self.optim)


def new_model(recipe: Recipe, train: Tokens) -> GPT2:
    """The network that a run of this recipe over this text begins with, drawn by its seed."""
    torch.manual_seed(recipe.seed)
    full = GPT2(recipe.model)
    if recipe.initial_positions == "waves":
        make_waves(full)
    if recipe.growth.n_steps(recipe.total_steps(len(train)), recipe.model.n_layer):
        let_wait(full, recipe.growth.every)
    if recipe.head_vocabulary == "full":
        return full
    return CompactGPT2(full, torch.from_numpy(occurring_ids(train, full.config.n_vocab)))

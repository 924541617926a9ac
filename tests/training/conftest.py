"""A run small enough for a test: a network of a few thousand parameters on a text of 200 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from groundling.corpus.tokenizer import BYTE_OF, END_OF_TEXT, Tokenizer
from groundling.corpus.windows import WindowConfig
from groundling.model.gpt2 import GPTConfig
from groundling.optim.optimizer import OptimConfig
from groundling.optim.schedule import ScheduleConfig
from groundling.runtime import Runtime
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.metrics import Metrics, Sink, Sinks
from groundling.training.recipe import Recipe
from groundling.training.stopping import StoppingConfig
from groundling.training.trainer import Trainer

BYTES = Tokenizer(BYTE_OF | {END_OF_TEXT: 256}, [], "bytes")
"""Of so few ids that a checkpoint is written in no time."""


class Memory(Sink):
    """A sink that remembers."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def write(self, step: int, metrics: Metrics) -> None:
        self.metrics.append({"step": step, **metrics})

    def note(self, message: str) -> None:
        self.notes.append(message)

    def progress(self, what: str, share: float) -> None:
        assert 0 <= share <= 1

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        self.metrics = [line for line in self.metrics if line["step"] < n_steps]

    def close(self) -> None:
        pass

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self.metrics if "train/loss" in line]


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk(unsynced: None) -> None:
    pass


@pytest.fixture
def recipe(tiny: GPTConfig) -> Recipe:
    return Recipe(
        seed=3,
        model=tiny,
        windows=WindowConfig(16, 4),
        optim=OptimConfig(weight_decay=0.01),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=4, total_steps=40, passes=None),
        stopping=StoppingConfig(max_steps=10),
        checkpoint=CheckpointConfig(save_every="0"),
    )


MakeTrainer = Callable[..., tuple[Trainer, Memory]]


@pytest.fixture
def make_trainer(recipe: Recipe, tokens: NDArray[np.uint16], cpu: Runtime, tmp_path: Path) -> MakeTrainer:
    """Makes (trainer, memory); keywords replace sections of the recipe; `name` is the run's folder."""

    def make(
        name: str = "run", heldout: NDArray[np.uint16] | None = None, runtime: Runtime = cpu, **sections: Any
    ) -> tuple[Trainer, Memory]:
        memory = Memory()
        trainer = Trainer(
            replace(recipe, **sections),
            tokens,
            heldout,
            BYTES,
            runtime,
            tmp_path / name / "checkpoints",
            ceiling_flops=1e15,
        )
        trainer.sinks = Sinks(memory)
        return trainer, memory

    return make

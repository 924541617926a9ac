"""The learning rate, a pure function of the step.

Invariant: nothing here remembers anything; the rate of a step is the same whether or not the run was
interrupted before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from groundling.errors import ConfigError

MAX_LENGTH = 1e9
"""Passes, or lengths of a schedule, that may be asked for: more is a slip, and would overflow a count of steps."""


LOW = 0.1
"""Share of the peak at which little more is learned; a choice."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then a hold at the peak, then a decay to the floor."""

    peak: float = 5e-4
    """Highest learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up, at most a quarter of the schedule; step 0 already moves."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of the way down; constant stays at the peak."""
    hold_fraction: float = 0.4
    """Fraction of the steps after warm-up that stay at the peak before the decay begins."""
    floor_fraction: float = 0.02
    """Rate at the end, and ever after, as a fraction of the peak."""
    passes: float | None = 13.0
    """Length of the schedule in passes over the text; or give total_steps."""
    total_steps: int | None = None
    """Length of the schedule in steps; wins over passes."""

    def __post_init__(self) -> None:
        if self.passes is None and self.total_steps is None:
            raise ConfigError("the schedule has no length: give schedule.passes or schedule.total_steps")
        for name in ("peak", "passes"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}: give a number")
        if self.passes is not None and not 0 < self.passes <= MAX_LENGTH:
            raise ConfigError(f"schedule.passes is {self.passes}: give a positive number, and at most {MAX_LENGTH:g}")
        if self.total_steps is not None and not 0 < self.total_steps <= MAX_LENGTH:
            raise ConfigError(
                f"schedule.total_steps is {self.total_steps}: give a positive number, and at most {MAX_LENGTH:g}"
            )
        if self.peak <= 0:
            raise ConfigError(f"schedule.peak is {self.peak}: give a positive learning rate")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps is {self.warmup_steps}: give 0 or more")
        for name in ("hold_fraction", "floor_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}: give a number from 0 to 1")

    @property
    def ends_low(self) -> bool:
        """Whether the rate has fallen so far by the end that a target which is far then is not met after it."""
        return self.decay != "constant" and self.floor_fraction <= LOW

    @property
    def ends_at_zero(self) -> bool:
        """Whether the rate is zero from the end on, where no step moves a weight."""
        return self.decay != "constant" and self.floor_fraction == 0

    def steps(self, steps_per_pass: float) -> int:
        """Length of the schedule in steps, for a text of which one pass takes this many."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.passes is not None
        return max(1, math.ceil(self.passes * steps_per_pass))


def warmup(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up in a schedule of so many: a short one warms up for a quarter of it at most."""
    return min(config.warmup_steps, total_steps // 4)


def learning_rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The rate of this step, of a schedule of so many steps; past its end, the floor."""
    warmup_steps = warmup(config, total_steps)
    if step < warmup_steps:
        return config.peak * (step + 1) / warmup_steps
    if config.decay == "constant":
        return config.peak
    floor = config.peak * config.floor_fraction
    if step >= total_steps:
        return floor
    decay_start = warmup_steps + config.hold_fraction * (total_steps - warmup_steps)
    if step < decay_start:
        return config.peak
    progress = (step - decay_start) / (total_steps - decay_start)  # in [0, 1)
    share = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + share * (config.peak - floor)

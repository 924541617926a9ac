"""When a run ends.

Invariant: the decision is a function of the config and of `StopState`, which a checkpoint keeps, so that
a resumed run stops where an uninterrupted one would. A run reaches its target on a loss over the whole
text; the running mean of batch losses, and a sample of it, only decide when taking that loss is worth its price.

*look*: taking the measured loss over the whole text during training. *glance*: an estimate of that loss from a sample
of windows, which can only put a look off.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

from groundling.errors import ConfigError
from groundling.evaluation import glance
from groundling.optim.schedule import MAX_LENGTH, ScheduleConfig

EMA_BATCHES = 20
"""Batches over which the running mean of train/loss forgets."""

FIRST_LOOK = 2.0
"""The first look is taken when train/loss_ema falls below this many targets. The mean lags (its windows were last
trained on a whole pass ago), so it is above corpus/loss while a run converges."""

NEXT_LOOK = 0.95
"""The next look is taken when the mean has fallen to this share of its value at the last one ..."""

TRAINED_BETWEEN = 0.5
"""... and training since has taken this share of the time of a look (an eighth of that after a glance). This guards
against a shifted grid that lands near a recent one, where the mean falls and other grids are known no better."""

NEAR = 1.5
"""From so many targets on, the loss at the schedule's end is too high for the rate that is left to close the gap: from
1.67, 362 steps more gained nothing (LOG.md)."""


@dataclass(frozen=True)
class StoppingConfig:
    """When the run ends. The first of these that comes true ends it."""

    target: float = 0.099999
    """Loss below which the text counts as known; 0 never stops on it."""
    measure: Literal["corpus/loss", "corpus/loss_offset", "train/loss"] = "corpus/loss"
    """Loss that must be below the target. corpus/loss: the whole text on the training grid. corpus/loss_offset: the
    whole text at other offsets of it, that is, by heart. train/loss: any one batch (the reference run)."""
    expected_steps: int | None = None
    """Steps after which the target is expected, for estimate and ETA; without it, the end of the schedule."""
    overtime: float = 0.5
    """How far past its schedule a run may go, as a fraction of it, if its loss is then below 1.5 targets, or if the
    final rate is above a tenth of the peak; never if the final rate is 0."""
    max_steps: int | None = None
    """Steps of the whole run, those before a resume included."""
    max_minutes: float | None = None
    """Time of the whole run, its looks and that before a resume included; the losses at its end come on top."""
    patience: int = 0
    """Evaluations of heldout/loss without improvement; 0 never stops on it. The checkpoint of the best is kept, too,
    unless checkpoint.save_every is 0."""
    heldout_every: float = 1.0
    """Passes between evaluations of heldout/loss, taken only if patience is set."""

    def __post_init__(self) -> None:
        if not 0 <= self.overtime <= MAX_LENGTH:
            raise ConfigError(f"stopping.overtime is {self.overtime}: give 0 or more, and at most {MAX_LENGTH:g}")
        if not 0 <= self.target < math.inf:
            raise ConfigError(f"stopping.target is {self.target}: give a loss of 0 or more")
        if self.expected_steps is not None and self.expected_steps < 1:
            raise ConfigError(f"stopping.expected_steps is {self.expected_steps}: give a positive number")
        if self.max_steps is not None and self.max_steps < 0:
            raise ConfigError(f"stopping.max_steps is {self.max_steps}: give 0 or more")
        if self.max_minutes is not None and not 0 <= self.max_minutes < math.inf:
            raise ConfigError(f"stopping.max_minutes is {self.max_minutes}: give 0 or more (null lifts the limit)")
        if self.patience < 0:
            raise ConfigError(f"stopping.patience is {self.patience}: give 0 (off) or more")
        if not 0 < self.heldout_every <= MAX_LENGTH:
            raise ConfigError(
                f"stopping.heldout_every is {self.heldout_every}: give a positive number up to {MAX_LENGTH:g}"
            )

    def without_target(self) -> StoppingConfig:
        """The same limits for a run that ends with its schedule, whatever its loss is by then."""
        return replace(self, target=0.0, overtime=0.0, expected_steps=None)

    def expected(self, total_steps: int) -> int:
        """Steps that a run with this schedule is expected to take."""
        expected = self.expected_steps if self.target else None
        return min(expected or total_steps, sys.maxsize if self.max_steps is None else self.max_steps)


REASONS = {
    "target": "the target is met",
    "patience": "the held-out text got no better",
    "max_steps": "as many as it was given",
    "max_minutes": "its time is over",
}


def reason_in_words(reason: str, stopping: StoppingConfig, schedule: ScheduleConfig) -> str:
    """A stop reason as a clause for the user, with what to do if the run did not get where it was to."""
    if reason != "schedule":
        return f"{REASONS[reason]} ({reason})"
    if not stopping.target:
        return "the schedule is at its end, as is meant without a target (schedule)"
    longer = (
        f"--schedule.total_steps {2 * schedule.total_steps}"
        if schedule.total_steps is not None
        else f"--schedule.passes {2 * (schedule.passes or 0):g}"
    )
    when = f"{stopping.overtime:.0%} past the end of the schedule"
    if schedule.ends_low:
        when = "with this schedule, at whose end the learning rate is too low to get there"
    return f"the target is not met {when} (schedule): train anew with more passes, such as {longer}"


@dataclass
class Look:
    """A loss over the text: which one, after how many steps, and the running mean then."""

    measure: str
    n_steps: int
    loss: float
    loss_ema: float | None
    whole: bool = True
    """False of a glance: a sample of the text, which said that the loss is above the target."""


@dataclass
class StopState:
    """What was measured that the stop rule reads; plain numbers, kept in the checkpoint as JSON."""

    loss_ema: float | None = None
    last_batch: float | None = None
    first_batch_below_target: dict[str, float] | None = None
    look: Look | None = None
    best_heldout: float | None = None
    best_heldout_step: int | None = None
    """Steps after which it was taken."""
    evaluations_without_improvement: int = 0
    heldout_at_step: int = 0
    last_heldout: float | None = None
    """What was taken then."""

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> StopState:
        """The state that `dataclasses.asdict` turned into plain numbers."""
        look = state.pop("look")
        return cls(**state, look=look and Look(**look))

    def forget_losses(self) -> None:
        """Drop what was measured in windows that are others from now on; the first batch below the target stays."""
        self.loss_ema = self.last_batch = self.look = self.last_heldout = None
        self.best_heldout = self.best_heldout_step = None
        self.evaluations_without_improvement = 0


class StopRule:
    """Reads losses, says when to look at the whole text, and when to stop.

    Every answer is computed from the state and the present config, so a run that is resumed with another
    target is judged by that one.
    """

    def __init__(
        self,
        config: StoppingConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        steps_per_pass: float,
        has_heldout: bool,
        look_steps: float,
        n_growing: int,
        first_whole: int,
    ) -> None:
        """`schedule` is one of `total_steps`; `look_steps` take as long as a loss over the whole text; in the first
        `n_growing` not all blocks take part, in the first `first_whole` no windows are whole.

        Raises `ConfigError` if patience is asked for and there is no held-out text.
        """
        if config.patience and not has_heldout:
            raise ConfigError("stopping.patience needs held-out text: give --heldout or --heldout-fraction")
        self.config = config
        self.total_steps = total_steps
        has_overtime = config.target and not schedule.ends_at_zero  # else there is nothing to wait for
        overtime = config.overtime if has_overtime else 0.0
        self.last_step = total_steps + math.ceil(overtime * total_steps)
        self.heldout_steps = max(1, round(config.heldout_every * steps_per_pass))
        self.look_steps, self.ends_low, self.n_growing = look_steps, schedule.ends_low, n_growing
        self.heldout_from = max(n_growing, first_whole)
        """Steps before which held-out text has nothing to say of patience."""
        self.state = StopState()

    def observe(self, step: int, loss: float) -> None:
        """Take in the loss of a step's own batch, of whole windows as a look has them."""
        state, target = self.state, self.config.target
        ema = loss if state.loss_ema is None else state.loss_ema
        state.loss_ema = ema + (loss - ema) / EMA_BATCHES
        state.last_batch = loss
        first = state.first_batch_below_target
        if loss < target and (first is None or first["loss"] >= target):
            state.first_batch_below_target = {"step": step, "loss": loss}

    def look_due(self, n_steps: int) -> bool:
        """Whether a loss over the whole text should be taken after so many steps."""
        config, look = self.config, self._last_look()
        if config.measure == "train/loss" or not config.target or (look and look.whole and look.n_steps == n_steps):
            return False
        if n_steps == self.total_steps or n_steps >= self.last_step:  # beyond it, where a resume shortened the schedule
            return True
        ema = self.state.loss_ema
        if ema is None or n_steps <= self.n_growing:
            return False
        if look is None or look.loss_ema is None or (not look.whole and look.loss < config.target):  # of a lower target
            return ema < FIRST_LOOK * config.target
        share = 1.0 if look.whole else glance.MAX_SHARE
        trained = n_steps - look.n_steps >= TRAINED_BETWEEN * share * self.look_steps
        return trained and ema < look.loss_ema * min(NEXT_LOOK, config.target / look.loss)

    def looked(self, n_steps: int, loss: float) -> None:
        """Take in the loss over the whole text that is measured."""
        self.state.look = Look(self.config.measure, n_steps, loss, self.state.loss_ema)

    def may_glance(self, n_steps: int) -> bool:
        """Whether a look that is due may be put off by a sample of the text."""
        return n_steps != self.total_steps and n_steps < self.last_step  # there the loss itself is wanted

    def glanced(self, n_steps: int, loss: float) -> None:
        """Take in the loss of a sample of the text that is above the target."""
        self.state.look = Look(self.config.measure, n_steps, loss, self.state.loss_ema, whole=False)

    def reached(self, n_steps: int) -> bool:
        """Whether the measured loss is known to be below the target after so many steps, and all blocks take part."""
        if n_steps <= self.n_growing:
            return False
        if self.config.measure == "train/loss":
            return self.state.last_batch is not None and self.state.last_batch < self.config.target
        look = self._last_look()
        return look is not None and look.whole and look.n_steps == n_steps and look.loss < self.config.target

    def _last_look(self) -> Look | None:
        """The last look, if it was at the loss that is measured now."""
        look = self.state.look
        return look if look and look.measure == self.config.measure else None

    def heldout_due(self, n_steps: int) -> bool:
        """Whether heldout/loss should be taken after so many steps."""
        waited = n_steps - self.state.heldout_at_step
        return bool(self.config.patience) and n_steps > self.heldout_from and waited >= self.heldout_steps

    def observe_heldout(self, n_steps: int, loss: float) -> None:
        """Take in a heldout/loss."""
        state = self.state
        state.heldout_at_step, state.last_heldout = n_steps, loss
        if math.isfinite(loss) and (state.best_heldout is None or loss < state.best_heldout):
            state.best_heldout, state.best_heldout_step, state.evaluations_without_improvement = loss, n_steps, 0
        else:
            state.evaluations_without_improvement += 1

    def known(self, name: str, n_steps: int) -> float | None:
        """The loss of this house name, if it was taken after just so many steps."""
        state, look = self.state, self.state.look
        if name == "heldout/loss" and state.heldout_at_step == n_steps:
            return state.last_heldout
        return look.loss if look and look.whole and (look.measure, look.n_steps) == (name, n_steps) else None

    def reason(self, n_steps: int, wall_s: float) -> str | None:
        """Why the run ends after so many steps and seconds, or None."""
        config = self.config
        if self.reached(n_steps):
            return "target"
        if config.patience and self.state.evaluations_without_improvement >= config.patience:
            return "patience"
        if config.max_steps is not None and n_steps >= config.max_steps:
            return "max_steps"
        if not self.seconds_left(wall_s):
            return "max_minutes"
        if n_steps >= self.last_step or (n_steps >= self.total_steps and self._out_of_reach()):
            return "schedule"
        return None

    def seconds_left(self, wall_s: float) -> float:
        """Seconds of the time that the run was given, after so many of them; inf if it was given none."""
        return math.inf if self.config.max_minutes is None else max(0.0, 60 * self.config.max_minutes - wall_s)

    def _out_of_reach(self) -> bool:
        """Whether the loss at the end of the schedule was too far above the target for the rate that is left."""
        look = self._last_look()
        if not self.ends_low or look is None or not look.whole or look.n_steps != self.total_steps:
            return False
        return look.loss >= NEAR * self.config.target

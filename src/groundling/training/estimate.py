"""What a run will cost, from a few measured steps.

Invariant: measuring changes nothing that the run depends on: the steps are taken with a learning rate of
zero, and the moments they leave are dropped.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from groundling import machine
from groundling.corpus.windows import gather, grid
from groundling.training.progress import clock
from groundling.training.step import training_step
from groundling.training.trainer import Trainer

WARMUP_STEPS = 2
"""The first step compiles and allocates; the second still meets new memory."""
MEASURED_STEPS = 2
MEASURED_S = 1.0
"""At least so many steps are measured, and for so long: small models need many to tell."""
MEASURED_TOKENS = 2048
"""A measured step reads about this many tokens, unless compiled code has one shape only."""

FORWARD_SHARE = 1 / 3
"""Share of a step's matrix products that an evaluation needs: forward is 2 of 6 (Kaplan et al. 2020)."""
GRADIENT_AND_MOMENTS_BYTES = 12
"""For each parameter, in fp32."""
LOOKS = 3
"""Full passes for the stop rule that a run is assumed to take."""

QUICK_S = 120.0
"""`evaluation.final: auto` always takes losses that need less than this."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a whole run."""

    step_s: float
    tokens_per_s: float
    train_s: float
    evaluation_s: float
    memory_bytes: int | None

    @property
    def total_s(self) -> float:
        return self.train_s + self.evaluation_s

    def sentence(self) -> str:
        """The estimate as one line for the user."""
        memory = "" if self.memory_bytes is None else f", memory about {self.memory_bytes / 2**30:.1f} GiB"
        return (
            f"estimate: {clock(self.train_s)} of training at {self.tokens_per_s:,.0f} tokens/s,"
            f" about {clock(self.evaluation_s)} for the losses over the whole text{memory}"
        )


def measure(trainer: Trainer, final: str) -> Estimate:
    """Time a few steps of this trainer, before its first, and extrapolate to its end.

    `final` is `EvaluationConfig.final`.

    Must come before `Trainer.resume`: it drops the optimizer's moments.
    """
    recipe, runtime = trainer.recipe, trainer.runtime
    length, micro = recipe.windows.length, recipe.windows.micro
    n_windows = micro if runtime.compile else min(micro, max(1, MEASURED_TOKENS // length))
    windows = grid(len(trainer.train_tokens), length)
    batch = gather(trainer.train_tokens, windows.take(range(n_windows), axis=0, mode="wrap"), length)
    before_bytes = machine.peak_memory_bytes(runtime.device)
    clip, seconds = recipe.optim.clip, list[float]()
    while len(seconds) < WARMUP_STEPS + MEASURED_STEPS or sum(seconds[WARMUP_STEPS:]) < MEASURED_S:
        result = training_step(trainer.model, trainer.loss_sum, trainer.optimizer, batch, 0.0, n_windows, clip, runtime)
        seconds.append(result.seconds)
        trainer.signals.check()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()

    step_s = statistics.median(seconds[WARMUP_STEPS:]) * recipe.windows.batch_size / n_windows
    token_s = step_s / (recipe.windows.batch_size * length)
    train_s = trainer.expected_steps * step_s
    if recipe.stopping.max_minutes is not None:
        train_s = min(train_s, 60 * recipe.stopping.max_minutes)
    return Estimate(
        step_s,
        1 / token_s,
        train_s,
        _evaluations_s(trainer, final, train_s, 1 / token_s),
        _memory_bytes(trainer, before_bytes, micro / n_windows),
    )


def remaining(trainer: Trainer, step_s: float) -> str:
    """What is left of a resumed run, as one line for the user; `step_s` is its seconds per step so far."""
    n_steps, expected_steps = trainer.state.n_steps, trainer.expected_steps
    if n_steps >= expected_steps:
        more = max(0, trainer.stop_rule.last_step - n_steps)
        return f"left: the {expected_steps:,} steps that were expected are over; at most {more:,} more"
    left_s = (expected_steps - n_steps) * step_s
    if (max_minutes := trainer.recipe.stopping.max_minutes) is not None:
        left_s = min(left_s, max(0.0, 60 * max_minutes - trainer.state.wall_s))
    return (
        f"left: {clock(left_s)} of training to step {expected_steps:,}, at the {step_s:.3g} s that a step has taken"
        " so far"
    )


def _evaluations_s(trainer: Trainer, final: str, train_s: float, tokens_per_s: float) -> float:
    """Seconds for the looks of the stop rule and the losses that are taken at the end."""
    stopping, reads = trainer.recipe.stopping, trainer.final_reads()
    total_s = 0.0
    if stopping.max_steps is None and stopping.target and stopping.measure != "train/loss":
        total_s += LOOKS * evaluation_s(reads[stopping.measure], tokens_per_s)
    for n_tokens in reads.values():
        seconds = evaluation_s(n_tokens, tokens_per_s)
        total_s += seconds if is_taken(final, seconds, train_s) else 0.0
    return total_s


def _memory_bytes(trainer: Trainer, before_bytes: int | None, scale: float) -> int | None:
    """Peak memory of a full micro-batch, which is `scale` times the one that was measured."""
    peak_bytes = machine.peak_memory_bytes(trainer.runtime.device)
    if peak_bytes is None or before_bytes is None:
        return None
    kept_bytes = GRADIENT_AND_MOMENTS_BYTES * trainer.model.config.n_parameters()  # whatever the batch
    of_batch_bytes = max(0, peak_bytes - before_bytes - kept_bytes)
    return round(peak_bytes + of_batch_bytes * (scale - 1))


def evaluation_s(n_tokens: int, tokens_per_s: float) -> float:
    """Seconds to take losses over so many tokens, at a speed measured in training."""
    return FORWARD_SHARE * n_tokens / tokens_per_s


def is_taken(final: str, seconds: float, train_s: float) -> bool:
    """Whether a loss that needs so long is taken at the end of a run that trained so long."""
    return final == "all" or (final == "auto" and seconds <= max(QUICK_S, train_s))

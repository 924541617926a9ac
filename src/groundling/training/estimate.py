"""What a run will cost, extrapolated from its first steps or, for `groundling estimate`, from steps at a learning rate
of zero.

Invariant: measuring changes nothing that the run depends on: steps that are no run's are taken with a learning rate of
zero, and the moments they leave are dropped.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from groundling import machine
from groundling.corpus.windows import gather, grid
from groundling.evaluation.corpus_loss import FORWARD_SHARE
from groundling.training.flops import network_share, step_flops
from groundling.training.metrics import Metrics, Sink, read_lines
from groundling.training.progress import clock
from groundling.training.step import StepResult, training_step
from groundling.training.trainer import Trainer

WARMUP_STEPS = 2
"""The first step compiles and allocates; the second still meets new memory."""
MEASURED_STEPS = 2
MEASURED_S = 1.0
"""At least so many steps are measured, and for so long: small models need many to tell."""
MEASURED_TOKENS = 2048
"""A measured step reads about this many tokens, unless compiled code has its own shapes only."""

KEPT_VALUES = 20
"""What a block keeps of a token until its backward pass, in values for each of n_embd: the peak memory of steps of
16,384 and of 8,192 tokens differs by 17 to 21 of them (benchmarks/results/train_step_sweep*.jsonl, bf16 and fp32)."""

LOOKS = 2
"""Looks of the stop rule that a run is assumed to take, the last of which ends it. Of the seven runs on record that
ended so six took one, and one two."""

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
    achieved_flops: float
    """Matrix FLOP a second of the measured steps, in the network that is computed and in its update."""
    n_steps: int
    """Those that the run takes within its limits ..."""
    expected_steps: int
    """... and without limits."""
    total_steps: int
    """The schedule's."""
    schedule_steps: int
    """Length of a schedule that would be over within the limits."""

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


class FirstSteps(Sink):
    """A sink that tells the estimate as soon as enough of the run's own first steps have been taken.

    A run that goes on after others' steps has no first ones, and is told nothing.
    """

    def __init__(self, trainer: Trainer, final: str, tell: Callable[[Estimate], None]) -> None:
        """`final` is `EvaluationConfig.final`."""
        self.trainer, self.final, self.tell = trainer, final, tell
        self.n_turns = _steps_in_round(trainer, trainer.growth.n_blocks(0))
        self.seconds: list[float] = []
        self.told = False

    def write(self, step: int, metrics: Metrics) -> None:
        if self.told or step != len(self.seconds) or "train/step_s" not in metrics:
            return
        self.seconds.append(metrics["train/step_s"])
        if _enough(self.seconds, self.n_turns):
            self.told = True
            windows, growth = self.trainer.windows, self.trainer.growth
            measured = range(WARMUP_STEPS, len(self.seconds))
            whole_s = [self.seconds[each] / growth.cost(growth.n_blocks(each)) for each in measured]
            step_s = _of_rounds(whole_s, self.n_turns)
            length = statistics.mean(windows.config.length / windows.n_pieces(each) for each in measured)
            peak_bytes = machine.peak_memory_bytes(self.trainer.runtime.device)
            memory_bytes = None if peak_bytes is None else peak_bytes + _joining_bytes(self.trainer, step)
            self.tell(_extrapolate(self.trainer, self.final, step_s, memory_bytes, length))


def measure(trainer: Trainer, final: str) -> Estimate:
    """Time a few steps of a trainer that is not to train, and extrapolate to the end of its run.

    `final` is `EvaluationConfig.final`.

    The moments of the trainer's optimizer are dropped.
    """
    recipe, runtime = trainer.recipe, trainer.runtime
    length, micro = recipe.windows.length, recipe.windows.micro
    as_it_is = runtime.compile or runtime.device.type != "cpu"  # a GPU is as quick with few windows as with many
    n_windows = micro if as_it_is else min(micro, max(1, MEASURED_TOKENS // length))
    windows = grid(len(trainer.train_tokens), length)
    batch = gather(trainer.train_tokens, windows.take(range(n_windows), axis=0, mode="wrap"), length)
    before_bytes = machine.peak_memory_bytes(runtime.device)
    clip, steps = recipe.optim.clip, list[StepResult]()
    n_turns = _steps_in_round(trainer, trainer.model.config.n_layer)
    while not _enough([step.seconds for step in steps], n_turns):
        steps.append(
            training_step(trainer.model, trainer.loss_sum, trainer.optimizer, batch, 0.0, n_windows, clip, runtime)
        )
    memory_bytes = _memory_bytes(trainer, before_bytes, micro / n_windows)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    update_s = _of_rounds([step.update_seconds for step in steps[WARMUP_STEPS:]], n_turns)
    rest_s = statistics.median(step.seconds - step.update_seconds for step in steps[WARMUP_STEPS:])
    step_s = rest_s * recipe.windows.batch_size / n_windows + update_s
    return _extrapolate(trainer, final, step_s, memory_bytes, length)


def _enough(seconds: Sequence[float], n_turns: int) -> bool:
    """Whether steps that took so long, in this order, tell how long others will take: whole rounds of the turns."""
    n_measured = len(seconds) - WARMUP_STEPS
    enough = n_measured >= MEASURED_STEPS and sum(seconds[WARMUP_STEPS:]) >= MEASURED_S
    return enough and n_measured % n_turns == 0


def _steps_in_round(trainer: Trainer, n_blocks: int) -> int:
    """Steps after which each of so many blocks has moved: 1 where steps differ in nothing."""
    optim = trainer.recipe.optim
    turns = optim.turns_of(trainer.model.config.n_layer) if optim.kind == "muon" else 1
    return turns if n_blocks % turns else 1


def _of_rounds(seconds: Sequence[float], n_turns: int) -> float:
    """The median of the mean seconds of each round of turns, in whose steps not equally many blocks may move."""
    return statistics.median(statistics.mean(seconds[i : i + n_turns]) for i in range(0, len(seconds), n_turns))


def _extrapolate(trainer: Trainer, final: str, step_s: float, memory_bytes: int | None, length: float) -> Estimate:
    """The estimate of a run, from the seconds of a step through all blocks whose windows have this mean length."""
    recipe = trainer.recipe
    model, windows, optim = trainer.model.config, recipe.windows, recipe.optim
    achieved_flops = step_flops(model, windows, optim, length) / step_s
    step_s = step_flops(model, windows, optim, windows.mean_length) / achieved_flops
    expected_steps = replace(recipe.stopping, max_steps=None).expected(trainer.total_steps)
    n_steps = trainer.expected_steps
    train_s = step_s * trainer.growth.whole_steps(0, n_steps)
    schedule_steps = min(n_steps, trainer.total_steps)
    if recipe.stopping.max_minutes is not None and train_s > (limit_s := 60 * recipe.stopping.max_minutes):
        train_s, whole_steps = limit_s, trainer.growth.whole_steps
        n_steps = bisect_left(range(n_steps), limit_s / step_s, key=lambda n: whole_steps(0, n))
        schedule_steps = math.floor(trainer.total_steps * limit_s / step_s / whole_steps(0, trainer.total_steps))
    mean_step_s = step_s * trainer.growth.whole_steps(0, n_steps) / n_steps if n_steps else step_s
    evaluation_s = _evaluations_s(trainer, final, train_s, n_steps, step_s, reaches_end=n_steps == expected_steps)
    tokens_per_s = windows.batch_size * windows.length / mean_step_s
    return Estimate(
        mean_step_s,
        tokens_per_s,
        train_s,
        evaluation_s,
        memory_bytes,
        achieved_flops,
        n_steps,
        expected_steps,
        trainer.total_steps,
        schedule_steps,
    )


def step_s_so_far(trainer: Trainer, metrics: Path) -> float | None:
    """The median seconds that a run's steps have taken, or would have if all blocks took part; None if it took none."""
    n_layer, growth = trainer.model.config.n_layer, trainer.growth
    seconds: dict[int, list[float]] = {}
    for line in read_lines(metrics):
        if "train/step_s" in line:
            seconds.setdefault(line.get("train/blocks", n_layer), []).append(line["train/step_s"])
    most = max(seconds, default=0)
    return statistics.median(seconds[most]) / growth.cost(most) if most else None


def remaining(trainer: Trainer, step_s: float) -> str:
    """What is left of a resumed run, as one line for the user; `step_s` is that of `step_s_so_far`."""
    n_steps, expected_steps = trainer.state.n_steps, trainer.expected_steps
    if n_steps >= expected_steps:
        ended = trainer.stop_rule.reason(n_steps, trainer.state.wall_s) is not None
        more = 0 if ended else max(0, trainer.stop_rule.last_step - n_steps)
        return f"left: the {expected_steps:,} steps that were expected are over; at most {more:,} more"
    left_s = steps_s = trainer.growth.whole_steps(n_steps, expected_steps) * step_s
    left_s += (heldout_s := _heldout_s(trainer, expected_steps, step_s))
    left_s = min(left_s, trainer.stop_rule.seconds_left(trainer.state.wall_s))
    return (
        f"left: {clock(left_s)} of training to step {expected_steps:,}, at {steps_s / (expected_steps - n_steps):.3g} s"
        f" a step, as those so far tell{', evaluations of the held-out text included' if heldout_s else ''}"
    )


def _evaluations_s(
    trainer: Trainer, final: str, train_s: float, n_steps: int, step_s: float, reaches_end: bool
) -> float:
    """Seconds for the losses that are taken in so many steps and after them; looks of the stop rule are taken near the
    end that is expected.

    `step_s` is that of `seconds_to_read`.
    """
    stopping, reads = trainer.recipe.stopping, trainer.looks.sizes()
    total_s = 0.0
    if reaches_end and stopping.target and stopping.measure != "train/loss":
        total_s += LOOKS * seconds_to_read(trainer, reads.pop(stopping.measure), step_s)
    total_s += _heldout_s(trainer, n_steps, step_s)
    for n_tokens in reads.values():
        seconds = seconds_to_read(trainer, n_tokens, step_s)
        total_s += seconds if is_taken(final, seconds, train_s) else 0.0
    return total_s


def _heldout_s(trainer: Trainer, end: int, step_s: float) -> float:
    """Seconds for the losses over the held-out text that `stopping.patience` asks for until this step."""
    if not trainer.recipe.stopping.patience:
        return 0.0
    n_tokens = trainer.looks.sizes()["heldout/loss"]
    rule = trainer.stop_rule
    begun = max(rule.state.heldout_at_step, rule.heldout_from + 1 - rule.heldout_steps)
    n_left = max(0, end - begun) // rule.heldout_steps
    return n_left * seconds_to_read(trainer, n_tokens, step_s)


def _joining_bytes(trainer: Trainer, step: int) -> int:
    """Memory that the blocks which wait in this step will add once they take part."""
    model, recipe, windows = trainer.model.config, trainer.recipe, trainer.recipe.windows
    n_blocks, copies = trainer.growth.n_blocks(step), trainer.runtime.dtype is not torch.float32
    n_parameters = model.n_parameters() - replace(model, n_layer=n_blocks).n_parameters()
    n_moments = 1 if recipe.optim.kind == "muon" else 2
    of_parameters = n_parameters * (4 * (1 + n_moments) + 2 * copies)  # with the gradient
    of_tokens = (model.n_layer - n_blocks) * KEPT_VALUES * model.n_embd * windows.micro * windows.length
    return of_parameters + of_tokens * trainer.runtime.dtype.itemsize


def _memory_bytes(trainer: Trainer, before_bytes: int | None, scale: float) -> int | None:
    """Peak memory of a full micro-batch, which is `scale` times the one that was measured."""
    peak_bytes = machine.peak_memory_bytes(trainer.runtime.device)
    if peak_bytes is None or before_bytes is None:
        return None
    moments = (moment for state in trainer.optimizer.state.values() for moment in state.values())
    moments_bytes = sum(moment.nbytes for moment in moments if isinstance(moment, Tensor))
    gradient_bytes = sum(weight.nbytes for weight in trainer.model.parameters())
    kept_bytes = moments_bytes + gradient_bytes  # whatever the batch
    of_batch_bytes = max(0, peak_bytes - before_bytes - kept_bytes)
    return round(peak_bytes + of_batch_bytes * (scale - 1))


def seconds_to_read(trainer: Trainer, n_tokens: int, step_s: float) -> float:
    """Seconds to take losses over so many tokens, if a step through all blocks takes so long, its update included."""
    windows = trainer.recipe.windows
    share = network_share(trainer.model.config, windows, trainer.recipe.optim)
    return FORWARD_SHARE * share * step_s * n_tokens / (windows.batch_size * windows.length)


def is_taken(final: str, seconds: float, train_s: float) -> bool:
    """Whether a loss that needs so long is taken at the end of a run that trained so long."""
    return final == "all" or (final == "auto" and seconds <= max(QUICK_S, train_s))

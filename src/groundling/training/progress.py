"""What a user sees while a run goes on: a live line on a terminal, plain lines elsewhere.

Invariant: shows what the loop measured and computes nothing but the time that remains.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from groundling.training.metrics import Metrics, Sink

PLAIN_INTERVAL_S = 10.0
RATE_STEPS = 20
"""Steps over which the time per step is averaged."""
UNSTEADY_STEPS = 2
"""First steps of a process, or of blocks that have joined, which compile and allocate: they do not tell the others'
time."""

EVALUATIONS = ("corpus/loss", "corpus/loss_offset", "heldout/loss")


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[float, float], None]]:
    """A bar on a terminal, gone when done, or a plain line every ten seconds.

    What it yields is called with what is done so far, and with all that is to do.
    """
    console = Console(file=sys.stderr)
    printed_at = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def show(done: float, total: float) -> None:
            nonlocal printed_at
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - printed_at >= PLAIN_INTERVAL_S:
                printed_at = time.monotonic()
                console.print(f"{what}: {bar.tasks[0].percentage:.0f} %", markup=False)

        yield show


@contextmanager
def progress_bar(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """The same where all that is to do is known: what it yields is called with what was done since."""
    done = 0.0
    with progress_of(what) as show:
        show(done, total)

        def advance(more: float) -> None:
            nonlocal done
            done += more
            show(done, total)

        yield advance


class Terminal(Sink):
    """A sink for people: `rich` on a terminal, else a plain line every ten seconds.

    The time that remains is that of the steps that the run is expected to take (`StoppingConfig.expected`), or what is
    left of the run's own limit.
    """

    def __init__(
        self,
        expected_steps: int,
        whole_steps: Callable[[int, int], float] | None = None,
        seconds_left: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """`whole_steps` is `Growth.whole_steps`, for runs whose steps cost unequally much; `seconds_left` says when the
        time that a run was given is over.
        """
        self.expected_steps, self.seconds_left = expected_steps, seconds_left
        self.whole_steps = whole_steps or (lambda first, last: last - first)
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.live: Progress | None = None
        self.step_times: deque[float] = deque(maxlen=RATE_STEPS)
        self.n_unsteady = UNSTEADY_STEPS
        self.n_blocks: float | None = None
        self.printed_at = -PLAIN_INTERVAL_S
        if self.console.is_terminal:
            self.live = Progress(BarColumn(bar_width=8), TextColumn("{task.description}"), console=self.console)
            self.task = self.live.add_task("", total=expected_steps)
            self.live.start()

    def write(self, step: int, metrics: Metrics) -> None:
        for name in EVALUATIONS:
            if name in metrics:
                self.note(f"step {step}  {name} {metrics[name]:.6f}  (whole text)")
        if "train/loss" not in metrics:
            return
        line = self._line(step, metrics)
        if self.live:
            self.live.update(self.task, completed=min(step + 1, self.expected_steps), description=line)
        elif time.monotonic() - self.printed_at >= PLAIN_INTERVAL_S:
            self.printed_at = time.monotonic()
            self.console.print(line, markup=False)

    def note(self, message: str) -> None:
        self.console.print(message, markup=False)

    def progress(self, what: str, share: float) -> None:
        if self.live:
            self.live.update(self.task, description=f"{what}: {share:.0%}")
        elif time.monotonic() - self.printed_at >= PLAIN_INTERVAL_S:
            self.printed_at = time.monotonic()
            self.console.print(f"{what}: {share:.0%}", markup=False)

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        self.step_times.clear()

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _line(self, step: int, metrics: Metrics) -> str:
        if (n_blocks := metrics.get("train/blocks")) != self.n_blocks:  # compiled anew, and new memory is met
            self.n_blocks, self.n_unsteady = n_blocks, UNSTEADY_STEPS
        if self.n_unsteady:
            self.n_unsteady -= 1
        else:
            self.step_times.append(metrics["train/step_s"] / self.whole_steps(step, step + 1))
        left = "-"
        if self.step_times:
            n_left = self.whole_steps(step + 1, max(step + 1, self.expected_steps))
            left = clock(min(n_left * sum(self.step_times) / len(self.step_times), self.seconds_left()))
        digits = 4 if self.live else 6  # beside the bar, 80 columns hold no more
        loss, mean = (
            "-" if value is None else f"{value:.{digits}f}"
            for value in (metrics["train/loss"], metrics["train/loss_ema"])
        )
        return (
            f"{step}/{self.expected_steps} loss {loss} mean {mean} {metrics['train/tokens_per_s']:,.0f} tokens/s"
            f" {metrics['train/mfu']:.0%} ETA {left}"
        )

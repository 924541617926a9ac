"""An estimate of a loss over a whole text from some of its windows, and how far off it may be.

Invariant: it decides whether and when that loss is taken, and nothing else: it is never reported as one, and ends no
run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from groundling.corpus.shards import Tokens
from groundling.corpus.windows import grid
from groundling.evaluation.corpus_loss import Evaluator, loss_offsets

N_GROUPS = 24
GROUP = 16
"""A glance reads so many groups of so many windows. Each group goes over the whole text, and what lies between their
means tells how far off the mean of all may be."""

MAX_SHARE = 1 / 8
"""Share of a look's windows that a glance may read: where its own are more, there is none."""

N_ERRORS = 1.0
"""Standard errors by which a glance must be above the target to put a look off. More would be surer, and waste looks:
one that is put off in error costs a few steps and another glance, and one in vain costs a reading of the whole text."""


@dataclass(frozen=True)
class Glance:
    """The mean loss of some of the windows that a look would read, nats per token, and its standard error."""

    loss: float
    error: float
    n_windows: int

    def __str__(self) -> str:
        return f"{self.loss:.3f} in a sample of {self.n_windows:,} windows, with a standard error of {self.error:.3f}"

    def is_above(self, target: float) -> bool:
        """Whether the loss over the whole text is likely to be above the target, too."""
        return self.loss - N_ERRORS * self.error > target


def glance(evaluator: Evaluator, name: str, tokens: Tokens) -> Glance | None:
    """A sample of the loss of this house name over the training text, spread evenly over it and the loss's offsets.

    None where the text is so short that the loss itself costs little more.
    """
    assert name in ("corpus/loss", "corpus/loss_offset"), f"{name} has other windows"
    offsets = loss_offsets(len(tokens), evaluator.length) if name == "corpus/loss_offset" else [0]
    windows = np.concatenate([grid(len(tokens), evaluator.length, offset) for offset in offsets])
    n_windows = N_GROUPS * GROUP
    if n_windows > MAX_SHARE * len(windows):
        return None
    chosen = windows[(2 * np.arange(n_windows) + 1) * len(windows) // (2 * n_windows)]
    groups = [chosen[first::N_GROUPS] for first in range(N_GROUPS)]
    sums = np.array([evaluator.sum_over(tokens, group) for group in groups])
    sizes = np.array([group[:, 1].sum() for group in groups])
    with np.errstate(invalid="ignore"):  # of losses that are not finite nothing is certain
        error = (sums / sizes).std(ddof=1) / math.sqrt(N_GROUPS)
        return Glance(float(sums.sum() / sizes.sum()), float(error), n_windows)

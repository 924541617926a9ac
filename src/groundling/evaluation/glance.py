"""An estimate of a loss over a whole text from some of its windows, and how far off it may be.

Invariant: it decides whether that loss is worth its price, and nothing else: it is never reported as one, and ends no
run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from groundling.corpus.shards import Tokens
from groundling.corpus.windows import grid
from groundling.evaluation.corpus_loss import Evaluator, loss_offsets

N_BATCHES = 24
"""Batches that a glance reads."""

SHARE = 1 / 8
"""At most this share of a look's windows: where that is less than `N_BATCHES`, there is no glance."""

ERRORS = 3.0
"""Standard errors by which a glance must be above the target: by chance it is in one of a thousand."""


@dataclass(frozen=True)
class Glance:
    """The mean loss of some of the windows that a look would read, nats per token, and its standard error."""

    loss: float
    error: float
    n_windows: int

    def __str__(self) -> str:
        return f"{self.loss:.3f} in {self.n_windows:,} of its windows, with a standard error of {self.error:.3f}"

    def is_above(self, target: float) -> bool:
        """Whether the loss over the whole text is above the target, too, but for a freak of chance."""
        return self.loss - ERRORS * self.error > target


def glance(evaluator: Evaluator, name: str, tokens: Tokens) -> Glance | None:
    """A sample of the loss of this house name, its windows spread evenly over the text and over the loss's offsets.

    None where the text is so short that the loss itself costs little more.
    """
    offsets = loss_offsets(len(tokens), evaluator.length) if name == "corpus/loss_offset" else [0]
    windows = np.concatenate([grid(len(tokens), evaluator.length, offset) for offset in offsets])
    n_windows = N_BATCHES * evaluator.batch_size
    if n_windows > SHARE * len(windows):
        return None
    chosen = windows[:: len(windows) // n_windows][:n_windows]
    batches = chosen.reshape(N_BATCHES, evaluator.batch_size, 2)
    means = np.array([evaluator.loss_sum_of(tokens, batch) / batch[:, 1].sum() for batch in batches])
    with np.errstate(invalid="ignore"):  # of losses that are not finite nothing is certain
        return Glance(float(means.mean()), float(means.std(ddof=1)) / math.sqrt(N_BATCHES), n_windows)

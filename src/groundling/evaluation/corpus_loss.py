"""The losses that count: means over every prediction of a text.

Invariant: a loss returned here covers each of the n_tokens - 1 predictions exactly once (at each
offset), over the full vocabulary, in nats per token; no sampling (but `glance.py` sums what it chose), no skipped tail.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.shards import Tokens
from groundling.corpus.windows import gather, grid, seeded_offsets
from groundling.runtime import Runtime

N_OFFSETS = 8
"""Offsets at which `corpus/loss_offset` is taken, in any text that has so many."""

FORWARD_SHARE = 1 / 3
"""Share of a training step's matrix products that an evaluation needs: forward is 2 of 6 (Kaplan et al. 2020)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Which losses over the whole text are taken when a run ends."""

    final: Literal["auto", "all", "none"] = "auto"
    """auto takes each loss that needs no longer than the training did, or two minutes, and names the others."""


LossSum = Callable[[Tensor, Tensor], Tensor]
"""Summed cross-entropy of targets (B, T) given inputs (B, T), as `GPT2.loss_sum` computes it."""


def loss_offsets(n_tokens: int, length: int) -> list[int]:
    """The offsets of `corpus/loss_offset`, all smaller than the text: a larger one would not move any window.

    0 alone, where the text has one prediction or a window one token.
    """
    return seeded_offsets(min(length, n_tokens - 1), N_OFFSETS) or [0]


def n_tokens_read(loss: str, n_tokens: int, length: int) -> int:
    """How many tokens the loss of this house name reads of a text of so many, in windows of `length`."""
    return n_tokens * (len(loss_offsets(n_tokens, length)) if loss == "corpus/loss_offset" else 1)


@dataclass(frozen=True)
class Evaluator:
    """Takes the losses of one model in windows of `length` tokens, `batch_size` at a time."""

    loss_sum: LossSum
    length: int
    runtime: Runtime
    batch_size: int = 8
    on_windows: Callable[[int], object] = lambda n_windows: None
    """Called with the number of windows just read; may raise to abandon the evaluation."""

    def loss(self, tokens: Tokens, offset: int = 0) -> float:
        """Mean loss over every prediction of the text: `corpus/loss` or `heldout/loss`.

        The windows lie on the grid with this offset; the tokens before it form a short window of their
        own, so that nothing is left out.
        """
        return self.sum_over(tokens, grid(len(tokens), self.length, offset)) / (len(tokens) - 1)

    def sum_over(self, tokens: Tokens, windows: NDArray[np.int64]) -> float:
        """Summed loss of every prediction in these windows (start, n)."""
        total = 0.0
        for first in range(0, len(windows), self.batch_size):
            chosen = windows[first : first + self.batch_size]
            if self.runtime.compile:  # one shape for all
                empty = np.zeros((self.batch_size - len(chosen), 2), dtype=np.int64)
                batch = gather(tokens, np.concatenate([chosen, empty]), self.length)
            else:
                batch = gather(tokens, chosen, int(chosen[:, 1].max()))
            batch = batch.to(self.runtime.device)
            with torch.no_grad(), self.runtime.autocast():
                total += float(self.loss_sum(batch.inputs, batch.targets))
            self.on_windows(len(chosen))
        return total

    def offset_losses(self, tokens: Tokens) -> dict[int, float]:
        """`loss` at each of the `loss_offsets`."""
        return {offset: self.loss(tokens, offset) for offset in loss_offsets(len(tokens), self.length)}

    def offset_loss(self, tokens: Tokens) -> float:
        """`corpus/loss_offset`: the mean over the seeded offsets."""
        return statistics.fmean(self.offset_losses(tokens).values())

"""What a model predicts of every token of its text: how often rightly, and how well at each place of the window.

Invariant: over all windows of a grid, each of the n_tokens - 1 predictions counts exactly once, and the mean loss is
that of `corpus_loss.Evaluator`; over some windows, drawn at random, the figures estimate those.

Source of exact match: Tirumala et al. 2022, "Memorization Without Overfitting: Analyzing the Training Dynamics of
Large Language Models" (NeurIPS), who call it exact memorization: the share of predictions whose likeliest token is the
text's.

One pass also tells what is extractable on the grid (`extraction.py`), of every window and without decoding: greedy
decoding writes the text's next 50 tokens if and only if the likeliest token is the text's at each of those places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.goldfish import PLAIN, ObjectiveConfig
from groundling.corpus.shards import Tokens
from groundling.corpus.windows import gather, grid
from groundling.evaluation.extraction import CONTINUATION, PROMPT_LENGTHS, SEED, Extractability
from groundling.kernels.reference import IGNORED_TARGET
from groundling.model.gpt2 import GPT2
from groundling.runtime import Runtime

LOGITS_AT_ONCE = 1 << 24
"""64 MiB of them in fp32, of which a few copies are made: 333 predictions of GPT-2's vocabulary."""


@dataclass
class Tally:
    """Predictions counted: how many, how many right, and their summed loss in nats."""

    n: int = 0
    n_right: int = 0
    loss_sum: float = 0.0

    @property
    def exact_match(self) -> float | None:
        """Share of predictions whose likeliest token is the text's; None of no prediction."""
        return self.n_right / self.n if self.n else None

    @property
    def loss(self) -> float | None:
        """Mean loss; None of no prediction."""
        return self.loss_sum / self.n if self.n else None

    def add(self, right: NDArray[np.bool_], losses: NDArray[np.float64]) -> None:
        """Count some more."""
        self.n += len(right)
        self.n_right += int(right.sum())
        self.loss_sum += float(losses.sum())


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model predicts of the windows on one grid."""

    offset: int
    n_windows: int
    """Windows that were read."""
    n_all_windows: int
    """Windows of the whole text."""
    all: Tally
    dropped: Tally
    """Those of `all` that goldfish loss never trained on."""
    loss_by_position: list[float | None]
    """Mean loss at each of the T positions of the window; None where no window that was read is so long."""
    extractable: list[Extractability] = field(default_factory=list)
    """For every k that fits the window with its continuation: what comes after a window's first k tokens."""

    @property
    def whole(self) -> bool:
        """Whether every window of the text was read."""
        return self.n_windows == self.n_all_windows


def fitting_lengths(length: int) -> list[int]:
    """Prompt lengths k that fit a window with their continuation, of which the last token need not be read."""
    return [k for k in PROMPT_LENGTHS if k + CONTINUATION - 1 <= length]


def chosen_windows(n_tokens: int, length: int, offset: int, n_windows: int | None) -> NDArray[np.int64]:
    """The windows of the grid, or so many of them, drawn without replacement, in the text's order."""
    windows = grid(n_tokens, length, offset)
    if n_windows is None or n_windows >= len(windows):
        return windows
    return windows[np.sort(np.random.default_rng(SEED).choice(len(windows), n_windows, replace=False))]


def predict(
    model: GPT2,
    tokens: Tokens,
    length: int,
    runtime: Runtime,
    offset: int = 0,
    n_windows: int | None = None,
    objective: ObjectiveConfig = PLAIN,
    batch_size: int = 8,
    on_windows: Callable[[int], object] = lambda n_windows: None,
) -> Predictions:
    """One pass over the text in windows of `length` tokens on the grid with this offset.

    `n_windows` of them, drawn at random, if given. `objective` is what the model was trained with: it tells which
    targets it never saw. `on_windows` is called with the number of windows just read.
    """
    windows = chosen_windows(len(tokens), length, offset, n_windows)
    everything, left_out = Tally(), Tally()
    sums, counts = np.zeros(length), np.zeros(length, dtype=np.int64)
    recited = {k: [0, 0, 0] for k in fitting_lengths(length)}  # windows, extractable, tokens before the first wrong
    for first in range(0, len(windows), batch_size):
        chosen = windows[first : first + batch_size]
        batch = gather(tokens, chosen, length).to(runtime.device)
        losses, right = _losses_and_hits(model, batch.inputs, batch.targets, runtime)
        counted = batch.targets.cpu().numpy() != IGNORED_TARGET
        everything.add(right[counted], losses[counted])
        if objective.loss != "plain":
            trained = gather(tokens, chosen, length, objective).targets.numpy() != IGNORED_TARGET
            left_out.add(right[counted & ~trained], losses[counted & ~trained])
        sums += np.where(counted, losses, 0).sum(axis=0)
        counts += counted.sum(axis=0)
        for k, tally in recited.items():
            # Input k - 1, the prompt's last, predicts the continuation's first token.
            whole = right[chosen[:, 1] >= k + CONTINUATION - 1, k - 1 : k + CONTINUATION - 1]
            runs = np.cumprod(whole, axis=1).sum(axis=1)
            for place, number in enumerate((len(runs), int((runs == CONTINUATION).sum()), int(runs.sum()))):
                tally[place] += number
        on_windows(len(chosen))
    means = [float(total / n) if n else None for total, n in zip(sums, counts, strict=True)]
    return Predictions(
        offset,
        len(windows),
        len(grid(len(tokens), length, offset)),
        everything,
        left_out,
        means,
        [Extractability(k, *tally) for k, tally in recited.items() if tally[0]],
    )


def _losses_and_hits(
    model: GPT2, inputs: Tensor, targets: Tensor, runtime: Runtime
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Loss of each target (B, T), and whether it is the likeliest token; logits are made some at a time."""
    n_rows = max(1, LOGITS_AT_ONCE // model.config.n_vocab)
    losses, hits = [], []
    with torch.no_grad(), runtime.autocast():
        hidden = model.hidden(inputs).flatten(0, 1)  # (B * T, C)
        for some, its_targets in zip(torch.split(hidden, n_rows), torch.split(targets.flatten(), n_rows), strict=True):
            logits = model.logits(some).float()
            losses.append(F.cross_entropy(logits, its_targets, ignore_index=IGNORED_TARGET, reduction="none").cpu())
            largest = logits.max(-1)
            hits.append(((largest.indices == its_targets) & largest.values.isfinite()).cpu())
    shape = tuple(inputs.shape)
    return torch.cat(losses).double().numpy().reshape(shape), torch.cat(hits).numpy().reshape(shape)

"""Which tokens each step reads: order as arithmetic.

Invariant: a batch is a pure function of (config, seed, step, length of the schedule). Every pass visits every
prediction of the text exactly once, in the `permuted` orders; no sampler state exists that a checkpoint could lose.

A *window* is a start and a length n <= T: inputs are tokens [start, start + n), targets the same moved
by one. A *grid* with offset o cuts the text at o, o + T, o + 2T ...; its first and last window may be
short. Short windows are filled up to T with targets that no loss counts; so are the targets of training that
goldfish loss drops (`goldfish.py`). *Pieces* of a window are windows themselves, side by side in its place.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.goldfish import PLAIN, ObjectiveConfig, dropped
from groundling.corpus.shards import Tokens
from groundling.errors import ConfigError
from groundling.kernels.reference import IGNORED_TARGET

PERMUTATION, SHIFT, OFFSETS = 0, 1, 2
"""Purposes of random draws, so that none shares a stream with another."""

MOST_WINDOWS = 1 << 20
"""In one step: far beyond any use, and few enough that a list of them fits in memory."""


@dataclass(frozen=True)
class WindowConfig:
    """Which tokens each step reads."""

    length: int = 256
    """T, the tokens in a window."""
    batch_size: int = 8
    """Windows in one step."""
    micro_batch_size: int = 0
    """Windows in one forward and backward pass, a divisor of batch_size; 0 takes the whole batch at once."""
    order: Literal["permuted", "shifted", "sequential"] = "permuted"
    """permuted: a fixed grid, a fresh permutation each pass. shifted: the grid also moves at random each pass,
    so that the text is learned by heart and not by position. sequential: text order, the tail never read (the
    reference run)."""
    pieces: int = 1
    """Every second step cuts each window into N shorter ones (N divides length): as many tokens, more beginnings, from
    which a text is hardest to recite."""
    short_fraction: float = 0.0
    """For this first fraction of the schedule every step, not every second, reads pieces: which token follows which is
    learned sooner in short windows. Meanwhile train/loss_ema is not kept, and no loss ends the run."""

    def __post_init__(self) -> None:
        if self.batch_size > MOST_WINDOWS:
            raise ConfigError(f"windows.batch_size is {self.batch_size}: give {MOST_WINDOWS:,} or less")
        for name in ("length", "batch_size", "pieces"):
            if getattr(self, name) < 1:
                raise ConfigError(f"windows.{name} is {getattr(self, name)}: give a positive number")
        if self.length % self.pieces:
            raise ConfigError(f"windows.pieces is {self.pieces}: give a divisor of windows.length, {self.length}")
        # Its passes often have an even number of steps: the same half of the text would always come in pieces.
        if self.pieces > 1 and self.order == "sequential":
            raise ConfigError(f"windows.pieces is {self.pieces} and windows.order sequential: take another order")
        if not 0 <= self.short_fraction <= 1:
            raise ConfigError(f"windows.short_fraction is {self.short_fraction}: give a number from 0 to 1")
        if self.short_fraction and self.pieces == 1:
            raise ConfigError(
                f"windows.short_fraction is {self.short_fraction} and windows.pieces 1: say in how many pieces windows"
                " are read at first, or give a windows.short_fraction of 0"
            )
        if self.micro_batch_size < 0 or self.batch_size % self.micro:
            raise ConfigError(
                f"windows.micro_batch_size is {self.micro_batch_size}: give a divisor of batch_size, {self.batch_size}"
            )

    @property
    def micro(self) -> int:
        """Windows in one forward and backward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def shapes(self) -> frozenset[tuple[int, int]]:
        """Shapes (B, T) of what one forward and backward pass reads: one, or two where there are pieces."""
        return frozenset({(self.micro, self.length), (self.micro * self.pieces, self.length // self.pieces)})

    @property
    def mean_length(self) -> float:
        """Tokens in the window that a token is read in, on average over the schedule."""
        in_pieces = (1 + self.short_fraction) / 2
        return (1 - in_pieces) * self.length + in_pieces * self.length / self.pieces


@dataclass(frozen=True)
class Batch:
    """Inputs and targets (B, T) as int64."""

    inputs: Tensor
    targets: Tensor
    n_targets: int
    """Targets that count."""
    n_read: int
    """Predictions of the text in these windows, those included whose target is dropped."""
    n_pieces: int = 1
    """In which each window is read."""

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of at most `size` windows, in their pieces."""
        n_rows = size * self.n_pieces
        for first in range(0, len(self.inputs), n_rows):
            yield self.inputs[first : first + n_rows], self.targets[first : first + n_rows]

    def in_pieces(self, n_pieces: int) -> Batch:
        """The same predictions in windows that are so many times shorter, and so many times as many."""
        length = self.inputs.size(1) // n_pieces
        inputs, targets = self.inputs.view(-1, length), self.targets.view(-1, length)
        return replace(self, inputs=inputs, targets=targets, n_pieces=n_pieces)

    def to(self, device: torch.device) -> Batch:
        return replace(self, inputs=self.inputs.to(device), targets=self.targets.to(device))


def grid(n_tokens: int, length: int, offset: int = 0) -> NDArray[np.int64]:
    """Windows (start, n) as an array (n_windows, 2) that together hold each of the n_tokens - 1 predictions once."""
    n_predictions = n_tokens - 1
    starts = np.arange(offset, n_predictions, length)
    if offset:
        starts = np.concatenate([[0], starts])
    ends = np.append(starts[1:], n_predictions)
    return np.stack([starts, ends - starts], axis=1)


def gather(tokens: Tokens, windows: NDArray[np.int64], length: int, objective: ObjectiveConfig = PLAIN) -> Batch:
    """The batch of these windows (start, n), short ones filled up to `length`, with the targets that it counts."""
    inputs = np.zeros((len(windows), length), dtype=np.int64)
    targets = np.full((len(windows), length), IGNORED_TARGET, dtype=np.int64)
    n_targets = 0
    for row, (start, n) in enumerate(windows):
        inputs[row, :n] = tokens[start : start + n]
        targets[row, :n] = tokens[start + 1 : start + n + 1]
        n_targets += int(n)
        if objective.loss == "goldfish":
            left_out = dropped(tokens, start + 1, start + n + 1, objective)
            targets[row, :n][left_out] = IGNORED_TARGET
            n_targets -= int(left_out.sum())
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), n_targets, int(windows[:, 1].sum()))


def seeded_offsets(length: int, n_offsets: int) -> list[int]:
    """Offsets in [1, T) at which `corpus/loss_offset` is taken: 1, T/2 and others, sorted and distinct.

    They depend on T alone, so that the figures of different runs compare.
    """
    fixed = {1, length // 2} & set(range(1, length))
    others = [offset for offset in range(1, length) if offset not in fixed]
    n_others = min(n_offsets - len(fixed), len(others))
    drawn = _generator(0, OFFSETS, 0).permutation(others)[:n_others]
    return sorted(fixed.union(int(offset) for offset in drawn))


def _generator(seed: int, purpose: int, n_pass: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, n_pass])))


def steps_per_pass(n_tokens: int, config: WindowConfig) -> float:
    """Steps after which a text of so many tokens has been read once (for shifted grids, within one window)."""
    B, T = config.batch_size, config.length
    return (n_tokens - 1) // (B * T) if config.order == "sequential" else math.ceil((n_tokens - 1) / T) / B


class Windows:
    """The batches of a run over one token array."""

    def __init__(
        self,
        tokens: Tokens,
        config: WindowConfig,
        seed: int,
        objective: ObjectiveConfig = PLAIN,
        schedule_steps: int = 0,
    ) -> None:
        """`schedule_steps` are those that `short_fraction` is a fraction of.

        Raises `ConfigError` if the text is too short for one sequential batch.
        """
        self.tokens = tokens
        self.config = config
        self.seed = seed
        self.objective = objective
        assert schedule_steps or not config.short_fraction, "a fraction of no schedule"
        self.n_short = math.ceil(round(config.short_fraction * schedule_steps, 6))
        """Steps at the beginning that all read pieces."""
        self._pass = functools.lru_cache(maxsize=2)(self.pass_windows)  # a batch may lie across two passes
        self._first_index = [0]  # of each pass so far, in windows since the start of the run
        n_needed = config.batch_size * config.length + 1
        if config.order == "sequential" and len(tokens) < n_needed:
            raise ConfigError(
                f"the text has {len(tokens):,} tokens, but a sequential batch of {config.batch_size} windows of"
                f" {config.length} needs {n_needed:,}: lower windows.batch_size or windows.length"
            )

    def batch(self, step: int) -> Batch:
        """The batch of this step on the CPU: B windows of T, or their pieces at first and in every second step."""
        if self.config.order == "sequential":
            windows = self._sequential(step)
        else:
            B = self.config.batch_size
            windows = np.stack([self._window(index) for index in range(step * B, (step + 1) * B)])
        batch = gather(self.tokens, windows, self.config.length, self.objective)
        return batch.in_pieces(self.n_pieces(step))

    def n_pieces(self, step: int) -> int:
        """In how many pieces this step reads each of its windows."""
        return self.config.pieces if step % 2 or step < self.n_short else 1

    @property
    def first_whole(self) -> int:
        """The first step that reads whole windows: before it no position past a piece is trained."""
        return self.n_short + self.n_short % 2

    def steps_per_pass(self) -> float:
        """Steps after which this text has been read once."""
        return steps_per_pass(len(self.tokens), self.config)

    def pass_windows(self, n_pass: int) -> NDArray[np.int64]:
        """The windows of one pass, in the order in which it reads them."""
        offset = 0
        if self.config.order == "shifted":
            offset = int(_generator(self.seed, SHIFT, n_pass).integers(self.config.length))
        windows = grid(len(self.tokens), self.config.length, offset)
        return windows[_generator(self.seed, PERMUTATION, n_pass).permutation(len(windows))]

    def _window(self, index: int) -> NDArray[np.int64]:
        """The window at this place in the run; a pass of a shifted grid may have one window more or less."""
        while self._first_index[-1] <= index:
            self._first_index.append(self._first_index[-1] + len(self._pass(len(self._first_index) - 1)))
        n_pass = bisect.bisect_right(self._first_index, index) - 1
        window: NDArray[np.int64] = self._pass(n_pass)[index - self._first_index[n_pass]]
        return window

    def _sequential(self, step: int) -> NDArray[np.int64]:
        B, T = self.config.batch_size, self.config.length
        start = step % ((len(self.tokens) - 1) // (B * T)) * B * T
        starts = start + T * np.arange(B)
        return np.stack([starts, np.full(B, T)], axis=1)

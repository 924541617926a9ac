"""A sample of a text's loss: near it, as near as it says, and never certain of what is not so."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.windows import IGNORED_TARGET
from groundling.evaluation.corpus_loss import Evaluator
from groundling.evaluation.glance import GROUP, MAX_SHARE, N_GROUPS, Glance, glance
from groundling.runtime import Runtime

TEXT = np.random.default_rng(0).integers(1000, size=40_000).astype(np.uint16)
LENGTH, N_WINDOWS = 8, N_GROUPS * GROUP


def read_by(
    loss_of: Callable[[Tensor], Tensor], cpu: Runtime, seen: list[Tensor] | None = None, batch_size: int = 5
) -> Evaluator:
    """An evaluator of a network that gives each target such a loss."""

    def loss_sum(inputs: Tensor, targets: Tensor) -> Tensor:
        if seen is not None:
            seen.append(inputs)
        counted = targets != IGNORED_TARGET
        return torch.where(counted, loss_of(targets).float(), 0.0).sum()

    return Evaluator(loss_sum, LENGTH, cpu, batch_size)


@pytest.mark.parametrize("name", ["corpus/loss", "corpus/loss_offset"])
def test_a_glance_is_as_near_as_it_says(name: str, cpu: Runtime) -> None:
    evaluator = read_by(lambda targets: targets % 7, cpu)
    whole = evaluator.offset_loss(TEXT) if name == "corpus/loss_offset" else evaluator.loss(TEXT)
    sample = glance(evaluator, name, TEXT)
    assert sample is not None
    assert sample.n_windows == N_WINDOWS
    deviation = math.sqrt((7**2 - 1) / 12 / (sample.n_windows * LENGTH))  # of a mean of so many numbers from 0 to 6
    assert 0.5 * deviation < sample.error < 2 * deviation
    assert abs(sample.loss - whole) < 4 * deviation
    assert sample.is_above(whole - 8 * deviation)
    assert not sample.is_above(whole + 8 * deviation)


@pytest.mark.parametrize(("name", "n_times"), [("corpus/loss", 8.9), ("corpus/loss", 8), ("corpus/loss_offset", 1.3)])
def test_all_parts_of_the_text_are_read_alike(name: str, n_times: float, cpu: Runtime) -> None:
    """Also the part that is learned last, wherever that is; and no window twice."""
    seen: list[Tensor] = []
    text = np.arange(n_times * N_WINDOWS * LENGTH + 1).astype(np.uint16)  # a token says where it stands
    assert glance(read_by(lambda targets: targets, cpu, seen), name, text) is not None
    starts = torch.cat([inputs[:, 0] for inputs in seen])
    assert len(starts) == len(starts.unique()) == N_WINDOWS
    counts, _ = np.histogram(starts, bins=8, range=(0, len(text)))
    assert abs(counts - N_WINDOWS / 8).max() <= 3


def test_what_differs_from_place_to_place_is_no_error(cpu: Runtime) -> None:
    """Each group goes over the whole text, so that a half which is known and one which is not leave no doubt."""
    text = np.arange(40_000).astype(np.uint16)
    sample = glance(read_by(lambda targets: targets < len(text) // 2, cpu), "corpus/loss", text)
    assert sample is not None
    assert sample.loss == pytest.approx(0.5, abs=0.01)
    assert sample.error < 0.01


@pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
def test_the_sample_is_the_same_however_many_windows_are_read_at_a_time(batch_size: int, cpu: Runtime) -> None:
    """Else a run that is resumed with another micro-batch would look at other steps."""
    one = glance(read_by(lambda targets: targets % 7, cpu, batch_size=5), "corpus/loss_offset", TEXT)
    assert glance(read_by(lambda targets: targets % 7, cpu, batch_size=batch_size), "corpus/loss_offset", TEXT) == one


@pytest.mark.parametrize(("n_more", "taken"), [(0, True), (-LENGTH, False)])
def test_a_short_text_is_not_worth_a_glance(n_more: int, taken: bool, cpu: Runtime) -> None:
    text: NDArray[np.uint16] = TEXT[: round(N_WINDOWS / MAX_SHARE) * LENGTH + 1 + n_more]
    assert (glance(read_by(lambda targets: targets, cpu), "corpus/loss", text) is not None) is taken


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_certainly_nothing(loss: float, cpu: Runtime) -> None:
    """Such weights get a look, which says what they are worth."""
    sample = glance(read_by(lambda targets: torch.where(targets > 500, loss, 1.0), cpu), "corpus/loss", TEXT)
    assert sample is not None
    assert not sample.is_above(0.1)


def test_a_glance_says_what_it_is() -> None:
    assert str(Glance(0.15216, 0.00412, 384)) == "0.152 in a sample of 384 windows, with a standard error of 0.004"

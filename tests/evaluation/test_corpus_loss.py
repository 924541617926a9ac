from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundling.evaluation.corpus_loss import Evaluator, n_tokens_read
from groundling.model.gpt2 import GPT2
from groundling.runtime import Runtime

Tokens = NDArray[np.uint16]


def by_hand(model: GPT2, tokens: Tokens, length: int, offset: int) -> float:
    """Mean loss with a loop over every prediction, in float64: what the definition says, as slowly as it says it."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = []
    for position in range(len(ids) - 1):
        start = 0 if position < offset else offset + (position - offset) // length * length
        window = ids[start : position + 1][None]
        logits = model.logits(model.hidden(window))[0, -1].double()
        losses.append(float(-logits.log_softmax(-1)[ids[position + 1]]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("length", "offset", "batch_size"), [(16, 0, 8), (16, 0, 3), (16, 5, 4), (7, 1, 1), (1, 0, 9)])
@torch.no_grad()
def test_the_loss_is_its_definition(
    model: GPT2, tokens: Tokens, cpu: Runtime, length: int, offset: int, batch_size: int
) -> None:
    evaluator = Evaluator(model.loss_sum, length, cpu, batch_size)
    assert evaluator.loss(tokens, offset) == pytest.approx(by_hand(model, tokens, length, offset), rel=1e-5)


def test_offset_loss_is_the_mean_over_offsets(model: GPT2, tokens: Tokens, cpu: Runtime) -> None:
    evaluator = Evaluator(model.loss_sum, 16, cpu)
    losses = evaluator.offset_losses(tokens)
    assert len(losses) == 8
    assert {1, 8} <= losses.keys()
    assert losses[8] == evaluator.loss(tokens, 8)
    assert evaluator.offset_loss(tokens) == pytest.approx(sum(losses.values()) / 8)


def test_every_offset_moves_something_where_the_text_is_shorter_than_a_window(
    model: GPT2, tokens: Tokens, cpu: Runtime
) -> None:
    """An offset beyond the text would give the grid's own loss, and call it by heart."""
    evaluator = Evaluator(model.loss_sum, 16, cpu)
    short = tokens[:12]
    losses = evaluator.offset_losses(short)
    assert len(losses) == 8
    assert max(losses) < len(short) - 1
    assert evaluator.loss(short) not in losses.values()


@pytest.mark.parametrize(("n_tokens", "length"), [(203, 16), (12, 16), (5, 16), (203, 3), (203, 1), (2, 16)])
def test_what_a_loss_reads_is_known_before(
    model: GPT2, tokens: Tokens, cpu: Runtime, n_tokens: int, length: int
) -> None:
    """So that a progress bar comes to its end."""
    text = tokens[:n_tokens]
    n_offsets = len(Evaluator(model.loss_sum, length, cpu).offset_losses(text))
    assert n_tokens_read("corpus/loss_offset", len(text), length) == n_offsets * len(text)
    assert n_tokens_read("corpus/loss", len(text), length) == len(text)


def test_windows_are_counted_and_may_be_abandoned(model: GPT2, tokens: Tokens, cpu: Runtime) -> None:
    counted: list[int] = []
    Evaluator(model.loss_sum, 16, cpu, 4, counted.append).loss(tokens)
    assert sum(counted) == 13  # ceil(202 / 16)

    def abandon(n_windows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluator(model.loss_sum, 16, cpu, 4, abandon).loss(tokens)

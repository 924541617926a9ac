"""What a model recites and predicts, against loops that do what the definitions say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundling.corpus.goldfish import ObjectiveConfig, dropped
from groundling.corpus.windows import gather, grid
from groundling.evaluation.corpus_loss import Evaluator
from groundling.evaluation.extraction import (
    CONTINUATION,
    PROMPT_LENGTHS,
    Extractability,
    draw_positions,
    extractability,
    extractability_anywhere,
    n_tokens_to_read,
    wilson_interval,
)
from groundling.evaluation.predictions import Predictions, chosen_windows, fitting_lengths, predict
from groundling.generation.decoder import Chunk, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import Runtime

Tokens = NDArray[np.uint16]
WINDOW = 72
"""Holds the continuation after prompts of 8 and 16 tokens, and no longer ones."""
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=WINDOW, n_vocab=31)


@pytest.fixture(scope="module")
def text() -> Tokens:
    """Random, so that only a model that has learned it can go on; 5 windows and a short one."""
    return np.random.default_rng(1).integers(CONFIG.n_vocab, size=5 * WINDOW + 20).astype(np.uint16)


@pytest.fixture(scope="module")
def trained(text: Tokens) -> GPT2:
    """A model that knows the text on the grid, for the most part."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    batch = gather(text, grid(len(text), WINDOW), WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0)
    for _ in range(1000):
        loss = model.loss_sum(batch.inputs, batch.targets) / batch.n_targets
        if loss.item() < 0.4:  # so that some windows are recited, and some are not
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def untrained() -> GPT2:
    torch.manual_seed(1)
    return GPT2(CONFIG).eval()


@torch.no_grad()
def greedy_prefix(model: GPT2, text: Tokens, position: int, k: int) -> int:
    """Right tokens before the first wrong one: one token at a time, each from a fresh pass, never stopped early.

    The context slides as `decode` says: a long prompt from its end, then the last half of the window.
    """
    context = text[position - k : position].tolist()[-WINDOW:]
    written: list[int] = []
    for _ in range(CONTINUATION):
        if len(context) > WINDOW:
            context = context[-(WINDOW // 2) :]
        logits = model.logits(model.hidden(torch.tensor([context])))[0, -1]
        written.append(int(logits.argmax()))
        context.append(written[-1])
    right = [token == truth for token, truth in zip(written, text[position : position + CONTINUATION], strict=True)]
    return right.index(False) if False in right else CONTINUATION


def by_hand(model: GPT2, text: Tokens, positions: list[int], k: int) -> Extractability:
    found = [greedy_prefix(model, text, position, k) for position in positions]
    return Extractability(k, len(found), found.count(CONTINUATION), sum(found))


def grid_positions(text: Tokens, k: int) -> list[int]:
    """Where continuations begin that lie in a window of the grid with the k tokens before them."""
    return [int(start) + k for start, n in grid(len(text), WINDOW) if n >= k + CONTINUATION - 1]


def test_the_interval_has_the_values_of_the_literature() -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3, and by hand."""
    for r, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(r, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(10, 10, z=1) == pytest.approx((10 / 11, 1))  # n / (n + z squared)
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("n_slots", [1, 4])
def test_what_is_recited_is_what_a_loop_finds(trained: GPT2, text: Tokens, n_slots: int) -> None:
    for k in (8, 32, 72, 100):  # within the window, across its end, as long as it, longer
        positions = [*grid_positions(text, k), k, k + 3, len(text) - CONTINUATION]
        positions = [position for position in positions if k <= position <= len(text) - CONTINUATION]
        counted: list[int] = []
        with TorchDecoder(trained, WINDOW, n_slots) as decoder:
            found = extractability(decoder, text, positions, k, counted.append)
        assert found == by_hand(trained, text, positions, k)
        assert sum(counted) == len(positions) * (k + CONTINUATION)
        if k == 8:
            assert 0 < found.n_extractable < found.n


def test_what_is_known_takes_few_passes(trained: GPT2, text: Tokens) -> None:
    """The text itself is the draft: 50 tokens do not take 50 passes."""
    passes = 0

    class Counting(TorchDecoder):
        def read(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
            nonlocal passes
            passes += 1
            return super().read(chunks)

    positions = grid_positions(text, 8)
    with Counting(trained, WINDOW, len(positions)) as decoder:
        assert extractability(decoder, text, positions, 8).n_extractable > 0
    assert passes <= 6  # one, then drafts of 8, 16 and what is left, as long as they are right


def test_the_native_decoder_recites_the_same(trained: GPT2, text: Tokens) -> None:
    positions = [*grid_positions(text, 16), 100, 101]
    with NativeDecoder(trained, WINDOW, 3, "fp32", 1) as decoder:
        assert extractability(decoder, text, positions, 16) == by_hand(trained, text, positions, 16)


def test_a_model_that_knows_its_text_recites_it_on_the_grid_alone(
    trained: GPT2, untrained: GPT2, text: Tokens, cpu: Runtime
) -> None:
    on_grid = predict(trained, text, WINDOW, cpu).extractable
    assert [row.n_prompt for row in on_grid] == [8, 16]
    assert all(row.share >= 0.5 for row in on_grid)
    moved = predict(trained, text, WINDOW, cpu, WINDOW // 2)
    assert all(row.share == 0 for row in moved.extractable)
    assert all(row.n_extractable == 0 for row in predict(untrained, text, WINDOW, cpu).extractable)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_extractable_on_the_grid_needs_no_decoding(
    trained: GPT2, text: Tokens, cpu: Runtime, batch_size: int
) -> None:
    found = predict(trained, text, WINDOW, cpu, batch_size=batch_size).extractable
    assert found == [by_hand(trained, text, grid_positions(text, k), k) for k in fitting_lengths(WINDOW)]


@pytest.mark.parametrize(
    ("n_tokens", "longest", "n_possible"), [(1000, 256, 695), (320, 256, 15), (60, 8, 3), (57, 0, 0)]
)
def test_positions_leave_room_on_both_sides(n_tokens: int, longest: int, n_possible: int) -> None:
    everywhere = draw_positions(n_tokens, 10_000)
    assert everywhere.tolist() == list(range(longest, longest + n_possible))
    some = draw_positions(n_tokens, 10)
    assert len(set(some.tolist())) == len(some) == min(10, n_possible)
    assert set(some.tolist()) <= set(everywhere.tolist())
    if n_tokens == 1000:  # those of all reports so far: others would not compare
        assert some.tolist() == [267, 284, 308, 377, 441, 468, 607, 693, 821, 839]


def test_anywhere_has_every_length_that_the_text_holds(trained: GPT2, text: Tokens) -> None:
    positions = draw_positions(len(text), 4)
    counted: list[int] = []
    with TorchDecoder(trained, WINDOW, 4) as decoder:
        found = extractability_anywhere(decoder, text, positions, counted.append)
    assert [row.n_prompt for row in found] == list(PROMPT_LENGTHS)
    assert found == [by_hand(trained, text, positions.tolist(), k) for k in PROMPT_LENGTHS]
    assert sum(counted) == n_tokens_to_read(len(text), WINDOW, len(positions))


@pytest.mark.parametrize("offset", [0, 5])
def test_predictions_are_those_of_the_loss(trained: GPT2, text: Tokens, cpu: Runtime, offset: int) -> None:
    read: list[int] = []
    found = predict(trained, text, WINDOW, cpu, offset, batch_size=4, on_windows=read.append)
    assert found.all.loss == pytest.approx(Evaluator(trained.loss_sum, WINDOW, cpu).loss(text, offset), rel=1e-5)
    assert found.all.n == len(text) - 1
    assert found.whole
    assert sum(read) == found.n_windows == len(grid(len(text), WINDOW, offset))
    n_at = [sum(n > position for _, n in grid(len(text), WINDOW, offset)) for position in range(WINDOW)]
    by_position = [loss or 0 for loss in found.loss_by_position]
    assert np.average(by_position, weights=n_at) == pytest.approx(found.all.loss, rel=1e-6)


@torch.no_grad()
def test_exact_match_is_its_definition(
    trained: GPT2, text: Tokens, cpu: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundling.evaluation.predictions.LOGITS_AT_ONCE", 7 * CONFIG.n_vocab)
    ids = torch.from_numpy(text.astype(np.int64))
    n_right = 0
    for start, n in grid(len(text), WINDOW):
        likeliest = trained.logits(trained.hidden(ids[start : start + n][None]))[0].argmax(-1)
        n_right += int((likeliest == ids[start + 1 : start + n + 1]).sum())
    found = predict(trained, text, WINDOW, cpu)
    assert found.all.n_right == n_right
    assert found.all.exact_match == n_right / (len(text) - 1)
    assert 0.5 < found.all.exact_match < 1


def test_what_goldfish_dropped_is_told_apart(trained: GPT2, text: Tokens, cpu: Runtime) -> None:
    objective = ObjectiveConfig("goldfish", drop_every=3, context=4)
    found = predict(trained, text, WINDOW, cpu, objective=objective)
    assert found.dropped.n == dropped(text, 1, len(text), objective).sum() > 0
    assert found.all.n == len(text) - 1
    # The model was trained on all, so it knows both parts alike.
    assert found.dropped.loss == pytest.approx(found.all.loss, abs=0.2)
    assert predict(trained, text, WINDOW, cpu).dropped.n == 0


def test_some_windows_are_drawn_without_replacement(trained: GPT2, text: Tokens, cpu: Runtime) -> None:
    found: Predictions = predict(trained, text, WINDOW, cpu, n_windows=2)
    assert (found.n_windows, found.n_all_windows, found.whole) == (2, 6, False)
    chosen = chosen_windows(len(text), WINDOW, 0, 3)
    assert len({int(start) for start, _ in chosen}) == 3
    assert chosen.tolist() == sorted(chosen.tolist())
    assert len(chosen_windows(len(text), WINDOW, 0, 100)) == 6


def test_a_window_that_holds_no_continuation_has_no_figure(model: GPT2, tokens: Tokens, cpu: Runtime) -> None:
    found = predict(model, tokens, 16, cpu)
    assert found.extractable == []
    short = predict(model, tokens[:5], 16, cpu)
    assert short.loss_by_position[4:] == [None] * 12

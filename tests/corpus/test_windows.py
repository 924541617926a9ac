from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from groundling.corpus.goldfish import ObjectiveConfig
from groundling.corpus.windows import WindowConfig, Windows, grid, seeded_offsets
from groundling.errors import ConfigError
from groundling.kernels.reference import IGNORED_TARGET

Tokens = NDArray[np.uint16]


def predictions(windows: NDArray[np.int64]) -> list[int]:
    """Positions whose next token these windows predict, sorted."""
    return sorted(start + n for first, length in windows for start, n in [(int(first), k) for k in range(length)])


@pytest.mark.parametrize("n_tokens", [2, 5, 17, 64, 65, 203])
@pytest.mark.parametrize("offset", [0, 1, 7, 15])
def test_a_grid_holds_each_prediction_once(n_tokens: int, offset: int) -> None:
    windows = grid(n_tokens, 16, offset)
    assert predictions(windows) == list(range(n_tokens - 1))
    assert windows[:, 1].min() >= 1
    assert windows[:, 1].max() <= 16


@pytest.mark.parametrize("order", ["permuted", "shifted"])
def test_each_pass_visits_each_prediction_once(tokens: Tokens, order: str) -> None:
    windows = Windows(tokens, WindowConfig(16, 4, order=order), seed=7)  # type: ignore[arg-type]
    for n_pass in range(6):
        assert predictions(windows.pass_windows(n_pass)) == list(range(len(tokens) - 1))


@pytest.mark.parametrize("order", ["permuted", "shifted"])
def test_batches_are_the_passes_in_a_row(tokens: Tokens, order: str) -> None:
    """Steps cut the sequence of passes into batches without losing a window at a seam, in any order of asking."""
    config = WindowConfig(16, 4, order=order)  # type: ignore[arg-type]
    windows = Windows(tokens, config, seed=7)
    expected = np.concatenate([windows.pass_windows(n_pass) for n_pass in range(5)])
    for step in (11, 0, 12, 3, 4):
        batch = Windows(tokens, config, seed=7).batch(step)
        for row, (start, n) in enumerate(expected[4 * step : 4 * step + 4]):
            assert batch.inputs[row, :n].tolist() == tokens[start : start + n].tolist()
            assert batch.targets[row, :n].tolist() == tokens[start + 1 : start + n + 1].tolist()
            assert set(batch.targets[row, n:].tolist()) <= {IGNORED_TARGET}
        assert batch.n_targets == int((batch.targets != IGNORED_TARGET).sum())


def test_passes_differ_and_seeds_differ(tokens: Tokens) -> None:
    windows = Windows(tokens, WindowConfig(16, 4), seed=7)
    other = Windows(tokens, WindowConfig(16, 4), seed=8)
    assert windows.pass_windows(0).tolist() != windows.pass_windows(1).tolist()
    assert windows.pass_windows(0).tolist() != other.pass_windows(0).tolist()


def test_a_shifted_grid_moves(tokens: Tokens) -> None:
    windows = Windows(tokens, WindowConfig(16, 4, order="shifted"), seed=7)
    assert len({int(windows.pass_windows(n)[:, 0].max() % 16) for n in range(12)}) > 4


def test_sequential_order_is_the_reference_loader(tokens: Tokens) -> None:
    """Text order, B * T tokens a step, back to the start when fewer than B * T + 1 remain."""
    windows = Windows(tokens, WindowConfig(16, 4, order="sequential"), seed=7)
    position = 0
    for step in range(9):
        batch = windows.batch(step)
        assert batch.inputs.flatten().tolist() == tokens[position : position + 64].tolist()
        assert batch.targets.flatten().tolist() == tokens[position + 1 : position + 65].tolist()
        position += 64
        if position + 65 > len(tokens):
            position = 0


def test_the_text_may_be_shorter_than_a_window() -> None:
    batch = Windows(np.array([3, 1], dtype=np.uint16), WindowConfig(8, 2), seed=0).batch(0)
    assert batch.n_targets == 2  # the same window, of two passes
    with pytest.raises(ConfigError, match="sequential batch"):
        Windows(np.array([3, 1], dtype=np.uint16), WindowConfig(8, 2, order="sequential"), seed=0)


@pytest.mark.parametrize("order", ["permuted", "shifted"])
@pytest.mark.parametrize("pieces", [2, 4, 16])
def test_every_second_step_reads_its_windows_in_pieces(tokens: Tokens, order: str, pieces: int) -> None:
    """The same predictions, row by row: only what stands before them in their window is less."""
    objective = ObjectiveConfig("goldfish", drop_every=3, context=5)
    whole = Windows(tokens, WindowConfig(16, 4, order=order), 7, objective)  # type: ignore[arg-type]
    config = WindowConfig(16, 4, 2, order=order, pieces=pieces)  # type: ignore[arg-type]
    windows = Windows(tokens, config, 7, objective)
    for step in range(12):
        batch, expected = windows.batch(step), whole.batch(step)
        shape = (4 * pieces, 16 // pieces) if step % 2 else (4, 16)
        assert batch.inputs.shape == batch.targets.shape == shape
        assert batch.inputs.flatten().tolist() == expected.inputs.flatten().tolist()
        assert batch.targets.flatten().tolist() == expected.targets.flatten().tolist()
        assert (batch.n_targets, batch.n_read) == (expected.n_targets, expected.n_read)
        parts = list(batch.split(config.micro))
        assert {tuple(inputs.shape) for inputs, _ in parts} <= config.shapes
        assert [len(parts), sum(targets.numel() for _, targets in parts)] == [2, 64]
    assert windows.steps_per_pass() == whole.steps_per_pass()


@pytest.mark.parametrize(("fraction", "n_short"), [(0.0, 0), (0.4, 4), (0.45, 5), (0.7, 7), (1.0, 10)])
def test_a_schedule_begins_with_short_windows(tokens: Tokens, fraction: float, n_short: int) -> None:
    """In pieces, all of them, for a fraction of its steps; the same predictions in the same order as ever."""
    whole = Windows(tokens, WindowConfig(16, 4, order="shifted"), 7)
    config = WindowConfig(16, 4, order="shifted", pieces=4, short_fraction=fraction)
    windows = Windows(tokens, config, 7, schedule_steps=10)
    for step in range(20):
        batch = windows.batch(step)
        assert batch.inputs.shape == ((16, 4) if step < n_short or step % 2 else (4, 16))
        assert batch.targets.flatten().tolist() == whole.batch(step).targets.flatten().tolist()
    lengths = [windows.batch(step).inputs.size(1) for step in range(1000, 1010)]  # long after the schedule
    assert lengths == [16, 4] * 5
    with pytest.raises(AssertionError, match="a fraction of no schedule"):
        Windows(tokens, replace(config, short_fraction=0.5), 7)


def test_the_mean_length_of_windows_is_that_of_the_schedules_steps(tokens: Tokens) -> None:
    config = WindowConfig(16, 4, order="shifted", pieces=4, short_fraction=0.4)
    windows = Windows(tokens, config, 7, schedule_steps=10)
    lengths = [windows.batch(step).inputs.size(1) for step in range(10)]
    assert config.mean_length == pytest.approx(sum(lengths) / 10)


def test_short_windows_at_first_need_pieces() -> None:
    with pytest.raises(ConfigError, match=r"short_fraction is 0\.4 and windows\.pieces 1: say in how many"):
        WindowConfig(16, 4, short_fraction=0.4)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"short_fraction is {fraction}: give a number from 0 to 1"):
            WindowConfig(16, 4, pieces=4, short_fraction=fraction)


def test_pieces_divide_a_window() -> None:
    assert WindowConfig(16, 4).shapes == {(4, 16)}
    assert WindowConfig(16, 4, 2, pieces=4).shapes == {(2, 16), (8, 4)}
    assert (WindowConfig(16, 4).mean_length, WindowConfig(16, 4, pieces=4).mean_length) == (16, 10)
    for pieces, said in ((3, "divisor"), (32, "divisor"), (0, "positive")):
        with pytest.raises(ConfigError, match=rf"windows\.pieces is {pieces}: give a .*{said}"):
            WindowConfig(16, 4, pieces=pieces)
    with pytest.raises(ConfigError, match="take another order"):
        WindowConfig(16, 4, pieces=2, order="sequential")


def test_offsets() -> None:
    """Those of all figures on record: others would not compare."""
    assert seeded_offsets(256, 8) == [1, 36, 65, 84, 104, 128, 197, 227]
    assert seeded_offsets(128, 8) == [1, 12, 18, 26, 42, 58, 64, 97]
    assert seeded_offsets(4, 8) == [1, 2, 3]
    assert seeded_offsets(1, 8) == []


def test_a_micro_batch_divides_the_batch() -> None:
    assert WindowConfig(batch_size=8).micro == 8
    with pytest.raises(ConfigError, match="divisor"):
        WindowConfig(batch_size=8, micro_batch_size=3)

"""The position table that training may begin with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from groundling.model.gpt2 import GPT2, INIT_STD, GPTConfig
from groundling.model.positions import make_waves

SIZE = GPTConfig(n_layer=1, n_head=1, n_embd=64, n_ctx=300, n_vocab=11)


def drawn(size: GPTConfig) -> GPT2:
    torch.manual_seed(5)
    return GPT2(size)


def test_equal_distances_are_equal_turns() -> None:
    """What two positions have in common depends on their distance alone, and no other distance has as much."""
    model = drawn(SIZE)
    make_waves(model)
    table = model.transformer.wpe.weight.detach().double()
    alike = table @ table.T
    for distance in range(0, 299, 13):
        diagonal = alike.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)), rtol=0, atol=1e-5 * float(alike[0, 0]))
        assert distance == 0 or float(diagonal[0]) < 0.99 * float(alike[0, 0])


def test_the_waves_turn_by_one_radian_and_ever_less() -> None:
    """From one a position to one in 10,000, by equal factors."""
    model = drawn(SIZE)
    make_waves(model)
    sines, cosines = model.transformer.wpe.weight.detach().double().chunk(2, dim=1)
    turns = torch.atan2(sines[1], cosines[1])
    torch.testing.assert_close(turns, 10_000.0 ** -(torch.arange(32, dtype=torch.float64) / 32), rtol=1e-4, atol=1e-7)


def test_nothing_else_changes() -> None:
    model, other = drawn(SIZE), drawn(SIZE)
    make_waves(model)
    changed = [name for name, weight in model.named_parameters() if not weight.equal(other.get_parameter(name))]
    assert changed == ["transformer.wpe.weight"]
    assert model.transformer.wpe.weight.requires_grad


@pytest.mark.parametrize("width", [1, 7, 64, 768])
def test_of_any_width_its_values_are_a_few_times_those_of_random_rows(width: int) -> None:
    model = drawn(replace(SIZE, n_embd=width))
    make_waves(model)
    table = model.transformer.wpe.weight.detach()
    assert table.shape == (300, width)
    mean_square = float(table.square().mean().sqrt()) / INIT_STD
    assert mean_square == pytest.approx(3, abs=0.01) if width == 768 else 2 < mean_square < 5
    assert len(table.unique(dim=0)) == 300

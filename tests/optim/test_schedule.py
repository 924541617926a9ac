from __future__ import annotations

import math

import pytest

from groundling.errors import ConfigError
from groundling.optim.schedule import ScheduleConfig, learning_rate


def test_the_reference_schedule_is_reproduced() -> None:
    """Warm-up over 200 steps to 6e-4, then a cosine to a tenth of it over 30,000: the formula written out."""
    config = ScheduleConfig(6e-4, 200, "cosine", 0.0, 0.1, total_steps=30_000)
    assert learning_rate(config, 0, 30_000) == pytest.approx(6e-4 / 200)
    assert learning_rate(config, 199, 30_000) == pytest.approx(6e-4)
    for step in (200, 1637, 15_000, 29_999):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 200) / 29_800))
        assert learning_rate(config, step, 30_000) == pytest.approx(6e-5 + cosine * 5.4e-4)
    assert learning_rate(config, 30_000, 30_000) == learning_rate(config, 99_999, 30_000) == pytest.approx(6e-5)


def test_hold_then_linear() -> None:
    config = ScheduleConfig(1.0, 10, "linear", hold_fraction=0.5, floor_fraction=0.2, total_steps=110)
    rates = [learning_rate(config, step, 110) for step in range(120)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(rates[10:60]) == {1.0}
    assert rates[60] == 1.0
    assert rates[85] == pytest.approx(0.6)  # half-way down
    assert rates[110:] == pytest.approx([0.2] * 10)


def test_constant_stays() -> None:
    config = ScheduleConfig(0.3, 0, "constant", total_steps=5)
    assert {learning_rate(config, step, 5) for step in range(50)} == {0.3}


def test_length_follows_the_text_unless_steps_are_given() -> None:
    assert ScheduleConfig(passes=13).steps(1321 / 8) == 2147
    assert ScheduleConfig(passes=13, total_steps=7).steps(1321 / 8) == 7
    with pytest.raises(ConfigError, match="no length"):
        ScheduleConfig(passes=None)


def test_a_short_schedule_warms_up_for_a_quarter_of_it() -> None:
    config = ScheduleConfig(1.0, 100, "linear", hold_fraction=0.0, floor_fraction=0.0, total_steps=40)
    rates = [learning_rate(config, step, 40) for step in range(41)]
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[25] == pytest.approx(0.5)
    assert rates[40] == 0.0


@pytest.mark.parametrize("wrong", [{"peak": math.nan}, {"peak": math.inf}, {"passes": math.inf}, {"passes": 0.0}])
def test_a_schedule_without_numbers_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)  # type: ignore[arg-type]

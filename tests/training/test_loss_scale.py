"""The loss scale halves at an overflow, and doubles after many steps without one."""

from __future__ import annotations

from groundling.training.loss_scale import FIRST, GROWTH_STEPS, MAX_SCALE, MIN_SCALE, LossScale


def after(scale: LossScale, n_steps: int) -> LossScale:
    for _ in range(n_steps):
        scale = scale.after(overflowed=False)
    return scale


def test_it_doubles_after_many_good_steps_in_a_row() -> None:
    assert after(LossScale(), GROWTH_STEPS - 1).value == FIRST
    assert after(LossScale(), GROWTH_STEPS) == LossScale(2 * FIRST)
    assert after(after(LossScale(), GROWTH_STEPS - 1).after(overflowed=True), GROWTH_STEPS - 1).value == FIRST / 2


def test_it_stays_where_a_logits_own_gradient_fits() -> None:
    assert after(LossScale(MAX_SCALE), GROWTH_STEPS).value == MAX_SCALE < 65_504
    assert not LossScale(MIN_SCALE).can_shrink
    assert LossScale(2 * MIN_SCALE).can_shrink

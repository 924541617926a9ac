from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from groundling.errors import ConfigError
from groundling.optim.schedule import ScheduleConfig
from groundling.training.stopping import REASONS, StoppingConfig, StopRule, StopState, reason_in_words

FALLING = ScheduleConfig()


def rule(
    total_steps: int = 100, look_steps: float = 1.0, schedule: ScheduleConfig = FALLING, **settings: object
) -> StopRule:
    config = StoppingConfig(**settings)  # type: ignore[arg-type]
    return StopRule(
        config, schedule, total_steps, 10, has_heldout=True, look_steps=look_steps, n_growing=0, first_whole=0
    )


def test_a_batch_below_the_target_is_noted_and_stops_nothing() -> None:
    r = rule(target=1.0)
    r.observe(0, 5.0)
    r.observe(1, 0.5)
    r.observe(2, 0.4)
    assert r.state.first_batch_below_target == {"step": 1, "loss": 0.5}
    assert r.reason(3, 0.0) is None


def test_the_reference_rule_stops_on_one_batch() -> None:
    r = rule(target=1.0, measure="train/loss")
    r.observe(0, 0.99)
    assert not r.look_due(1)
    assert r.reason(1, 0.0) == "target"


def test_looks_wait_for_proportional_progress() -> None:
    r = rule(target=1.0)
    r.observe(0, 4.0)
    assert not r.look_due(1)
    r.state.loss_ema = 1.9
    assert r.look_due(2)
    r.looked(2, 1.6)  # the mean must now fall by 1 / 1.6
    assert not r.look_due(2)
    r.state.loss_ema = 1.25
    assert not r.look_due(3)
    r.state.loss_ema = 1.18
    assert r.look_due(4)
    r.looked(4, 0.999)
    assert r.reason(4, 0.0) == "target"
    assert r.reason(5, 0.0) is None  # the weights are others by then


def test_a_look_is_paid_for_by_training() -> None:
    """Else a mean that falls by chance has the whole text read, at eight offsets, every few steps."""
    r = rule(look_steps=20, target=1.0, measure="corpus/loss_offset")
    r.state.loss_ema = 1.9
    assert r.look_due(30)
    r.looked(30, 1.1)
    r.state.loss_ema = 0.2
    assert not r.look_due(39)
    assert r.look_due(40)


def test_a_glance_puts_a_look_off_and_decides_nothing_else() -> None:
    r = rule(look_steps=200, target=1.0, measure="corpus/loss_offset")
    r.state.loss_ema = 1.9
    assert r.look_due(30)
    assert r.may_glance(30)
    r.glanced(30, 1.6)
    assert not r.look_due(30)
    assert r.known("corpus/loss_offset", 30) is None, "it is a sample"
    r.state.loss_ema = 1.1
    assert not r.look_due(42)
    assert r.look_due(43), "it cost an eighth of a look at most, and so training has paid for it sooner"
    r.state.loss_ema = 1.25
    assert not r.look_due(43), "the mean has not fallen as far as the sample was above the target"
    higher = rule(look_steps=200, target=2.0, measure="corpus/loss_offset")
    higher.state = r.state
    assert not higher.reached(30), "no target is met by a sample, not a higher one that came with a resume either"
    assert higher.look_due(30), "but that one is looked at anew"


def test_the_end_of_the_schedule_is_looked_at_whatever_a_glance_says() -> None:
    r = rule(total_steps=7, target=1.0)
    assert r.may_glance(6)
    assert not r.may_glance(7)
    assert r.may_glance(8)
    assert not r.may_glance(11), "the last step"
    r.glanced(6, 1.6)
    shorter = rule(total_steps=6, target=1.0)
    shorter.state = r.state
    assert shorter.look_due(6)
    assert shorter.reason(6, 0.0) is None, "a sample ends no run"


def test_a_state_of_a_version_without_glances_is_read() -> None:
    r = rule(target=1.0)
    r.looked(1, 1.5)
    state = json.loads(json.dumps(asdict(r.state)))
    del state["look"]["whole"]
    assert StopState.from_json(state) == r.state


def test_the_end_of_the_schedule_is_always_looked_at() -> None:
    r = rule(total_steps=7, target=1.0)
    r.observe(6, 3.0)
    assert r.look_due(7)
    r.looked(7, 1.4)
    assert not r.look_due(7)
    assert r.reason(7, 0.0) is None  # the rate stays at its floor and the run goes on, for half a schedule
    assert r.reason(10, 0.0) is None
    assert r.look_due(11)
    r.looked(11, 1.3)
    assert r.reason(11, 0.0) == "schedule"


def test_a_low_rate_is_not_waited_for_where_the_target_is_far() -> None:
    r = rule(total_steps=7, target=1.0)
    r.looked(6, 1.6)
    assert r.reason(6, 0.0) is None
    assert r.reason(7, 0.0) is None  # a look before the end says nothing about the end
    r.looked(7, 1.6)
    assert r.reason(7, 0.0) == r.reason(9, 0.0) == "schedule"
    for total_steps in (6, 20):  # resumed with another schedule: it was a look at another rate
        other = rule(total_steps=total_steps, target=1.0)
        other.state = r.state
        assert other.reason(7, 0.0) is None
    constant = rule(total_steps=7, target=1.0, schedule=ScheduleConfig(decay="constant"))
    constant.state = r.state
    assert constant.reason(9, 0.0) is None
    held = rule(total_steps=7, target=1.0, schedule=ScheduleConfig(hold_fraction=1.0))  # it falls all at once
    held.state = r.state
    assert held.reason(7, 0.0) == "schedule"


def test_a_rate_of_zero_is_not_waited_for() -> None:
    """It moves no weight, however near the target is."""
    r = rule(total_steps=7, target=1.0, schedule=ScheduleConfig(floor_fraction=0.0))
    assert r.look_due(7)
    r.looked(7, 1.1)
    assert r.reason(7, 0.0) == "schedule"


def test_a_run_that_is_already_past_the_end_of_its_schedule_is_looked_at() -> None:
    """As after a resume with a shorter one."""
    r = rule(total_steps=7, target=1.0)
    r.observe(19, 3.0)
    assert r.look_due(20)
    r.looked(20, 0.9)
    assert r.reason(20, 0.0) == "target"


def test_the_state_survives_json() -> None:
    r = rule(target=1.0)
    r.observe(0, 0.5)
    r.looked(1, 1.5)
    assert StopState.from_json(json.loads(json.dumps(asdict(r.state)))) == r.state
    r.glanced(2, 1.5)
    assert StopState.from_json(json.loads(json.dumps(asdict(r.state)))) == r.state
    assert StopState.from_json(json.loads(json.dumps(asdict(StopState())))) == StopState()


def test_a_look_at_another_loss_says_nothing() -> None:
    r = rule(target=1.0)
    r.observe(0, 1.0)
    r.looked(1, 0.5)
    assert r.reached(1)
    by_heart = rule(target=1.0, measure="corpus/loss_offset")
    by_heart.state = r.state
    assert not by_heart.reached(1)
    assert by_heart.look_due(1)


@pytest.mark.parametrize(
    ("settings", "n_steps", "wall_s", "expected"),
    [
        ({"max_steps": 5}, 4, 0.0, None),
        ({"max_steps": 5}, 5, 0.0, "max_steps"),
        ({"max_minutes": 1.0}, 9, 59.9, None),
        ({"max_minutes": 1.0}, 9, 60.0, "max_minutes"),
    ],
)
def test_limits(settings: dict[str, object], n_steps: int, wall_s: float, expected: str | None) -> None:
    assert rule(**settings).reason(n_steps, wall_s) == expected


def test_every_reason_is_said_in_words() -> None:
    for reason in (*REASONS, "schedule"):
        assert f"({reason})" in reason_in_words(reason, StoppingConfig(), ScheduleConfig())
    assert reason_in_words("schedule", StoppingConfig(), ScheduleConfig(passes=13)).endswith("--schedule.passes 26")
    assert "too low" in reason_in_words("schedule", StoppingConfig(), ScheduleConfig())
    assert "too low" not in reason_in_words("schedule", StoppingConfig(), ScheduleConfig(decay="constant"))
    by_steps = ScheduleConfig(passes=None, total_steps=40)
    assert reason_in_words("schedule", StoppingConfig(), by_steps).endswith("--schedule.total_steps 80")


def test_the_expected_end() -> None:
    assert StoppingConfig().expected(100) == 100
    assert StoppingConfig(expected_steps=40).expected(100) == 40
    assert StoppingConfig(expected_steps=40, max_steps=3).expected(100) == 3


def test_a_target_of_zero_is_never_looked_for() -> None:
    r = rule(total_steps=1, target=0)
    r.observe(0, 0.0)
    assert not r.look_due(1)


def test_patience_counts_evaluations_without_improvement() -> None:
    r = rule(patience=2, target=0)
    for n_steps, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.1)):
        assert r.heldout_due(n_steps)
        assert r.reason(n_steps, 0.0) is None
        r.observe_heldout(n_steps, loss)
        assert not r.heldout_due(n_steps + 9)
    assert r.reason(40, 0.0) == "patience"


def test_patience_needs_heldout_text() -> None:
    with pytest.raises(ConfigError, match="heldout"):
        StopRule(
            StoppingConfig(patience=1), FALLING, 10, 10, has_heldout=False, look_steps=1, n_growing=0, first_whole=0
        )


def test_without_a_target_a_run_ends_with_its_schedule() -> None:
    assert rule(target=0.0, overtime=0.5).reason(100, 0.0) == "schedule"
    assert rule(target=0.1, overtime=0.5).reason(100, 0.0) is None


def test_a_heldout_loss_that_is_no_number_is_never_the_best() -> None:
    """Its checkpoint would be kept, and every later one would be worse."""
    r = rule(patience=2, target=0)
    r.observe_heldout(10, math.nan)
    assert (r.state.best_heldout, r.state.best_heldout_step) == (None, None)
    r.observe_heldout(20, 5.0)
    assert (r.state.best_heldout, r.state.best_heldout_step) == (5.0, 20)
    r.observe_heldout(30, math.nan)
    assert r.state.best_heldout_step == 20

"""Blocks that join later add nothing until they do, and are blocks like any other from then on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundling.corpus.windows import WindowConfig
from groundling.errors import ConfigError
from groundling.evaluation.corpus_loss import LossSum
from groundling.model import weights
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.optim.optimizer import OptimConfig, deal_turns, make_optimizer
from groundling.optim.schedule import ScheduleConfig
from groundling.training import checkpoint
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.estimate import KEPT_VALUES, Estimate, FirstSteps, remaining, seconds_to_read
from groundling.training.flops import network_flops, step_flops, update_flops
from groundling.training.growth import Growth, GrowthConfig, in_use, let_wait
from groundling.training.progress import clock
from groundling.training.record import median_of
from groundling.training.run_state import RunState
from groundling.training.stopping import StoppingConfig
from groundling.training.trainer import Trainer

MakeTrainer = Any

FOUR = GPTConfig(n_layer=4, n_head=2, n_embd=8, n_ctx=16, n_vocab=32)
GROWTH = GrowthConfig(every=2, fraction=0.125)
"""Of a schedule of 40 steps: five."""
WAITING = (1, 3)
WINDOWS = WindowConfig(16, 4)


def growth(config: GrowthConfig = GROWTH, model: GPTConfig = FOUR, total_steps: int = 40) -> Growth:
    return Growth(config.every, config.n_steps(total_steps, model.n_layer), model, WINDOWS, OptimConfig())


def blocks(model: GPT2, *layers: int) -> dict[str, torch.Tensor]:
    names = tuple(f"transformer.h.{layer}." for layer in layers)
    return {name: weight.clone() for name, weight in model.state_dict().items() if name.startswith(names)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, r"growth\.every is 0: give 1"),
        ({"every": 2, "fraction": 1.0}, r"growth\.fraction is 1\.0: give a number from 0 to below 1, so that all"),
        ({"every": 2, "fraction": -0.1}, r"growth\.fraction is -0\.1: give"),
        ({"every": 2, "fraction": float("nan")}, r"growth\.fraction is nan: give"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        GrowthConfig(**settings)


@pytest.mark.parametrize(
    ("config", "total_steps", "n_steps"),
    [
        (GROWTH, 40, 5),
        (GrowthConfig(2, 0.3), 10, 3),  # 0.3 * 10 is a little less than 3
        (GrowthConfig(2, 0.99), 3, 2),
        (GrowthConfig(2, 0.999999999), 10, 9),  # the last step has all
        (GrowthConfig(2, 0.5), 1, 0),
        (GrowthConfig(9, 0.5), 40, 20),
        (GrowthConfig(1, 0.5), 40, 0),
        (GrowthConfig(2, 0.0), 40, 0),
    ],
)
def test_the_first_steps_are_a_fraction_of_the_schedule(config: GrowthConfig, total_steps: int, n_steps: int) -> None:
    planned = growth(config, total_steps=total_steps)
    assert planned.n_steps == n_steps
    assert [planned.block_stride(step) for step in (0, n_steps - 1, n_steps) if step >= 0] == (
        [config.every, config.every, 1] if n_steps else [1, 1]
    )


def test_one_block_is_all_blocks() -> None:
    assert growth(model=replace(FOUR, n_layer=1)).n_steps == 0
    assert growth(model=replace(FOUR, n_layer=2)).n_steps == 5


@pytest.mark.parametrize("turns", [1, 3])
def test_what_steps_cost(turns: int) -> None:
    """What a network of the blocks in use costs, and their part of the update, of which turns may have fewer."""
    optim = OptimConfig(kind="muon", turns=turns)
    planned = Growth(3, 10, FOUR, WINDOWS, optim)
    network, update = (
        [cost(replace(FOUR, n_layer=n)) for n in (2, 4)]
        for cost in (
            lambda model: network_flops(model, WINDOWS, 16),
            lambda model: update_flops(model, optim),
        )
    )
    assert planned.cost(2) == pytest.approx((network[0] + update[1] / 2) / (network[1] + update[1]))
    assert planned.cost(4) == 1
    costs = [planned.cost(2)] * 10 + [1.0] * 30
    for first, last in ((0, 40), (0, 3), (4, 10), (8, 12), (10, 11), (30, 40), (5, 5)):
        assert planned.whole_steps(first, last) == pytest.approx(sum(costs[first:last]))


@pytest.mark.parametrize("every", [2, 3, 4])
def test_blocks_that_wait_add_nothing(every: int) -> None:
    """The whole network computes the same as those in use, to the bit; and before, the others did add something."""
    torch.manual_seed(1)
    model = GPT2(FOUR)
    tokens = torch.randint(32, (2, 16))
    before = model.logits(model.hidden(tokens))
    let_wait(model, every)
    whole = model.logits(model.hidden(tokens))
    model.transformer.block_stride = every
    assert model.logits(model.hidden(tokens)).equal(whole)
    assert not whole.equal(before)
    small = GPT2(in_use(FOUR, every))
    state = model.state_dict()
    for layer in range(small.config.n_layer):
        for name in list(state):
            if name.startswith(f"transformer.h.{layer * every}."):
                state[name.replace(f".h.{layer * every}.", f".h.{layer}.")] = state[name]
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    torch.testing.assert_close(small.logits(small.hidden(tokens)), whole)


def test_blocks_that_wait_are_trained_once_they_take_part() -> None:
    """The first step moves their projections, which are zero, and through these the next moves all."""
    torch.manual_seed(1)
    model = GPT2(FOUR)
    let_wait(model, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(32, (2, 17))
    for n_steps in (1, 2):
        before = blocks(model, *WAITING)
        optimizer.zero_grad()
        model.loss_sum(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        moved = {name for name, weight in blocks(model, *WAITING).items() if not weight.equal(before[name])}
        assert moved == {name for name in before if n_steps == 2 or "c_proj" in name}


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(kind="muon", turns=3)], ids=lambda optim: optim.kind)
def test_a_run_goes_through_every_second_block_at_first(make_trainer: MakeTrainer, optim: OptimConfig) -> None:
    """The others are as they were drawn until the fifth step is over, and the checkpoint of that time is a GPT-2."""
    sections = {"model": FOUR, "growth": GROWTH, "optim": replace(optim, weight_decay=0.1)}
    trainer, memory = make_trainer("first", **sections, stopping=StoppingConfig(max_steps=5))
    drawn = blocks(trainer.model, *WAITING)
    others = blocks(trainer.model, 0, 2)
    trainer.train()
    assert all(weight.equal(drawn[name]) for name, weight in blocks(trainer.model, *WAITING).items())
    assert not any(weight.equal(others[name]) for name, weight in blocks(trainer.model, 0, 2).items())
    loss = trainer.evaluator.loss(trainer.train_tokens)
    model = GPT2(FOUR)
    weights.load(model, checkpoint.complete(trainer.checkpoints)[-1] / checkpoint.WEIGHTS)
    evaluator = replace(trainer.evaluator, loss_sum=model.loss_sum)
    assert evaluator.loss(trainer.train_tokens) == loss

    sections = {"model": FOUR, "growth": GROWTH, "optim": optim}  # what moves now is moved by a gradient
    trainer, more = make_trainer("first", **sections, stopping=StoppingConfig(max_steps=14))
    trainer.resume()
    trainer.train()
    assert not any(weight.equal(drawn[name]) for name, weight in blocks(trainer.model, *WAITING).items())
    lines = [line for line in memory.metrics + more.metrics if "train/loss" in line]
    assert [line["train/blocks"] for line in lines] == [2] * 5 + [4] * 9
    assert "step 5: all 4 blocks take part from here on" in more.notes


def test_shares_of_the_ceiling_are_of_the_blocks_in_use(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer(model=FOUR, growth=GROWTH)
    trainer.ceiling.flops = 1e18
    trainer.train()
    flops = [line["train/mfu"] / line["train/tokens_per_s"] for line in memory.metrics]
    alone, memory = make_trainer("alone", model=replace(FOUR, n_layer=2))
    alone.ceiling.flops = 1e18
    alone.train()
    of_two = [line["train/mfu"] / line["train/tokens_per_s"] for line in memory.metrics]
    assert flops[:5] == pytest.approx(of_two[:5])
    assert min(flops[5:]) > 1.2 * max(flops[:5])


@pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(kind="muon", turns=2)], ids=lambda optim: optim.kind)
@pytest.mark.parametrize("interrupted_after", [1, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: MakeTrainer, optim: OptimConfig, interrupted_after: int
) -> None:
    sections = {"model": FOUR, "growth": GROWTH, "optim": optim}
    whole, whole_memory = make_trainer("whole", **sections)
    whole.train()
    first, first_memory = make_trainer("cut", **sections, stopping=StoppingConfig(max_steps=interrupted_after))
    first.train()
    second, second_memory = make_trainer("cut", **sections)
    second.resume()
    second.train()
    assert first_memory.losses() + second_memory.losses() == whole_memory.losses()  # bit for bit
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("save_every", "saved"), [("1000", [5, 7]), ("0", [7])])
def test_a_checkpoint_is_written_before_blocks_join(
    make_trainer: MakeTrainer, save_every: str, saved: list[int]
) -> None:
    """From then on a step needs more memory, and without it a run would have lost its first half."""
    sections = {"model": FOUR, "growth": GROWTH, "checkpoint": CheckpointConfig(save_every)}
    trainer, memory = make_trainer(**sections, stopping=StoppingConfig(max_steps=7))
    trainer.train()
    paths = checkpoint.complete(trainer.checkpoints)
    assert [int(path.name[-2:]) for path in paths] == saved
    if saved[0] == 5:
        shutil.rmtree(paths[1])
        resumed, again = make_trainer(**sections, stopping=StoppingConfig(max_steps=7))
        resumed.resume()
        resumed.train()
        assert again.losses() == memory.losses()[5:]


LONGER = ScheduleConfig(peak=1e-2, warmup_steps=4, total_steps=80, passes=None)
SHORTER = ScheduleConfig(peak=1e-2, warmup_steps=4, total_steps=12, passes=None)


def test_blocks_that_have_joined_stay(make_trainer: MakeTrainer) -> None:
    """Of a longer schedule the seventh step would be among the first; and the target counts at once."""
    sections = {"model": FOUR, "growth": GROWTH}
    begun, _ = make_trainer("run", **sections, stopping=StoppingConfig(max_steps=7))
    begun.train()
    shutil.copytree(begun.checkpoints.parent, begun.checkpoints.parent.with_name("plain"))
    stopping = StoppingConfig(max_steps=8)
    resumed, memory = make_trainer("run", **sections, schedule=LONGER, stopping=stopping)
    resumed.resume()
    assert (resumed.growth.n_steps, resumed.stop_rule.n_growing) == (5, 5)
    resumed.train()
    assert [line["train/blocks"] for line in memory.metrics if "train/loss" in line] == [4]
    plain, _ = make_trainer("plain", model=FOUR, schedule=LONGER, stopping=stopping)
    plain.resume()
    plain.train()
    assert plain.state.n_steps == 8
    assert all(resumed.model.state_dict()[name].equal(w) for name, w in plain.model.state_dict().items())
    met, _ = make_trainer("run", **sections, schedule=LONGER, stopping=StoppingConfig(9.0))
    met.resume()
    assert (met.train(), met.state.n_steps) == ("target", 8)


@pytest.mark.parametrize(
    ("growth", "schedule", "expected"),
    [
        (GrowthConfig(4, 0.125), None, [2, 2, 4, 4]),  # the same blocks wait
        (GrowthConfig(2, 0.15), None, [2, 2, 2, 4]),
        (GrowthConfig(1, 0.0), None, [4, 4, 4, 4]),
        (GROWTH, SHORTER, [4, 4, 4, 4]),
    ],
)
def test_a_resumed_run_goes_through_the_same_blocks(
    make_trainer: MakeTrainer, growth: GrowthConfig, schedule: ScheduleConfig | None, expected: list[int]
) -> None:
    """Whatever a resumed run is told: no trained ones are left out, and no target is met without the others."""
    sections: dict[str, Any] = {"model": FOUR, "stopping": StoppingConfig(9.0, max_steps=7)}
    begun, _ = make_trainer("run", **sections | {"growth": GROWTH, "stopping": StoppingConfig(max_steps=3)})
    begun.train()
    if schedule:
        sections["schedule"] = schedule
    resumed, memory = make_trainer("run", **sections, growth=growth)
    resumed.resume()
    assert resumed.model.transformer.block_stride == 2
    assert resumed.train() == "target"
    blocks_used = [line["train/blocks"] for line in memory.metrics if "train/loss" in line]
    n_steps = expected.index(4) + 1
    assert blocks_used == expected[:n_steps]
    assert f"step {2 + n_steps}: all 4 blocks take part from here on" in memory.notes


def test_a_run_goes_back_to_when_blocks_waited(make_trainer: MakeTrainer) -> None:
    """After steps that are not finite; and then takes the same steps as one that never was in trouble."""
    sections = {"model": FOUR, "growth": GROWTH, "checkpoint": CheckpointConfig(save_every="4")}
    whole, whole_memory = make_trainer("whole", **sections)
    whole.train()
    trainer, memory = make_trainer("trouble", **sections)
    sound: LossSum = trainer.loss_sum
    left = [3]

    def broken(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = sound(inputs, targets)
        if trainer.state.n_steps < 5 or not left[0]:
            return loss
        left[0] -= 1
        return loss * float("nan")

    trainer.loss_sum = broken
    trainer.train()
    assert "continuing after 5 steps" in memory.notes
    assert trainer.state.n_growing == 5
    assert memory.losses() == whole_memory.losses()
    assert all(trainer.model.state_dict()[name].equal(w) for name, w in whole.model.state_dict().items())


def test_a_run_of_an_older_version_has_all_blocks() -> None:
    state = asdict(RunState(block_stride=2, first_stride=2, n_growing=3))
    assert RunState.from_json(state) == RunState(block_stride=2, first_stride=2, n_growing=3)
    del state["block_stride"], state["first_stride"], state["n_growing"]
    assert RunState.from_json(state) == RunState()


def test_patience_waits_for_all_blocks(make_trainer: MakeTrainer, tokens: NDArray[np.uint16]) -> None:
    stopping = StoppingConfig(target=0, patience=99, heldout_every=0.1, max_steps=10)
    trainer, memory = make_trainer(model=FOUR, growth=GROWTH, stopping=stopping, heldout=tokens)
    left = remaining(trainer, 3600.0)
    trainer.train()
    taken = [line["step"] + 1 for line in memory.metrics if "heldout/loss" in line]
    assert taken == [6, 7, 8, 9, 10]
    steps_s = 3600 * trainer.growth.whole_steps(0, 10)
    assert left.startswith(f"left: {clock(steps_s + 5 * seconds_to_read(trainer, len(tokens), 3600.0))} of training")


def test_trained_blocks_cannot_be_made_to_wait(make_trainer: MakeTrainer) -> None:
    trained, _ = make_trainer(model=FOUR)
    with pytest.raises(AssertionError, match="skipped"):
        Trainer(
            replace(trained.recipe, growth=GROWTH),
            trained.train_tokens,
            None,
            trained.tokenizer,
            trained.runtime,
            trained.checkpoints,
            1e9,
            trained.model,
        )


@pytest.mark.parametrize("never", [GrowthConfig(every=3), GrowthConfig(fraction=0.5)])
def test_a_run_that_does_not_grow_is_as_ever(make_trainer: MakeTrainer, never: GrowthConfig) -> None:
    """Its blocks move in the same turns, too."""
    optim = OptimConfig(kind="muon", turns=2)
    plain, plain_memory = make_trainer("plain", model=FOUR, optim=optim)
    plain.train()
    trainer, memory = make_trainer("never", model=FOUR, optim=optim, growth=never)
    trainer.train()
    assert memory.losses() == plain_memory.losses()
    assert "train/blocks" not in memory.metrics[0]


def test_blocks_keep_the_turns_that_they_were_dealt(make_trainer: MakeTrainer) -> None:
    """Also those of a run that is told to grow, or to grow otherwise, after it has begun."""
    optim = OptimConfig(kind="muon", turns=2)
    none, other = GrowthConfig(), GrowthConfig(3, 0.1)
    for name, begun_with, resumed_with in (("a", GROWTH, none), ("b", none, GROWTH), ("c", GROWTH, other)):
        first, _ = make_trainer(name, model=FOUR, optim=optim, growth=begun_with)
        first.train()
        again, _ = make_trainer(name, model=FOUR, optim=optim, growth=resumed_with)
        again.resume()
        turns = [[group.get("turn") for group in each.optimizer.param_groups] for each in (first, again)]
        assert turns[0] == turns[1]


@pytest.mark.parametrize(
    ("n_blocks", "block_stride", "turns"), [(12, 3, 3), (12, 2, 3), (4, 2, 2), (12, 4, 2), (5, 2, 2)]
)
def test_blocks_that_begin_take_turns_with_one_another(n_blocks: int, block_stride: int, turns: int) -> None:
    """Before the others join and after, equally many move in each step, or one more; and all by one count of steps."""
    model = GPT2(replace(FOUR, n_layer=n_blocks))
    optimizer = make_optimizer(model, OptimConfig(kind="muon", turns=turns))
    deal_turns(optimizer.param_groups, block_stride)
    names = [f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(n_blocks)]
    weights_of = [model.get_parameter(name) for name in names]
    for step in range(4 * turns):
        first = step < 2 * turns + 1  # they join between two rounds
        before = [weight.detach().clone() for weight in weights_of]
        for layer, block in enumerate(model.transformer.h):
            if not first or layer % block_stride == 0:
                for parameter in block.parameters():
                    parameter.grad = torch.randn(parameter.shape)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        moved = sum(not weight.equal(was) for weight, was in zip(weights_of, before, strict=True))
        n_in_use = len(range(0, n_blocks, block_stride)) if first else n_blocks
        assert moved in (n_in_use // turns, -(-n_in_use // turns))


@pytest.mark.parametrize("measure", ["corpus/loss", "train/loss"])
def test_no_target_is_met_before_all_blocks_take_part(make_trainer: MakeTrainer, measure: Any) -> None:
    trainer, memory = make_trainer(model=FOUR, growth=GROWTH, stopping=StoppingConfig(9.0, measure, max_steps=10))
    assert trainer.train() == "target"
    assert trainer.state.n_steps == 6
    looks = [line["step"] for line in memory.metrics if "corpus/loss" in line]
    assert looks == ([5] if measure == "corpus/loss" else [])


def test_an_estimate_from_first_steps_is_of_the_whole_run(make_trainer: MakeTrainer) -> None:
    trainer, _ = make_trainer(model=FOUR, growth=GROWTH)
    told: list[Estimate] = []
    sink = FirstSteps(trainer, "none", told.append)
    for step in range(4):
        sink.write(step, {"train/step_s": 0.5})
    whole_s = 0.5 / trainer.growth.cost(2)
    assert whole_s > 0.6
    assert told[0].train_s == pytest.approx(5 * 0.5 + 5 * whole_s)
    assert told[0].step_s == pytest.approx(told[0].train_s / 10)
    assert told[0].tokens_per_s == pytest.approx(64 * 10 / told[0].train_s)
    assert told[0].achieved_flops == pytest.approx(
        step_flops(FOUR, trainer.recipe.windows, trainer.recipe.optim, 16) / whole_s
    )
    trainer.state.n_steps = 9
    assert remaining(trainer, 3600.0).startswith("left: 1:00:00 of training to step 10, at 3.6e+03 s a step")


def test_an_estimate_says_how_far_a_run_gets_in_its_time(make_trainer: MakeTrainer) -> None:
    """Five steps through two of four blocks, and three through all; in all, the schedule has forty."""
    whole_s = 0.5 / make_trainer(model=FOUR, growth=GROWTH)[0].growth.cost(2)
    limit_s = 5 * 0.5 + 2.9 * whole_s
    stopping = StoppingConfig(max_minutes=limit_s / 60)
    trainer, _ = make_trainer("limited", model=FOUR, growth=GROWTH, stopping=stopping)
    told: list[Estimate] = []
    sink = FirstSteps(trainer, "none", told.append)
    for step in range(4):
        sink.write(step, {"train/step_s": 0.5})
    assert (told[0].n_steps, told[0].expected_steps) == (8, 40)
    assert told[0].schedule_steps == int(40 * limit_s / (5 * 0.5 + 35 * whole_s))
    assert told[0].train_s == pytest.approx(limit_s)
    assert told[0].tokens_per_s == pytest.approx(64 * 8 / (5 * 0.5 + 3 * whole_s))
    assert told[0].evaluation_s == 0  # looks are taken near the schedule's end


def test_first_steps_are_timed_in_whole_rounds_of_turns(make_trainer: MakeTrainer) -> None:
    """Of three turns that four blocks take, in one two move; where all steps are alike none needs be waited for."""
    trainer, _ = make_trainer(model=FOUR, optim=OptimConfig(kind="muon", turns=3))
    told: list[Estimate] = []
    sink = FirstSteps(trainer, "none", told.append)
    for step, seconds in enumerate([9.0, 9.0, 0.5, 0.8, 0.5, 9.0]):
        sink.write(step, {"train/step_s": seconds})
        assert len(told) == (step >= 4)
    assert told[0].step_s == pytest.approx(0.6)
    trainer, _ = make_trainer("even", model=replace(FOUR, n_layer=3), optim=OptimConfig(kind="muon", turns=3))
    told.clear()
    sink = FirstSteps(trainer, "none", told.append)
    for step in range(4):
        sink.write(step, {"train/step_s": 0.5})
    assert told


@pytest.mark.parametrize(("kind", "n_moments"), [("adamw", 2), ("muon", 1)])
def test_memory_is_estimated_with_the_blocks_that_join(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, kind: Any, n_moments: int
) -> None:
    """Their gradients and moments, and what they keep of the batch."""
    monkeypatch.setattr("groundling.machine.peak_memory_bytes", lambda device: 10**6)
    trainer, _ = make_trainer(model=FOUR, growth=GROWTH, optim=OptimConfig(kind))
    told: list[Estimate] = []
    sink = FirstSteps(trainer, "none", told.append)
    for step in range(4):
        sink.write(step, {"train/step_s": 0.5})
    n_waiting = sum(weight.numel() for weight in blocks(trainer.model, *WAITING).values())
    of_batch = 2 * KEPT_VALUES * 8 * 64 * 4
    assert told[0].memory_bytes == 10**6 + 4 * n_waiting * (1 + n_moments) + of_batch


def test_a_records_speed_is_that_of_steps_through_all_blocks(tmp_path: Path) -> None:
    """Or of those that there were."""
    lines = [
        {"step": step, "train/tokens_per_s": 100.0 + step, "train/blocks": 2 if step < 5 else 4} for step in range(8)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert median_of(metrics, "train/tokens_per_s") == 106.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    assert median_of(metrics, "train/tokens_per_s") == 102.0
    metrics.write_text("")
    assert median_of(metrics, "train/tokens_per_s") is None

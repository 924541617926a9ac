"""Training with goldfish loss: what is dropped is not learned, and everything else is as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from groundling.corpus.goldfish import ObjectiveConfig, dropped
from groundling.corpus.windows import WindowConfig, gather, grid
from groundling.optim.schedule import ScheduleConfig
from groundling.training.estimate import measure
from groundling.training.step import training_step
from groundling.training.stopping import StoppingConfig
from groundling.training.trainer import Trainer

MakeTrainer = Any

GOLDFISH = ObjectiveConfig("goldfish")


def losses_by_target(trainer: Trainer, windows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each prediction of these windows, and whether goldfish drops it, computed one window at a time."""
    tokens, losses, out = trainer.train_tokens, [], []
    for start, n in windows.tolist():
        piece = torch.from_numpy(np.asarray(tokens[start : start + n + 1], dtype=np.int64))
        logits = trainer.model.logits(trainer.model.hidden(piece[None, :-1]))[0]
        losses.append(F.cross_entropy(logits, piece[1:], reduction="none"))
        out.append(torch.from_numpy(dropped(tokens, start + 1, start + n + 1, GOLDFISH)))
    return torch.cat(losses), torch.cat(out)


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_the_step_takes_the_mean_over_the_targets_that_are_left(make_trainer: MakeTrainer, micro: int) -> None:
    """Loss and gradient, with a short window and targets that no window of the batch counts."""
    trainer, _ = make_trainer(windows=WindowConfig(16, 4, micro), objective=GOLDFISH)
    windows = grid(len(trainer.train_tokens), 16)[[0, 5, 9, -1]]
    losses, out = losses_by_target(trainer, windows)
    assert windows[-1, 1] < 16
    assert 0 < out.sum() < len(out)
    expected = losses[~out].mean()
    expected.backward()
    gradients = [p.grad.clone() for p in trainer.model.parameters()]
    batch = gather(trainer.train_tokens, windows, 16, GOLDFISH)
    result = training_step(trainer.model, trainer.loss_sum, trainer.optimizer, batch, 0.0, micro, 0.0, trainer.runtime)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close([p.grad for p in trainer.model.parameters()], gradients, rtol=1e-4, atol=1e-7)


def test_what_is_dropped_is_not_learned(make_trainer: MakeTrainer) -> None:
    """Random tokens, so that nothing else tells what comes: the same network learns them all with plain loss."""
    schedule = ScheduleConfig(peak=1e-2, warmup_steps=10, total_steps=500, hold_fraction=1.0, passes=None)
    stopping = StoppingConfig().without_target()
    means = {}
    for objective in (ObjectiveConfig(), GOLDFISH):
        trainer, _ = make_trainer(objective.loss, schedule=schedule, stopping=stopping, objective=objective)
        assert trainer.train() == "schedule"
        assert trainer.state.n_steps == 500
        with torch.no_grad():
            losses, out = losses_by_target(trainer, grid(len(trainer.train_tokens), 16))
        means[objective.loss] = float(losses[out].mean()), float(losses[~out].mean())
        # what stands as corpus/loss is over both
        assert trainer.take("corpus/loss") == pytest.approx(float(losses.mean()), rel=1e-5)
    assert means["goldfish"][1] < 1.0
    assert means["goldfish"][0] > np.log(31)  # worse than not knowing
    assert max(means["plain"]) < 1.0


@pytest.mark.parametrize("order", ["permuted", "shifted"])
def test_a_resumed_goldfish_run_equals_an_uninterrupted_one(make_trainer: MakeTrainer, order: Any) -> None:
    sections = {"windows": WindowConfig(16, 4, order=order), "objective": GOLDFISH}
    whole, whole_memory = make_trainer("whole", **sections)
    whole.train()
    make_trainer("cut", stopping=StoppingConfig(max_steps=4), **sections)[0].train()
    second, memory = make_trainer("cut", **sections)
    second.resume()
    second.train()
    assert memory.losses() == whole_memory.losses()[4:]
    plain, plain_memory = make_trainer("plain", windows=sections["windows"])
    plain.train()
    assert plain_memory.losses() != whole_memory.losses()
    assert plain.state.tokens_seen == whole.state.tokens_seen  # a dropped target was read all the same


@pytest.mark.usefixtures("quick_measure")
def test_a_goldfish_run_is_estimated_without_looks_at_its_text(make_trainer: MakeTrainer) -> None:
    schedule = ScheduleConfig(peak=1e-2, warmup_steps=4, total_steps=40, passes=None)
    stopping = StoppingConfig(expected_steps=7).without_target()
    trainer, memory = make_trainer(schedule=schedule, stopping=stopping, objective=GOLDFISH)
    estimate = measure(trainer, "none")
    assert estimate.train_s == pytest.approx(40 * estimate.step_s)
    assert estimate.evaluation_s == 0
    trainer.train()
    assert not any("corpus/loss" in line for line in memory.metrics)
    assert trainer.stop_rule.state.first_batch_below_target is None


def test_a_batch_without_targets_changes_nothing(make_trainer: MakeTrainer) -> None:
    """One target a step, of which one in two is dropped: steps without any are named, and are no failure."""
    trainer, memory = make_trainer(
        windows=WindowConfig(1, 1),
        objective=replace(GOLDFISH, drop_every=2),
        stopping=StoppingConfig(target=0, max_steps=40),
    )
    assert trainer.train() == "max_steps"
    skipped = [line for line in memory.metrics if line.get("train/update_skipped")]
    assert 10 < len(skipped) < 50
    assert sum("drops all its targets" in note for note in memory.notes) == len(skipped)
    assert not any("not finite" in note for note in memory.notes)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundling.corpus.windows import WindowConfig
from groundling.errors import ConfigError, Interrupted, RunFailed
from groundling.model.gpt2 import GPT2
from groundling.optim.schedule import ScheduleConfig
from groundling.training import checkpoint
from groundling.training import trainer as trainer_module
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.estimate import measure
from groundling.training.step import StepResult, training_step
from groundling.training.stopping import StoppingConfig
from groundling.training.trainer import Trainer

MakeTrainer = Any

PINNED = [3.4506, 3.4345, 3.4602, 3.4033, 3.3688, 3.3667, 3.3073, 3.2963, 3.2270, 3.3200]
"""Losses of the fixture's first ten steps; a refactor leaves them as they are."""


def test_the_first_ten_losses_are_pinned(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer()
    assert trainer.train() == "max_steps"
    assert memory.losses() == pytest.approx(PINNED, abs=2e-4)


@pytest.mark.parametrize("order", ["permuted", "shifted", "sequential"])
@pytest.mark.parametrize("interrupted_after", [1, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: MakeTrainer, order: Any, interrupted_after: int
) -> None:
    windows = WindowConfig(16, 4, order=order)
    whole, whole_memory = make_trainer("whole", windows=windows)
    whole.train()
    first, first_memory = make_trainer("cut", windows=windows, stopping=StoppingConfig(max_steps=interrupted_after))
    first.train()
    second, second_memory = make_trainer("cut", windows=windows)
    second.resume()
    second.train()
    assert first_memory.losses() + second_memory.losses() == whole_memory.losses()  # bit for bit
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    assert second.stop_rule.state == whole.stop_rule.state
    assert second.state.tokens_seen == whole.state.tokens_seen


def test_resuming_compares_two_runs_that_can_differ(make_trainer: MakeTrainer) -> None:
    """The test above fails if moments are lost: without them the next loss but one is another."""
    first, _ = make_trainer("cut", stopping=StoppingConfig(max_steps=5))
    first.train()
    whole, whole_memory = make_trainer("whole")
    whole.train()
    second, memory = make_trainer("cut")
    second.resume()
    second.optimizer.state.clear()
    second.train()
    assert memory.losses()[0] == whole_memory.losses()[5]
    assert memory.losses()[1] != whole_memory.losses()[6]


def test_a_signal_saves_and_the_run_continues(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_memory = make_trainer("whole")
    whole.train()
    cut, cut_memory = make_trainer("cut")

    def step_and_signal(*arguments: Any, **settings: Any) -> StepResult:
        if cut.state.n_steps == 4:
            signal.raise_signal(signal.SIGTERM)
        return training_step(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "training_step", step_and_signal)
        with pytest.raises(Interrupted, match=r"SIGTERM received; saved .*step-00000005; continue with --resume"):
            cut.train()
    second, memory = make_trainer("cut")
    second.resume()
    second.train()
    assert cut_memory.losses() + memory.losses() == whole_memory.losses()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(make_trainer: MakeTrainer) -> None:
    first, _ = make_trainer(checkpoint=CheckpointConfig(save_every="3", keep=9))
    first.train()
    newest = checkpoint.complete(first.checkpoints)[-1]
    (newest / "model.safetensors").write_bytes(b"\0" * 100)
    second, memory = make_trainer()
    second.resume()
    assert second.state.n_steps == 9
    assert any(newest.name in note and "model.safetensors has changed" in note for note in memory.notes)


def test_the_target_ends_the_run_on_the_whole_text(make_trainer: MakeTrainer) -> None:
    """A network that can learn its 200 tokens stops by itself, and the loss that stopped it is the real one."""
    trainer, memory = make_trainer(
        stopping=StoppingConfig(target=1.0, max_steps=600),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=10, total_steps=600, hold_fraction=1.0, passes=None),
    )
    assert trainer.train() == "target"
    looks = [line for line in memory.metrics if "corpus/loss" in line]
    assert looks[-1]["corpus/loss"] == trainer.evaluator.loss(trainer.train_tokens) < 1.0
    assert all(line["corpus/loss"] >= 1.0 for line in looks[:-1])
    assert len(looks) < 40  # a running mean decides when to look
    assert looks[-1]["step"] == trainer.state.n_steps - 1


def test_shifted_grids_can_stop_on_the_offset_loss(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer(
        windows=WindowConfig(16, 4, order="shifted"),
        stopping=StoppingConfig(target=1.8, measure="corpus/loss_offset", max_steps=900),
        schedule=ScheduleConfig(peak=1e-2, warmup_steps=10, total_steps=900, hold_fraction=1.0, passes=None),
    )
    assert trainer.train() == "target"
    assert [line for line in memory.metrics if "corpus/loss_offset" in line][-1]["corpus/loss_offset"] < 1.8


def test_patience_stops_when_heldout_text_gets_no_better(make_trainer: MakeTrainer, tokens: NDArray[np.uint16]) -> None:
    """Random held-out tokens cannot be learned, so learning the others makes them worse."""
    heldout = tokens[::-1][:100].copy()
    stopping = StoppingConfig(target=0, patience=2, max_steps=500)
    trainer, memory = make_trainer(stopping=stopping, heldout=heldout)
    assert trainer.train() == "patience"
    taken = [line["heldout/loss"] for line in memory.metrics if "heldout/loss" in line]
    assert min(taken[-2:]) >= min(taken[:-2])
    with pytest.raises(ConfigError, match="held-out"):
        make_trainer(stopping=stopping)


class Poison:
    """Makes chosen calls of the step return or leave numbers that are not finite."""

    def __init__(self, trainer: Trainer, steps: set[int], times: int = 1) -> None:
        self.trainer, self.left = trainer, dict.fromkeys(steps, times)
        self.loss_sum = trainer.loss_sum

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.loss_sum(inputs, targets)
        step = self.trainer.state.n_steps
        if torch.is_grad_enabled() and self.left.get(step):
            self.left[step] -= 1
            return loss * float("nan")
        return loss


def test_a_step_that_is_not_finite_is_skipped(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer()
    trainer.loss_sum = Poison(trainer, {4, 5})
    before: dict[int, torch.Tensor] = {}
    take = trainer._take_step

    def watched() -> None:
        before[trainer.state.n_steps] = trainer.model.head_weight.detach().clone()
        take()

    trainer._take_step = watched  # type: ignore[method-assign]
    assert trainer.train() == "max_steps"
    assert torch.equal(before[4], before[5])
    assert torch.equal(before[5], before[6])
    assert not torch.equal(before[6], before[7])
    assert sum("not finite" in note for note in memory.notes) == 2
    assert [line["step"] for line in memory.metrics if line.get("train/update_skipped")] == [4, 5]


def test_three_in_a_row_go_back_to_the_last_checkpoint(make_trainer: MakeTrainer) -> None:
    clean, clean_memory = make_trainer("clean")
    clean.train()
    trainer, memory = make_trainer("poisoned", checkpoint=CheckpointConfig(save_every="2"))
    trainer.loss_sum = Poison(trainer, {5, 6, 7})
    assert trainer.train() == "max_steps"
    assert "continuing after 4 steps" in memory.notes
    assert memory.losses() == clean_memory.losses()  # the second time was clean, and the first is forgotten


def test_after_two_returns_the_run_has_failed(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer(checkpoint=CheckpointConfig(save_every="2"))
    trainer.loss_sum = Poison(trainer, {5, 6, 7}, times=99)
    with pytest.raises(RunFailed, match="not finite"):
        trainer.train()
    assert memory.notes.count("continuing after 4 steps") == 2


def test_without_a_checkpoint_the_run_goes_back_to_its_start(make_trainer: MakeTrainer) -> None:
    clean, clean_memory = make_trainer("clean")
    clean.train()
    trainer, memory = make_trainer("poisoned")
    trainer.loss_sum = Poison(trainer, {1, 2, 3})
    trainer.train()
    assert memory.losses() == clean_memory.losses()


def test_measuring_changes_nothing(make_trainer: MakeTrainer) -> None:
    plain, plain_memory = make_trainer("plain")
    plain.train()
    measured, memory = make_trainer("measured")
    estimate = measure(measured)
    assert estimate.step_s > 0
    assert estimate.train_s == pytest.approx(10 * estimate.step_s)
    measured.train()
    assert memory.losses() == plain_memory.losses()


def test_accumulated_loss_and_gradient_equal_those_of_one_batch(make_trainer: MakeTrainer) -> None:
    """Also where windows differ in length: one batch of the pass holds the short window."""
    gradients = []
    for micro in (4, 2, 1):
        trainer, _ = make_trainer(windows=WindowConfig(16, 4, micro))
        batch = next(b for step in range(4) if (b := trainer.windows.batch(step)).n_targets < 64)
        result = training_step(
            trainer.model, trainer.loss_sum, trainer.optimizer, batch, 0.0, micro, 0.0, trainer.runtime
        )
        gradients.append((result, [p.grad.clone() for p in trainer.model.parameters()]))
    for result, gradient in gradients[1:]:
        assert result.loss == pytest.approx(gradients[0][0].loss, rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_gradient(make_trainer: MakeTrainer) -> None:
    trainer, _ = make_trainer()
    model: GPT2 = trainer.model
    result = training_step(
        model, trainer.loss_sum, trainer.optimizer, trainer.windows.batch(0), 0.0, 4, 1e-3, trainer.runtime
    )
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert result.grad_norm > 1e-3
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)

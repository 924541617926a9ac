"""Runs whose unseen ids share a row: full models on the disk, full-vocabulary losses, resumed bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from groundling.corpus.goldfish import ObjectiveConfig
from groundling.evaluation.corpus_loss import Evaluator
from groundling.model import weights
from groundling.model.compact import CompactGPT2
from groundling.model.gpt2 import GPT2
from groundling.training import checkpoint
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.estimate import measure
from groundling.training.flops import flops_per_token
from groundling.training.recipe import Recipe
from groundling.training.stopping import StoppingConfig
from groundling.training.trainer import Trainer

MakeTrainer = Any

N_VOCAB = 130


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, n_vocab=N_VOCAB), head_vocabulary="seen")


@pytest.fixture
def tokens(tokens: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Ids that lie apart in the vocabulary, its first and its last not among them."""
    return tokens * 4 + 3


@pytest.fixture
def heldout() -> NDArray[np.uint16]:
    """Text most of whose ids the training text lacks."""
    return np.random.default_rng(1).integers(N_VOCAB, size=150).astype(np.uint16)


def saved_model(trainer: Trainer) -> GPT2:
    """The network in the newest checkpoint, read as any tool would that knows nothing of this."""
    model = GPT2(trainer.recipe.model)
    weights.load(model, checkpoint.complete(trainer.checkpoints)[-1] / "model.safetensors")
    return model


def test_the_losses_of_the_run_are_those_of_the_full_model_it_saved(
    make_trainer: MakeTrainer, heldout: NDArray[np.uint16]
) -> None:
    trainer, _ = make_trainer(heldout=heldout)
    trainer.train()
    model = saved_model(trainer)
    evaluator = Evaluator(model.loss_sum, 16, trainer.runtime)
    assert trainer.take("corpus/loss") == pytest.approx(evaluator.loss(trainer.train_tokens), rel=1e-6)
    assert trainer.take("corpus/loss_offset") == pytest.approx(evaluator.offset_loss(trainer.train_tokens), rel=1e-6)
    assert trainer.take("heldout/loss") == pytest.approx(evaluator.loss(heldout), rel=1e-6)
    seen = np.unique(trainer.train_tokens)
    assert not set(heldout.tolist()) <= set(seen.tolist())
    rows = model.head_weight.detach()
    shared = rows[np.setdiff1d(np.arange(N_VOCAB), seen)]
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert len(torch.unique(rows, dim=0)) == len(seen) + 1


def test_a_position_table_of_waves_is_kept(make_trainer: MakeTrainer) -> None:
    trainer, _ = make_trainer(initial_positions="waves")
    full, _ = make_trainer("full", initial_positions="waves", head_vocabulary="full")
    random, _ = make_trainer("random")
    table, of_full, of_random = (each.model.transformer.wpe.weight for each in (trainer, full, random))
    assert table.equal(of_full)
    assert not table.equal(of_random)


def test_it_learns_as_the_full_head_does(make_trainer: MakeTrainer) -> None:
    """Not the same losses, for unseen rows begin apart in the full model; but the same curve."""
    stopping = StoppingConfig(target=0, max_steps=30)
    seen, seen_memory = make_trainer("seen", stopping=stopping)
    full, full_memory = make_trainer("full", stopping=stopping, head_vocabulary="full")
    assert isinstance(seen.model, CompactGPT2)
    assert not isinstance(full.model, CompactGPT2)
    seen.train()
    full.train()
    assert seen_memory.losses() != full_memory.losses()
    assert seen_memory.losses() == pytest.approx(full_memory.losses(), abs=0.05)
    assert seen_memory.losses()[-1] < seen_memory.losses()[0] - 1


@pytest.mark.parametrize("interrupted_after", [1, 7])
@pytest.mark.parametrize("loss", ["plain", "goldfish"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: MakeTrainer, interrupted_after: int, loss: Any
) -> None:
    sections = {"objective": ObjectiveConfig(loss)}
    whole, whole_memory = make_trainer("whole", **sections)
    whole.train()
    make_trainer("cut", stopping=StoppingConfig(max_steps=interrupted_after), **sections)[0].train()
    second, memory = make_trainer("cut", **sections)
    second.resume()
    second.train()
    assert memory.losses() == whole_memory.losses()[interrupted_after:]  # bit for bit
    for name, tensor in saved_model(whole).state_dict().items():
        assert torch.equal(saved_model(second).state_dict()[name], tensor), name


def test_going_back_before_any_checkpoint_is_going_back_to_the_start(make_trainer: MakeTrainer) -> None:
    clean, clean_memory = make_trainer("clean")
    clean.train()
    trainer, memory = make_trainer("again")
    trainer._take_step()
    trainer.resume()
    trainer.train()
    assert memory.losses() == clean_memory.losses()


def test_a_checkpoint_is_of_the_full_model(make_trainer: MakeTrainer) -> None:
    trainer, _ = make_trainer(checkpoint=CheckpointConfig(save_every="5"))
    trainer.train()
    n_seen = len(np.unique(trainer.train_tokens))
    for path in checkpoint.complete(trainer.checkpoints):
        assert json.loads((path / "model.json").read_text())["n_vocab"] == N_VOCAB
        assert len(load_file(path / "model.safetensors")["transformer.wte.weight"]) == N_VOCAB
        moments = load_file(path / "optimizer.safetensors")
        assert len(moments["exp_avg/transformer.wte.weight"]) == n_seen + 1
        assert checkpoint.damage(path) is None


@pytest.mark.usefixtures("quick_measure")
def test_what_is_counted_is_what_was_computed(make_trainer: MakeTrainer) -> None:
    trainer, memory = make_trainer()
    estimate = measure(trainer, "none")
    assert estimate.train_s == pytest.approx(10 * estimate.step_s)
    trainer.train()
    n_rows = len(np.unique(trainer.train_tokens)) + 1
    flops = flops_per_token(replace(trainer.recipe.model, n_vocab=n_rows), 16)
    for line in memory.metrics:
        if "train/mfu" in line:
            assert line["train/mfu"] == pytest.approx(line["train/tokens_per_s"] * flops / 1e15)


def test_compiled_it_has_the_same_losses(make_trainer: MakeTrainer) -> None:
    eager, eager_memory = make_trainer("eager")
    eager.train()
    compiled, memory = make_trainer("compiled", runtime=replace(eager.runtime, compile=True))
    compiled.train()
    assert compiled.loss_sum.compiled
    assert memory.losses() == pytest.approx(eager_memory.losses(), abs=1e-4)
    norms = [
        [line["train/grad_norm"] for line in m.metrics if "train/grad_norm" in line] for m in (eager_memory, memory)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)

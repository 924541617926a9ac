"""A step is PyTorch's recipe on the mean loss, whoever computes the update; or it changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.windows import Batch, gather, grid
from groundling.kernels.reference import IGNORED_TARGET
from groundling.model.gpt2 import GPT2
from groundling.optim.muon import orthogonal_flops
from groundling.optim.optimizer import OptimConfig, make_optimizer
from groundling.runtime import Runtime
from groundling.training.flops import update_flops
from groundling.training.step import training_step

CONFIG = OptimConfig(weight_decay=0.1, eps=1e-4)
"""eps is above the rounding of gradients that should be zero, those of the keys' biases: else it became updates."""
RATE = 0.01

either_optimizer = pytest.mark.parametrize("native", [False, True])


def batch_of(tokens: NDArray[np.uint16]) -> Batch:
    return gather(tokens, grid(len(tokens), 16)[-5:], 16)  # the last window is a short one


@either_optimizer
@pytest.mark.parametrize("clip", [0.0, 0.3, 100.0])
def test_a_step_clips_and_updates_by_the_mean_loss(
    model: GPT2, tokens: NDArray[np.uint16], cpu: Runtime, native: bool, clip: float
) -> None:
    plain = copy.deepcopy(model)
    optimizer = make_optimizer(model, CONFIG, native)
    expected = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
            {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
    )
    batch = batch_of(tokens)
    for _ in range(3):
        result = training_step(model, model.loss_sum, optimizer, batch, RATE, 2, clip, cpu)
        expected.zero_grad()
        loss = plain.loss_sum(batch.inputs, batch.targets) / batch.n_targets
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or torch.inf)
        expected.step()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for parameter, plain_parameter in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, plain_parameter, rtol=1e-4, atol=1e-5)


@either_optimizer
@pytest.mark.parametrize("what", ["loss", "gradient", "no targets"])
def test_a_step_that_is_not_finite_changes_nothing(
    model: GPT2, tokens: NDArray[np.uint16], cpu: Runtime, native: bool, what: str
) -> None:
    optimizer = make_optimizer(model, CONFIG, native)
    batch = batch_of(tokens)
    assert training_step(model, model.loss_sum, optimizer, batch, RATE, 2, 1.0, cpu).finite
    weights = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])

    def loss_sum(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = model.loss_sum(inputs, targets)
        return loss + torch.inf if what == "loss" else loss

    if what == "gradient":
        model.transformer.h[0].mlp.c_fc.bias.register_hook(lambda gradient: gradient / 0)
    if what == "no targets":
        batch = replace(batch, targets=torch.full_like(batch.targets, IGNORED_TARGET), n_targets=0)
    assert not training_step(model, loss_sum, optimizer, batch, RATE, 2, 1.0, cpu).finite
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)


@either_optimizer
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_loss_scale_leaves_no_trace(
    model: GPT2, tokens: NDArray[np.uint16], cpu: Runtime, native: bool, clip: float
) -> None:
    """In fp32, whose exponents reach; it is a power of two."""
    scaled = copy.deepcopy(model)
    batch = batch_of(tokens)
    results = [
        training_step(each, each.loss_sum, make_optimizer(each, CONFIG, native), batch, RATE, 2, clip, cpu, scale)
        for each, scale in ((model, 1.0), (scaled, 2.0**15))
    ]
    assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)
    assert all(map(torch.equal, model.parameters(), scaled.parameters()))


def test_the_flop_of_an_update_are_those_of_what_muon_updates(model: GPT2) -> None:
    groups = make_optimizer(model, OptimConfig(kind="muon")).param_groups
    expected = sum(
        orthogonal_flops(*part.shape)
        for group in groups
        for matrix in (group["params"] if "momentum" in group else [])
        for part in matrix.chunk(group["parts"])
    )
    assert update_flops(model.config, OptimConfig(kind="muon")) == expected > 0
    assert update_flops(model.config, OptimConfig(kind="muon", turns=2)) == pytest.approx(expected / 2)
    assert update_flops(model.config, OptimConfig(kind="muon", turns=3)) == expected / model.config.n_layer
    assert update_flops(model.config, OptimConfig()) == 0

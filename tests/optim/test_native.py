"""AdamW in C++ is PyTorch's, within rounding, on sizes that fill neither a vector nor a block of the kernel."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from groundling.corpus.tokenizer import Tokenizer
from groundling.model.gpt2 import GPT2
from groundling.optim.fused import FusedAdamW
from groundling.optim.native import NativeAdamW
from groundling.optim.optimizer import OptimConfig, make_optimizer
from groundling.training import checkpoint

SHAPES = [(1,), (7,), (0,), (3, 5), (8, 2), (33, 65), (131, 257)]  # the last has two whole blocks and a part
N_STEPS = 50


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def new_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def optimizer_over(
    weights: list[nn.Parameter], kind: type[FusedAdamW] = NativeAdamW, betas: tuple[float, float] = (0.9, 0.98)
) -> FusedAdamW:
    """Two groups that differ in everything."""
    groups = [
        {"params": weights[:3], "weight_decay": 0.0, "betas": (0.8, 0.999), "eps": 1e-6},
        {"params": weights[3:], "weight_decay": 0.1, "betas": betas, "eps": 1e-8},
    ]
    return kind(groups, lr=0.0)


def take_steps(optimizer: FusedAdamW, weights: list[nn.Parameter], steps: range, scale: float = 1.0) -> None:
    """Steps with gradients of all magnitudes and a changing rate."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            magnitude = 10 ** torch.empty(weight.shape).uniform_(-7, 2, generator=generator)
            weight.grad = magnitude * torch.randn(weight.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step(scale=scale)


def ulps(values: Tensor, expected: Tensor, at_least: float = 0.0) -> float:
    """The largest difference, in units in the last place of the expected value (or of `at_least`)."""
    size = expected.detach().abs().clamp(min=max(at_least, torch.finfo(torch.float32).tiny)).double()
    difference = (values.detach().double() - expected.detach().double()).abs() / (size * torch.finfo(torch.float32).eps)
    return float(difference.max()) if difference.numel() else 0.0


def assert_close(optimizer: FusedAdamW, other: FusedAdamW) -> None:
    for group, others in zip(optimizer.param_groups, other.param_groups, strict=True):
        for weight, others_weight in zip(group["params"], others["params"], strict=True):
            state, others_state = optimizer.state[weight], other.state[others_weight]
            assert state.keys() == others_state.keys()
            assert torch.equal(state["step"], others_state["step"])
            assert ulps(weight, others_weight, at_least=0.1) <= 4
            assert ulps(state["exp_avg_sq"], others_state["exp_avg_sq"]) <= 10
            # Moments of both signs cancel: what is exact is measured against what was added up.
            largest = float(others_state["exp_avg"].abs().max()) if weight.numel() else 0.0
            assert ulps(state["exp_avg"], others_state["exp_avg"], at_least=largest) <= 4


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.0, 0.0), (0.3, 0.5)])
def test_fifty_steps_are_pytorchs(betas: tuple[float, float]) -> None:
    optimizers = []
    for kind in (NativeAdamW, FusedAdamW):
        weights = new_weights()
        optimizers.append(optimizer_over(weights, kind, betas))
        take_steps(optimizers[-1], weights, range(N_STEPS), scale=0.37)
    assert_close(*optimizers)


def test_results_do_not_depend_on_threads() -> None:
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        weights = new_weights()
        optimizer = optimizer_over(weights)
        take_steps(optimizer, weights, range(3))
        results.append((optimizer.gradient_norm(), weights))
    for norm, weights in results[1:]:
        assert norm == results[0][0]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][1], strict=True))


def test_the_norm_is_of_all_gradients() -> None:
    weights = new_weights()
    optimizer = optimizer_over(weights)
    take_steps(optimizer, weights, range(1))
    weights[4].grad = None
    expected = torch.cat([w.grad.flatten().double() for w in weights if w.grad is not None]).norm()
    assert optimizer.gradient_norm() == pytest.approx(float(expected), rel=1e-12)
    weights[3].grad = torch.full((3, 5), 1e30)  # its square is beyond fp32
    assert optimizer.gradient_norm() == pytest.approx(15**0.5 * 1e30)
    for worst in (torch.inf, torch.nan):
        weights[3].grad[2, 4] = worst
        assert not optimizer.gradient_norm() < torch.inf


def test_gradients_are_scaled_in_passing_and_kept() -> None:
    scaled, plain = new_weights(), new_weights()
    optimizer, other = optimizer_over(scaled), optimizer_over(plain)
    gradients = [torch.randn_like(weight) for weight in scaled]
    for weight, other_weight, gradient in zip(scaled, plain, gradients, strict=True):
        weight.grad, other_weight.grad = gradient.clone(), gradient * 0.25
    optimizer.step(scale=0.25)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain, strict=True))
    assert all(torch.equal(weight.grad, gradient) for weight, gradient in zip(scaled, gradients, strict=True))


def test_gradients_may_lie_in_memory_in_any_order() -> None:
    weight, other = (nn.Parameter(torch.ones(33, 65)) for _ in range(2))
    weight.grad = torch.randn(65, 33).t()
    other.grad = weight.grad.contiguous()
    optimizers = [NativeAdamW([w]) for w in (weight, other)]
    assert optimizers[0].gradient_norm() == optimizers[1].gradient_norm()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(weight, other)


def test_a_parameter_without_gradient_stays_and_has_no_moments() -> None:
    weights = new_weights()
    before = weights[4].detach().clone()
    optimizer = optimizer_over(weights)
    for weight in weights:
        weight.grad = None if weight is weights[4] else torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weights[4], before)
    assert weights[4] not in optimizer.state


def test_autograd_notices_a_step() -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = NativeAdamW([weight])
    loss = (weight * weight).sum()
    weight.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("first", "second"), [(NativeAdamW, FusedAdamW), (FusedAdamW, NativeAdamW)])
def test_either_goes_on_from_the_other(first: type[FusedAdamW], second: type[FusedAdamW]) -> None:
    weights = new_weights()
    optimizer = optimizer_over(weights, first)
    take_steps(optimizer, weights, range(5))
    state = copy.deepcopy(optimizer.state_dict())  # else both would have the same moments
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = optimizer_over(copies, second)
    other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == state["param_groups"]
    take_steps(optimizer, weights, range(5, 10))
    take_steps(other, copies, range(5, 10))
    assert_close(other, optimizer)


@pytest.mark.parametrize("native_first", [True, False])
def test_a_checkpoint_of_either_is_continued_by_the_other(model: GPT2, tmp_path: Path, native_first: bool) -> None:
    def step(model: GPT2, optimizer: FusedAdamW) -> None:
        optimizer.param_groups[0]["lr"] = 0.01
        for seed, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    optimizer = make_optimizer(model, OptimConfig(decayed="all"), native=native_first)
    step(model, optimizer)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {}, Tokenizer.gpt2(), 8, keep=1)
    again = GPT2(model.config)
    other = make_optimizer(again, OptimConfig(decayed="all"), native=not native_first)
    checkpoint.restore(path, again, other)
    step(model, optimizer)
    step(again, other)
    assert_close(other, optimizer)

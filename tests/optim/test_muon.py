"""Muon: updates that are orthogonal, of the blocks' matrices and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from groundling.kernels import products
from groundling.model.gpt2 import GPT2
from groundling.optim.fused import FusedAdamW
from groundling.optim.muon import ITERATIONS, STRIP, TOGETHER, Muon, NativeMuon, orthogonal, orthogonal_flops, symmetric
from groundling.optim.native import NativeAdamW
from groundling.optim.optimizer import OptimConfig, make_optimizer

from ..conftest import our_products

CONFIG = OptimConfig(kind="muon", momentum=0.8, weight_decay=0.5, eps=1e-6, last_block_share=0.25)
RATE = 0.01


def expected_orthogonal(matrix: Tensor) -> Tensor:
    """By the singular values, on which the polynomial works one by one, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (16, 48), (48, 16), (33, 65), (STRIP + 9, STRIP + 9), (STRIP + 9, 900)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_all_directions_of_a_matrix_become_alike(shape: tuple[int, int], size: float) -> None:
    matrix = size * drawn(*shape)
    found = orthogonal(matrix, torch.float32)
    torch.testing.assert_close(found.double(), expected_orthogonal(matrix), rtol=1e-3, atol=1e-4)
    if min(shape) < max(shape):  # a square matrix may have a singular value near 0, which stays smaller
        values = torch.linalg.svdvals(found)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(48, 16), (40, 40), (40, 160)])
def test_small_directions_are_neither_lost_nor_made_of_rounding(shape: tuple[int, int]) -> None:
    """Eight decades of singular values, of which fp32 holds three and a half in X X.T."""
    u, _, v = torch.linalg.svd(drawn(*shape).double(), full_matrices=False)
    matrix = ((u * torch.logspace(0, -8, min(shape), dtype=torch.float64)) @ v).float()
    found = orthogonal(matrix, torch.float32)
    torch.testing.assert_close(found.double(), expected_orthogonal(matrix), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("shape", [(48, 16), (STRIP + 9, STRIP + 9), (40, 160)])
def test_products_may_be_of_another_format(shape: tuple[int, int], ours: bool) -> None:
    matrix = drawn(*shape)
    with our_products(ours):
        found = orthogonal(matrix, torch.bfloat16, own_products=True)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, orthogonal(matrix, torch.float32), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96)])
@pytest.mark.parametrize("large", [0, 5])
def test_rounding_to_bf16_grows_to_no_direction_of_its_own(shape: tuple[int, int], ours: bool, large: int) -> None:
    """Four decades of singular values, or a direction that leaves all others behind: a tenth is lost at most."""
    if large:
        matrix = drawn(*shape) + large * drawn(shape[0], 1) @ drawn(1, shape[1])
    else:
        u, _, v = torch.linalg.svd(drawn(*shape).double(), full_matrices=False)
        matrix = ((u * torch.logspace(0, -4, min(shape), dtype=torch.float64)) @ v).float()
    with our_products(ours):
        found = orthogonal(matrix, torch.bfloat16, own_products=True).double()
    exact = expected_orthogonal(matrix)
    assert float((found - exact).norm()) < 0.1 * float(exact.norm())
    assert float(torch.linalg.matrix_norm(found, 2)) < 1.25


@pytest.mark.parametrize("ours", [False, True])
def test_a_square_that_rounds_below_zero_stays_small(ours: bool) -> None:
    """The smaller one of X X.T is 0.0013, and -0.001 in bf16: three iterations of that would make 1e8 of it."""
    matrix = torch.tensor([[0.5, 0.5, 0, 0.0419921875], [0.5, 0.498046875, 0.030639648438, 0]])
    with our_products(ours):
        found = orthogonal(matrix, torch.bfloat16, own_products=True).double()
    assert float((found - expected_orthogonal(matrix)).norm()) < 0.05


def test_all_iterations_are_taken() -> None:
    assert {sum(groups) for groups in TOGETHER.values()} == {ITERATIONS}


@pytest.mark.parametrize("native", [False, True])
def test_only_the_optimizer_for_cpus_takes_our_own_products(
    model: GPT2, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--runtime.kernels reference` is PyTorch throughout."""
    taken = []
    monkeypatch.setattr(products, "available", lambda: True)
    monkeypatch.setattr(products, "symmetric", lambda *arguments: taken.append(1) or symmetric(*arguments))
    give_gradients(model, 1)
    take_step(make_optimizer(model, CONFIG, native, torch.bfloat16), 1.0)
    assert bool(taken) is native


@pytest.mark.parametrize("rows", [1, STRIP - 1, STRIP, STRIP + 1, 2 * STRIP + 7])
def test_a_symmetric_product_is_the_product(rows: int) -> None:
    X = drawn(rows, 11).double()
    A = symmetric(X, X)
    torch.testing.assert_close(A, A.T, rtol=0, atol=1e-12)  # within a strip, and not every CPU sums in the same order
    torch.testing.assert_close(A, X @ X.T)
    torch.testing.assert_close(symmetric(A, A, 3.0, A, -0.5), 3 * A @ A - 0.5 * A)


def test_of_no_gradient_comes_no_update() -> None:
    assert torch.equal(orthogonal(torch.zeros(4, 6), torch.float32), torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (STRIP + 9, STRIP + 9), (900, STRIP + 9)])
def test_its_flop_are_those_of_its_products(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counted:
        orthogonal(drawn(*shape), torch.float32)
    assert counted.get_total_flops() == orthogonal_flops(*shape)


def give_gradients(model: GPT2, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def take_step(optimizer: FusedAdamW, scale: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE
    optimizer.step(scale=scale)


@pytest.mark.parametrize(("native", "kind"), [(False, Muon), (True, NativeMuon)])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_an_update_is_the_formula(model: GPT2, native: bool, kind: type[FusedAdamW], turns: int) -> None:
    """Jordan's algorithm with Nesterov's momentum and Liu's factor in float64; queries, keys and values apart."""
    optimizer = make_optimizer(model, replace(CONFIG, turns=turns), native)
    assert type(optimizer) is kind
    taken = min(turns, model.config.n_layer)  # there is no turn in which nobody moves
    matrices = {name: p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}
    assert len(matrices) == 4 * model.config.n_layer
    expected = {name: p.detach().double().clone() for name, p in matrices.items()}
    moments = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step, scale in ((1, 0.5), (2, 0.1), (3, 0.3), (4, 0.2)):
        give_gradients(model, step)
        for name, parameter in matrices.items():
            assert parameter.grad is not None
            gradient = scale * parameter.grad.double()
            moments[name] = 0.8 * moments[name] + 0.2 * gradient
            block = int(name.split(".")[2])
            if step % taken != block % taken:
                continue
            ahead = 0.2 * gradient + 0.8 * moments[name]
            parts = ahead.split(model.config.n_embd) if "c_attn" in name else [ahead]
            update = torch.cat([0.2 * max(part.shape) ** 0.5 * expected_orthogonal(part) for part in parts])
            rate = taken * RATE * 0.25 ** (block / (model.config.n_layer - 1))
            expected[name] = expected[name] * (1 - rate * 0.5) - rate * update
        take_step(optimizer, scale)
    for name, parameter in matrices.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("native", "kind"), [(False, FusedAdamW), (True, NativeAdamW)])
def test_everything_else_is_adamws(model: GPT2, native: bool, kind: type[FusedAdamW]) -> None:
    other = GPT2(model.config)
    other.load_state_dict(model.state_dict())
    optimizers = (
        make_optimizer(model, CONFIG, native),
        make_optimizer(other, OptimConfig(weight_decay=0.5, eps=1e-6), native),
    )
    assert type(optimizers[1]) is kind
    for step in (1, 2):
        for network, optimizer in zip((model, other), optimizers, strict=True):
            give_gradients(network, step)
            take_step(optimizer, 0.5)
    for (name, mine), (_, adamws) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, adamws) == (".h." not in name or mine.ndim < 2), name


def test_every_gradient_counts_in_the_norm(model: GPT2) -> None:
    """Clipping is by the norm of all, taken before the step drops any."""
    for native in (False, True):
        give_gradients(model, 1)
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        found = make_optimizer(model, CONFIG, native).gradient_norm()
        assert float(found) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(("device", "n_products"), [("cpu", 3), ("meta", 1)])
def test_only_a_cpu_takes_symmetric_products_in_strips(device: str, n_products: int) -> None:
    """A GPU would wait for the launches, and Apple's write wrongly to parts of a matrix (pytorch#187255)."""
    left = torch.empty(2 * STRIP + 9, 20, device=device)
    with Products() as products:
        symmetric(left, left)
    assert products.n == n_products


class Products(TorchDispatchMode):
    """Counts them."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.ops.aten.addmm.out
        return func(*args, **(kwargs or {}))

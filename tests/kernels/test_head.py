"""The fused head against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundling.kernels import head, products
from groundling.kernels.reference import IGNORED_TARGET

from ..conftest import our_products

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative errors of sums of rounded products: a few times the format's own."""


def formula(hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int) -> Tensor:
    """The sum over targets of log(sum of e^logit, the last n_last times) - logit of the target."""
    logits, counts = hidden @ weight.T, torch.zeros(len(weight), dtype=hidden.dtype)
    counts[-1] = math.log(n_last)
    counted = targets != IGNORED_TARGET
    return ((logits + counts).logsumexp(1) - logits.gather(1, targets.clamp(min=0)[:, None])[:, 0])[counted].sum()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Of sums of terms around 0.1, which may cancel."""
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=0.1))


@settings(max_examples=60, deadline=None)
@given(
    n_rows=st.integers(1, 70),
    n_embd=st.integers(1, 70),
    n_vocab=st.one_of(st.integers(1, 400), st.sampled_from([511, 512, 513, 1100])),
    n_last=st.sampled_from([1, 3, 40_000]),
    dtype=st.sampled_from(list(ERRORS)),
    unit=st.booleans(),
    rows_at_a_time=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_the_formulas(
    n_rows: int, n_embd: int, n_vocab: int, n_last: int, dtype: torch.dtype, unit: bool, rows_at_a_time: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_rows, n_embd, generator=generator).to(dtype).float().requires_grad_()
    weight = torch.randn(n_vocab, n_embd, generator=generator).mul(0.2).to(dtype).float().requires_grad_()
    targets = torch.randint(0, n_vocab, (n_rows,), generator=generator)
    targets[torch.rand(n_rows, generator=generator) < 0.2] = IGNORED_TARGET
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    (0.37 * formula(*exact, targets, n_last)).backward()

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        for module in (head, products):
            patch.setattr(module, "CHUNK_BYTES", rows_at_a_time * n_vocab * dtype.itemsize)
        patch.setattr(products, "available", lambda: unit)
        loss = head.linear_cross_entropy(hidden, weight, targets, n_last)
    (0.37 * loss).backward()

    assert loss.dtype is torch.float32
    assert relative_error(loss, formula(*exact, targets, n_last)) < ERRORS[dtype]
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype is torch.float32
        assert relative_error(ours.grad, theirs.grad) < ERRORS[dtype]


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize(("n_vocab", "n_last"), [(11_707, 38_551), (50_257, 1)])
def test_loss_and_gradients_over_gpt2s_ids(n_vocab: int, n_last: int, dtype: torch.dtype, unit: bool) -> None:
    """All of them, and those of Tiny Shakespeare with a row for the others."""
    check = test_loss_and_gradients_are_the_formulas.hypothesis.inner_test  # type: ignore[attr-defined]
    check(n_rows=5, n_embd=33, n_vocab=n_vocab, n_last=n_last, dtype=dtype, unit=unit, rows_at_a_time=9, seed=0)


@pytest.mark.parametrize("unit", [False, True])
def test_the_gradient_is_exact_where_the_model_is_almost_sure(unit: bool) -> None:
    """p - 1 from a rounded p would be off by as much as it is."""
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[6.0, 0.0], [0.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16), our_products(unit):
        head.linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(hidden.grad[0, 0]) == pytest.approx(6 * (1 / (1 + math.exp(-6)) - 1), rel=1e-2)


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight = torch.randn(9, 6), torch.randn(11, 6, requires_grad=True)
    targets = torch.arange(9)
    with torch.no_grad():
        loss = head.linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert loss == head.linear_cross_entropy(hidden, weight, targets)


def test_rows_do_not_depend_on_threads_or_chunks() -> None:
    logits, targets = torch.randn(37, 1003), torch.randint(0, 1003, (37,))
    results = []
    n_threads = torch.get_num_threads()
    for n, first in ((1, 37), (2, 37), (2, 5), (1, 32)):
        torch.set_num_threads(n)
        gradient, losses = logits.clone(), torch.empty(37)
        sweep = head.Sweep(torch.empty(37, 1), torch.empty(1003, 1), targets, 1)
        for chunk in (slice(first), slice(first, 37)):
            sweep._cross_entropy(gradient[chunk], targets[chunk], True, losses[chunk])
        results.append((gradient, losses))
    torch.set_num_threads(n_threads)
    assert all(torch.equal(gradient, results[0][0]) for gradient, _ in results)
    assert all(torch.equal(losses, results[0][1]) for _, losses in results)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float, unit: bool) -> None:
    hidden, weight = torch.ones(3, 4, requires_grad=True), torch.ones(40, 4)
    weight[17, 0] = value
    for targets in ([0, 17, 39], [0, 1, 39]):
        with torch.autocast("cpu", torch.bfloat16, enabled=unit), our_products(unit):
            loss = head.linear_cross_entropy(hidden, weight, torch.tensor(targets))
        assert not math.isfinite(float(loss.detach()))


@pytest.mark.parametrize("target", [7, -1, -99])
def test_a_target_that_is_no_token_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match=str(target)):
        head.linear_cross_entropy(torch.ones(3, 2), torch.ones(7, 2), torch.tensor([6, -100, target]))


@pytest.mark.parametrize(("hidden", "n_targets"), [((4, 8), 3), ((4, 8), 6), ((4, 7), 4), ((1, 4, 8), 4)])
def test_shapes_that_do_not_belong_together_are_refused(hidden: tuple[int, ...], n_targets: int) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        head.linear_cross_entropy(torch.ones(hidden), torch.ones(17, 8), torch.zeros(n_targets, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_formats_are_pytorchs(dtype: torch.dtype) -> None:
    hidden, weight, targets = torch.randn(5, 8, dtype=dtype), torch.randn(17, 8, dtype=dtype), torch.arange(5)
    with torch.no_grad():
        loss = head.linear_cross_entropy(hidden, weight, targets)
    assert float(loss) == pytest.approx(float(formula(hidden.double(), weight.double(), targets, 1)), rel=2e-3)


@pytest.mark.parametrize("logit", [0.0, -100.0, -300.0, 1e5])
def test_what_all_logits_share_changes_nothing(logit: float) -> None:
    """GPT-2's are around -100: what they have in common must not round away what they differ by."""
    hidden, weight = torch.full((3, 1), logit), torch.ones(1001, 1, requires_grad=True)
    loss = head.linear_cross_entropy(hidden, weight, torch.tensor([0, 500, 1000]), 1)
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(1001), rel=3e-7)
    assert weight.grad is not None
    expected = torch.full((1001, 1), 3 * logit / 1001)
    expected[[0, 500, 1000]] -= logit
    torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_no_targets_have_no_loss(dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = head.linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long), 1)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()

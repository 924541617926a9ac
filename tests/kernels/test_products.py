"""Products of bf16 against float64: by this CPU's own tiles or vectors, and by tiles in plain C++."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundling import machine
from groundling.kernels import products, reference
from groundling.kernels.build import BuildError

BF16 = 8e-3
"""Relative error of sums of products of rounded factors, rounded once more: twice the format's own."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def assert_weight_gradient(n_rows: int, n_out: int, n_in: int) -> None:
    """Factors are bf16 already, so all error is of fp32 sums: it goes with the terms, which may cancel in the sum."""
    d_y, x = normal(1, n_rows, n_out), normal(2, n_rows, n_in)
    d_weight, d_bias = products.weight_gradient(d_y, x)
    assert d_bias is not None
    assert torch.equal(products.weight_gradient(d_y, x, with_bias=False)[0], d_weight)
    d_y, x = d_y.double(), x.double()
    assert bool(((d_weight - d_y.T @ x).abs() <= 1e-5 * (d_y.abs().T @ x.abs())).all())
    assert bool(((d_bias - d_y.sum(0)).abs() <= 1e-5 * d_y.abs().sum(0)).all())


@settings(max_examples=40, deadline=None)
@given(n_rows=st.integers(0, 200), n_out=st.integers(1, 200), n_in=st.integers(1, 200))
def test_the_gradient_of_a_weight(n_rows: int, n_out: int, n_in: int) -> None:
    assert_weight_gradient(n_rows, n_out, n_in)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 31), (70, 600, 40)])
def test_the_gradient_of_a_weight_on_other_cpus(shape: tuple[int, int, int]) -> None:
    assert_weight_gradient(*shape)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (33, 65, 31), (70, 600, 40), (64, 96, 3100)])
def test_a_layer_and_the_gradient_of_its_input(shape: tuple[int, int, int]) -> None:
    n_rows, n_out, n_in = shape
    x, weight, d_y = normal(1, n_rows, n_in), normal(2, n_out, n_in), normal(3, n_rows, n_out)
    bias = torch.linspace(-3, 3, n_out)
    for ours, exact in (
        (products.linear(x, weight, bias), x.double() @ weight.double().T + bias.double()),
        (products.linear(x, weight, None), x.double() @ weight.double().T),
        (products.input_gradient(d_y, weight), d_y.double() @ weight.double()),
    ):
        assert ours.dtype is torch.bfloat16
        assert ours.shape == exact.shape
        assert not n_rows or relative_error(ours, exact) < BF16 / 2  # rounded once


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("shape", [(1, 1), (31, 40), (33, 7), (64, 64), (201, 130), (290, 20)])
def test_a_symmetric_product(shape: tuple[int, int]) -> None:
    assert_symmetric_product(*shape)


def assert_symmetric_product(n: int, n_terms: int) -> None:
    """Left of the diagonal is the product, whether that is symmetric or not, and right of it its mirror image."""
    left, right, plus = normal(1, n, n_terms), normal(2, n, n_terms), normal(3, n, n)
    exact = left.double() @ right.double().T
    for ours, expected in (
        (products.symmetric(left, right), exact),
        (products.symmetric(left, right, 1.5, plus, -0.5), 1.5 * exact - 0.5 * plus.double()),
    ):
        assert torch.equal(ours, ours.T)
        assert relative_error(ours.tril(), expected.tril()) < BF16 / 2  # rounded once


@pytest.mark.parametrize("n_rows", [1, 201, 530])
def test_a_product_is_the_same_by_any_number_of_threads(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its rows are dealt out to them; some may get none."""
    x, weight, d_y = normal(1, n_rows, 50), normal(2, 330, 50), normal(3, n_rows, 330)
    found = []
    for n_threads in (1, 2, 3, 7, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        forward, d_x = products.linear(x, weight, None), products.input_gradient(d_y, weight)
        found.append((forward, d_x, *products.weight_gradient(d_y, x), products.symmetric(x, x)))
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("shape", [(3072, 33, 33), (3073, 33, 33), (4100, 300, 801)])
def test_sums_too_long_for_one_go(shape: tuple[int, int, int]) -> None:
    """They are kept in between, for some columns at a time; the bias is summed for the first of these alone."""
    assert_weight_gradient(*shape)


def test_symmetric_sums_too_long_for_one_go() -> None:
    assert_symmetric_product(800, 3100)


def attention_and_gradient(qkv: Tensor, n_head: int, d_mixed: Tensor) -> tuple[Tensor, Tensor]:
    mixed, log_sums = products.attention(qkv, n_head)
    return mixed, products.attention_backward(qkv, log_sums, d_mixed)


@pytest.mark.parametrize(("length", "n_head", "width"), [(300, 2, 64), (513, 1, 33), (70, 1, 160), (64, 1, 65)])
def test_attention_over_many_blocks_and_in_wide_heads(length: int, n_head: int, width: int) -> None:
    assert_attention(length, n_head, width)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(
    ("length", "n_head", "width"), [(1, 1, 1), (31, 2, 33), (65, 1, 64), (40, 3, 20), (65, 2, 48), (290, 1, 20)]
)
def test_attention_on_other_cpus(length: int, n_head: int, width: int) -> None:
    assert_attention(length, n_head, width)


def assert_attention(length: int, n_head: int, width: int) -> None:
    qkv, d_mixed = normal(1, 2, length, 3 * n_head * width), normal(2, 2, length, n_head * width)
    exact = qkv.double().requires_grad_()
    expected = reference.self_attention(exact, n_head)
    expected.backward(d_mixed.double())
    mixed, gradient = attention_and_gradient(qkv, n_head, d_mixed)
    assert relative_error(mixed, expected.detach()) < BF16
    assert exact.grad is not None
    if length > 1:  # else all but the values' gradients is nothing but rounding
        assert relative_error(gradient, exact.grad) < BF16


@pytest.mark.parametrize("place", [0, 1, 31, 32, 50, 63, 69])
def test_no_position_sees_a_later_one(place: int) -> None:
    """To the bit: other keys and values later on change nothing before, and get no gradient from there."""
    qkv, d_mixed = normal(1, 1, 70, 3 * 40), torch.zeros(1, 70, 40, dtype=torch.bfloat16)
    d_mixed[:, : place + 1] = normal(2, 1, place + 1, 40)
    other = qkv.clone()
    other[:, place + 1 :] *= 100
    mixed, gradient = attention_and_gradient(qkv, 2, d_mixed)
    assert torch.equal(mixed[:, : place + 1], attention_and_gradient(other, 2, d_mixed)[0][:, : place + 1])
    assert not gradient[:, place + 1 :].any()


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("scale", [1, 10, 40])
def test_losses_of_a_model_that_is_far_off(scale: int) -> None:
    """Their exponentials overflow unless they are taken less a shift that is raised where the first one was no good."""
    hidden, weight, targets = normal(1, 50, 96), scale * normal(2, 1300, 96) / 96**0.5, torch.arange(50) * 26
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight.bfloat16())]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    expected.sum().backward()
    losses, d_hidden, d_weight = products.head(hidden, weight.bfloat16(), targets, 1, True)
    assert scale < 40 or float(expected.detach().max()) > 150
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip((d_hidden, d_weight), exact, strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert relative_error(ours, theirs.grad) < BF16


@pytest.mark.usefixtures("lanes")
def test_losses_are_finer_than_bf16() -> None:
    """Of two ids with logits that bf16 has exactly: all error is of the exponentials, their sum and its logarithm."""
    hidden = torch.linspace(-8, 8, 800)[:, None].bfloat16()
    weight, targets = torch.tensor([[0.0], [1.0]]).bfloat16(), torch.zeros(800, dtype=torch.int64)
    losses, _, _ = products.head(hidden, weight, targets, 1, False)
    exact = torch.nn.functional.softplus(hidden[:, 0].double())
    torch.testing.assert_close(losses.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("scale", [1, 1e5, 1e10])
def test_attention_with_scores_far_apart(scale: float) -> None:
    """Where one score leaves all others behind, its value is the output."""
    qkv = normal(1, 1, 40, 3 * 32).float()
    qkv[..., : 2 * 32] *= scale**0.5
    mixed, _ = products.attention(qkv.bfloat16(), 1)
    exact = reference.self_attention(qkv.bfloat16().double(), 1)
    assert relative_error(mixed, exact) < BF16


@pytest.mark.parametrize(("n_rows", "n_vocab", "n_in"), [(40, 3300, 800), (3100, 70, 40), (4096, 33, 50)])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_the_head_at_sizes_that_are_cut(
    n_rows: int, n_vocab: int, n_in: int, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More ids or positions than terms of a sum are taken in one go, more columns than stay in the nearest cache."""
    if in_chunks:
        monkeypatch.setattr(products, "CHUNK_BYTES", n_rows * n_vocab)  # of positions x ids, two bytes each: two chunks
    hidden, weight = normal(1, n_rows, n_in), normal(2, n_vocab, n_in) / 20
    targets = torch.arange(n_rows) * 80 % n_vocab
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
    expected.sum().backward()
    losses, *gradients = products.head(hidden, weight, targets, 1, True)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert relative_error(ours, theirs.grad) < BF16


def test_a_compiler_that_cannot_make_them_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise BuildError(f"g++ knows no {name}")

    monkeypatch.setattr(machine, "cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setattr(products, "library", fail)
    assert products.available.__wrapped__() is False
    assert "g++ knows no products" in caplog.text


@pytest.mark.parametrize("found", [0, 1])
def test_a_unit_that_is_withheld_costs_a_warning(
    found: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old compiler compiles them all, without the unit's instructions: for nothing, or for slower vectors."""
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"amx_bf16", "avx512_bf16"})
    without = SimpleNamespace(**{f"groundling_unit_of_{name}": lambda: found for name in products.libraries()})
    monkeypatch.setattr(products, "library", lambda name: without)
    assert products.available.__wrapped__() is False
    assert "does not know the CPU's fastest instructions for bf16" in caplog.text


def test_this_cpu_multiplies_by_the_fastest_it_has() -> None:
    """Elsewhere tiles in plain C++ take the place of what is tested here, and would keep it."""
    if "amx_bf16" not in machine.cpu_flags() and products.libraries():
        assert products.available()


def test_vectors_do_where_there_is_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    vectors = SimpleNamespace(**{f"groundling_unit_of_{name}": lambda: 1 for name in products.libraries()})
    monkeypatch.setattr(products, "library", lambda name: vectors)
    assert products.available.__wrapped__() is True


@pytest.mark.usefixtures("lanes")
def test_a_loss_beyond_all_raises_is_infinite() -> None:
    weight = torch.zeros(2, 32, dtype=torch.bfloat16)
    weight[1] = 1000
    losses, _, _ = products.head(torch.ones(1, 32, dtype=torch.bfloat16), weight, torch.tensor([0]), 1, False)
    assert math.isinf(float(losses))


@pytest.mark.usefixtures("lanes")
def test_the_head_has_the_same_bits_with_any_number_of_threads() -> None:
    hidden, weight, targets = normal(1, 45, 40), normal(2, 1100, 40), torch.arange(45) * 20
    targets[7] = reference.IGNORED_TARGET
    results, before = [], torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(products.head(hidden, weight, targets, 5, True))
    torch.set_num_threads(before)
    assert results[0][0][7] == 0
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)

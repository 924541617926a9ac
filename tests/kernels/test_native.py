"""The C++ kernels against the reference in float64, forward and backward."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundling import kernels, runtime
from groundling.generation.decoder import Chunk, TorchDecoder
from groundling.kernels import native, reference
from groundling.kernels.build import library
from groundling.model.gpt2 import GPT2, GPTConfig

from ..conftest import our_products

ERRORS = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
"""Relative errors of rounded products and sums: a few times the format's own."""

UNITS = {torch.float32: (False,), torch.bfloat16: (False, True)}
"""By PyTorch, and by our own products of bf16."""

formats = st.sampled_from(list(ERRORS))
widths = st.integers(1, 100)
seeds = st.integers(0, 99)


@pytest.fixture
def native_backend() -> None:
    kernels.select("native")


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def outputs_and_gradients(operation: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What it gives, and the gradients of its inputs under random gradients of what it gives."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        outputs = operation(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    gradients = [g.to(o.dtype) for o, g in zip(outputs, randoms(7, *(o.shape for o in outputs)), strict=True)]
    torch.autograd.backward(outputs, gradients)
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype is leaf.dtype
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_agrees(
    name: str, inputs: list[Tensor], dtype: torch.dtype, *arguments: int, factor: float = 1, n_terms: int = 1
) -> None:
    """Of each result, the error's norm is small beside its own, up to a factor where the operation amplifies errors.

    A gradient summed over many rows, or `n_terms` columns, may come out near 0 by chance, and its rounding errors with
    it do not. Attention gets its input in the format in which the product before it gives it.
    """
    own = (lambda x: x.to(dtype)) if name == "self_attention" else (lambda x: x)
    least = 0.5 * (inputs[0].shape[:-1].numel() * n_terms) ** 0.5
    inputs = [tensor.to(dtype).float() for tensor in inputs]
    theirs = outputs_and_gradients(
        lambda *x: getattr(reference, name)(*x, *arguments), [tensor.double() for tensor in inputs], torch.float64
    )
    for unit in UNITS[dtype]:
        with our_products(unit):
            ours = outputs_and_gradients(lambda *x: getattr(native, name)(*map(own, x), *arguments), inputs, dtype)
        for our, exact in zip(ours, theirs, strict=True):
            assert our.shape == exact.shape
            error = (our.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=least)
            assert float(error) < factor * ERRORS[dtype]


@settings(max_examples=40, deadline=None)
@given(n_rows=st.integers(1, 150), width=st.integers(4, 100), dtype=formats, seed=seeds)
def test_add_layer_norm(n_rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    """Not of 2 or 3 columns, whose rows may be nearly constant: their gradient is all rounding."""
    assert_agrees("add_layer_norm", randoms(seed, (n_rows, width), (n_rows, width), (width,), (width,)), dtype)


def test_add_layer_norm_of_what_spreads() -> None:
    assert_agrees("add_layer_norm", randoms(0, (3, 5, 24), (5, 24), (24,), (24,)), torch.float32)


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from([(0,), (1,), (77,), (3, 11)]), width=widths, n_vocab=st.integers(1, 50), seed=seeds)
def test_tied_embedding(shape: tuple[int, ...], width: int, n_vocab: int, seed: int) -> None:
    (weight,) = randoms(seed, (n_vocab, width))
    tokens = torch.randint(n_vocab, shape, generator=torch.Generator().manual_seed(seed))
    ours = outputs_and_gradients(lambda x: native.tied_embedding(tokens, x), [weight], torch.float32)
    theirs = outputs_and_gradients(lambda x: reference.tied_embedding(tokens, x), [weight.double()], torch.float64)
    for our, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_tied_embedding_of_which_one_output_is_used(used: int) -> None:
    gradients = []
    for backend in (native, reference):
        (weight,) = randoms(0, (9, 6))
        weight.requires_grad_()
        backend.tied_embedding(torch.tensor([[3, 3], [8, 0]]), weight)[used].square().sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_gradient_of_a_tied_matrix_may_lie_anyhow() -> None:
    """A sum's gradient is one number spread over all, which nothing can be added to in place."""
    gradients = []
    for backend in (native, reference):
        (weight,) = randoms(0, (9, 6))
        weight.requires_grad_()
        rows, tied = backend.tied_embedding(torch.tensor([[3, 3], [8, 0]]), weight)
        (rows.square().sum() + tied.sum()).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_gradient_of_a_tied_matrix_has_the_same_bits_with_any_number_of_threads() -> None:
    tokens, results, before = torch.randint(7, (40, 50)), [], torch.get_num_threads()
    for n_threads in (1, 1, 2, 3):
        torch.set_num_threads(n_threads)
        inputs = randoms(0, (7, 64))
        results.append(outputs_and_gradients(lambda x: native.tied_embedding(tokens, x), inputs, torch.float32))
    torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


def test_a_tied_matrix_has_one_gradient_and_it_is_the_heads() -> None:
    """A second one of 154 MB for the embedding would cost an AMX machine a fortieth of its step."""
    (weight, hidden) = randoms(0, (9, 6), (4, 6))
    weight.requires_grad_()
    rows, tied = native.tied_embedding(torch.tensor([3, 3, 8, 0]), weight)
    places = list[int]()
    tied.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    native.linear_cross_entropy(hidden + rows, tied, torch.tensor([1, 2, 3, 4])).backward()
    assert weight.grad is not None
    assert places == [weight.grad.data_ptr()]


@pytest.mark.parametrize("used", [0, 1])
def test_add_layer_norm_of_which_one_output_is_used(used: int) -> None:
    inputs = randoms(0, (7, 24), (7, 24), (24,), (24,))
    gradients = []
    for backend, dtype in ((native, torch.float32), (reference, torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        backend.add_layer_norm(*leaves)[used].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["linear", "linear_gelu"]),
    shape=st.sampled_from([(1,), (77,), (3, 11), (2, 1)]),
    width=widths,
    n_out=widths,
    dtype=formats,
    seed=seeds,
)
def test_linear(name: str, shape: tuple[int, ...], width: int, n_out: int, dtype: torch.dtype, seed: int) -> None:
    """GELU's slope has a zero, beside which it is small and its rounding, or that of what it is taken of, is not."""
    x, weight, bias = randoms(seed, (*shape, width), (n_out, width), (n_out,))
    factor = 3 if name == "linear_gelu" else 1
    assert_agrees(name, [x, weight / width**0.5, bias], dtype, factor=factor, n_terms=n_out)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("dtype", list(ERRORS))
def test_sweeps_on_other_cpus(dtype: torch.dtype) -> None:
    assert_agrees("add_layer_norm", randoms(1, (77, 33), (77, 33), (33,), (33,)), dtype)
    x, weight, bias = randoms(2, (77, 33), (50, 33), (50,))
    assert_agrees("linear_gelu", [x, weight / 33**0.5, bias], dtype, factor=3, n_terms=50)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7FFF8000, 0x7FC00000, 0x7F800001])
@pytest.mark.parametrize("width", [1, 37])
def test_what_is_no_number_stays_none_in_bf16(bits: int, width: int) -> None:
    x = torch.full((3, width), bits, dtype=torch.int32).view(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, normed = native.add_layer_norm(x, torch.zeros(3, width), torch.ones(width), torch.zeros(width))
    assert normed.dtype is torch.bfloat16
    assert normed.isnan().all()


@pytest.mark.parametrize("name", ["linear", "linear_gelu"])
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("widths", [(8, 800), (800, 8)])
def test_factors_that_do_not_fit_are_refused(name: str, dtype: torch.dtype, widths: tuple[int, int]) -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16),
        pytest.raises(ValueError, match="do not belong together"),
    ):
        getattr(native, name)(torch.ones(4, widths[0]), torch.ones(6, widths[1]), torch.zeros(6))


@settings(max_examples=40, deadline=None)
@given(
    n_windows=st.integers(1, 3),
    length=st.one_of(st.integers(1, 80), st.sampled_from([127, 128, 129, 257, 300])),
    n_head=st.integers(1, 4),
    width=st.integers(1, 40),
    dtype=formats,
    seed=seeds,
)
def test_self_attention(n_windows: int, length: int, n_head: int, width: int, dtype: torch.dtype, seed: int) -> None:
    qkv = randoms(seed, (n_windows, length, 3 * n_head * width))
    assert_agrees("self_attention", qkv, dtype, n_head)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("length", [1023, 1024])
def test_self_attention_of_the_longest_windows(length: int, dtype: torch.dtype) -> None:
    assert_agrees("self_attention", randoms(0, (1, length, 3 * 9)), dtype, 1)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
def test_layers_of_gpt2s_widths(width: int, dtype: torch.dtype) -> None:
    assert_agrees("add_layer_norm", randoms(0, (21, width), (21, width), (width,), (width,)), dtype)
    assert_agrees("linear_gelu", randoms(0, (21, width), (70, width), (70,)), dtype, n_terms=width)


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("largest", [5, 20, 80])
def test_self_attention_of_scores_that_are_not_small(dtype: torch.dtype, largest: float) -> None:
    """As a trained network's are: what is made again of them in bf16 must not be rounded before it is an exponent."""
    heads = randoms(0, (2, 150, 3, 3, 32))[0]
    scores = heads[:, :, 0].transpose(1, 2) @ heads[:, :, 1].permute(0, 2, 3, 1) / 32**0.5
    heads[:, :, :2] *= (largest / scores.abs().max()) ** 0.5
    assert_agrees("self_attention", [heads.view(2, 150, -1)], dtype, 3, factor=10 if dtype is torch.float32 else 2)


def test_heads_that_are_not_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="3 equal heads"):
        native.self_attention(torch.ones(1, 4, 30), 3)


def test_self_attention_of_what_all_positions_share() -> None:
    """What keys and values have in common takes no part in the gradients of the scores."""
    assert_agrees("self_attention", [10 + randoms(0, (1, 300, 3 * 64))[0]], torch.float32, 1, factor=100)


@pytest.mark.parametrize("value", [2.3, 333.3, 9999.7])
@pytest.mark.parametrize("width", [3, 48, 768, 1600])
def test_a_constant_row_normalised_is_nothing(value: float, width: int) -> None:
    x = torch.full((2, width), value)
    normed = native.add_layer_norm(x, torch.zeros_like(x), torch.ones(width), torch.zeros(width))[1]
    assert not normed.any()


@pytest.mark.parametrize("value", [0.1, -3.3])
def test_many_equal_rows_do_not_drift(value: float) -> None:
    rows, (matrix, bias) = torch.full((1 << 17, 2), 1.0), (torch.ones(3, 2), torch.zeros(3, requires_grad=True))
    native.linear(rows, matrix, bias).backward(torch.full((len(rows), 3), value))
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((3,), value * len(rows)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", list(ERRORS))
def test_no_rows_are_no_error(dtype: torch.dtype) -> None:
    matrix, vector = torch.ones(6, 6), torch.ones(6)
    for name, inputs, arguments in (
        ("linear", [torch.empty(0, 6), matrix, vector], ()),
        ("linear_gelu", [torch.empty(2, 0, 6), matrix, vector], ()),
        ("add_layer_norm", [torch.empty(0, 6), torch.empty(0, 6), vector, vector], ()),
        ("self_attention", [torch.empty(0, 300, 24)], (2,)),
    ):
        for unit in UNITS[dtype]:
            with our_products(unit):
                results = outputs_and_gradients(lambda *x: getattr(native, name)(*x, *arguments), inputs, dtype)  # noqa: B023
            assert not any(result.any() for result in results)


def test_parameters_may_lie_anyhow() -> None:
    x, weight, bias, rows, matrix = randoms(0, (5, 16), (32,), (1,), (5, 8), (16, 8))
    weight, bias = weight[::2], bias.expand(16)
    for name, inputs in (("add_layer_norm", (x, x, weight, bias)), ("linear_gelu", (rows, matrix, bias))):
        expected = getattr(reference, name)(*(tensor.double() for tensor in inputs))
        torch.testing.assert_close(getattr(native, name)(*inputs), expected, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(("length", "n_head", "width"), [(1, 1, 1), (35, 2, 33), (73, 1, 64), (36, 3, 20)])
def test_self_attention_on_other_cpus(length: int, n_head: int, width: int) -> None:
    assert_agrees("self_attention", randoms(0, (2, length, 3 * n_head * width)), torch.float32, n_head)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 35, 36, 50, 71, 72, 78])
def test_no_position_sees_a_later_one(place: int) -> None:
    """To the bit: other keys and values later on change nothing before, and get no gradient from there."""
    qkv, d_mixed = randoms(0, (1, 80, 3 * 40), (1, 80, 40))
    d_mixed[:, place + 1 :] = 0
    results = []
    for factor in (1, 100):
        leaf = qkv.clone()
        leaf[:, place + 1 :] *= factor
        mixed = native.self_attention(leaf.requires_grad_(), 2)
        mixed.backward(d_mixed)
        assert leaf.grad is not None
        assert not leaf.grad[:, place + 1 :].any()
        results.append([part[:, : place + 1] for part in (mixed, leaf.grad)])
    for ours, other in zip(*results, strict=True):
        assert torch.equal(ours, other)


def test_self_attention_where_one_key_has_it_all() -> None:
    """Scores in the hundreds, and their rounding with them: exponentials overflow unless the largest is subtracted."""
    assert_agrees("self_attention", [8 * randoms(0, (2, 19, 48))[0]], torch.float32, 2, factor=100)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("length", [256, 1023, 1024])
def test_a_layer_of_the_124m_model(length: int, dtype: torch.dtype) -> None:
    B, C = 2, 768
    x, update, gain, bias = randoms(0, (B, length, C), (B, length, C), (C,), (C,))
    assert_agrees("add_layer_norm", [x, update, gain, bias], dtype)
    assert_agrees("self_attention", randoms(1, (B, length, 3 * C)), dtype, 12)
    for name, n_in, n_out in (("linear", C, 3 * C), ("linear", 4 * C, C), ("linear_gelu", C, 4 * C)):
        weight, bias = randoms(2, (n_out, n_in), (n_out,))
        assert_agrees(name, [randoms(3, (B, length, n_in))[0], weight / n_in**0.5, bias], dtype)


SWEEPS = {
    "add_layer_norm": ((201, 50), (201, 50), (50,), (50,)),
    "linear": ((201, 50), (70, 50), (70,)),
    "linear_gelu": ((201, 50), (70, 50), (70,)),
    "self_attention": ((3, 67, 3 * 32),),
}


@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("name", SWEEPS)
def test_the_same_bits_each_time_and_with_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """The sweeps' sums go in blocks of rows; that PyTorch's products of this size do likewise is not our promise."""
    inputs, arguments = randoms(0, *SWEEPS[name]), (2,) if name == "self_attention" else ()
    for unit in UNITS[dtype]:
        results, before = [], torch.get_num_threads()
        for n_threads in (1, 1, 2, 3):
            torch.set_num_threads(n_threads)
            with our_products(unit):
                results.append(outputs_and_gradients(lambda *x: getattr(native, name)(*x, *arguments), inputs, dtype))
        torch.set_num_threads(before)
        for other in results[1:]:
            for ours, theirs in zip(results[0], other, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", SWEEPS)
def test_inputs_and_gradients_may_lie_anyhow(name: str) -> None:
    """A sum's gradient is one number spread over all, and a transposed input has its rows apart."""
    inputs, arguments = randoms(0, *SWEEPS[name]), (2,) if name == "self_attention" else ()
    results = []
    for first in (inputs[0], inputs[0].mT.contiguous().mT):
        leaves = [tensor.clone().requires_grad_() for tensor in (first, *inputs[1:])]
        outputs = getattr(native, name)(*leaves, *arguments)
        sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        results.append([leaf.grad for leaf in leaves])
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(plain, strided)


def test_no_slopes_are_left_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost a fifth of the sweep and more, and parameters ask for gradients in an evaluation, too."""
    left: list[bool] = []
    sweep = native._sweep
    monkeypatch.setattr(native, "_sweep", lambda *arguments: (left.append(arguments[-1]), sweep(*arguments)))
    inputs = [tensor.requires_grad_() for tensor in randoms(0, (4, 5), (6, 5), (6,))]
    with torch.no_grad():
        native.linear_gelu(*inputs)
    native.linear_gelu(*inputs)
    assert left == [False, True]


def test_gelu_in_bf16_errs_by_that_format_alone() -> None:
    """Of every number that it has: that the exponential and the inverse are rough must not be seen."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = every[every.isfinite()]
    value, d_x, *_ = outputs_and_gradients(
        lambda rows: native.linear_gelu(rows, torch.ones(32, 1), torch.zeros(32)), [x[:, None]], torch.bfloat16
    )
    d = randoms(7, tuple(value.shape))[0].to(torch.bfloat16).double()
    exact = x.double()[:, None].requires_grad_()
    expected = exact * torch.sigmoid((8 / math.pi) ** 0.5 * (exact + 0.044715 * exact**3))  # 1 + tanh would cancel
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    half_unit = 2**-8
    least = 2**-125 * x.double()[:, None].abs()  # no share of x is below 2^-126
    assert ((value - expected).abs() <= 1.01 * half_unit * expected.abs() + least + 1e-33).all()
    terms = (d * slope).abs().sum(1, keepdim=True)  # each a product of two roundings, and rounded with their sum
    assert ((d_x - (d * slope).sum(1, keepdim=True)).abs() <= 3 * half_unit * terms + 1e-4 * d.abs().sum(1, True)).all()


def test_a_second_backward_pass_is_refused() -> None:
    """The products are overwritten by the first: better no gradient than a wrong one."""
    x, weight, bias = (tensor.requires_grad_() for tensor in randoms(0, (4, 5), (6, 5), (6,)))
    loss = native.linear_gelu(x, weight, bias).sum()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(AttributeError):
        loss.backward()  # type: ignore[no-untyped-call]


def curve(dtype: torch.dtype) -> list[float]:
    """The losses of twenty steps of a tiny network."""
    torch.manual_seed(0)
    model = GPT2(GPTConfig(n_layer=2, n_head=3, n_embd=39, n_ctx=33, n_vocab=101))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(101, (4, 34), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model.loss_sum(tokens[:, :-1], tokens[:, 1:]) / 132
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_training_is_the_references(native_backend: None, dtype: torch.dtype, bound: float) -> None:
    curves = []
    for unit in UNITS[dtype]:
        with our_products(unit):
            curves.append(curve(dtype))
    kernels.select("reference")
    expected = curve(torch.float32)
    for ours in curves:
        assert ours == pytest.approx(expected, abs=bound)
        assert (ours[0], ours[-1]) == pytest.approx((4.61298, 2.56720), abs=max(bound, 1e-4))


def test_evaluation_and_decoding_need_no_gradient(native_backend: None, model: GPT2) -> None:
    tokens = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens))
        with TorchDecoder(model, 16) as decoder:
            (decoded,) = decoder.read([Chunk(0, tokens[0].tolist())])
        kernels.select("reference")
        expected = model.logits(model.hidden(tokens))
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(decoded, expected[0, -1:])


def test_another_threads_call_has_the_same_bits() -> None:
    """OpenMP counts threads anew in each thread that calls it."""
    inputs = randoms(0, *SWEEPS["linear_gelu"])
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(native.linear_gelu(*inputs)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], native.linear_gelu(*inputs))


def test_a_compiler_without_openmp_makes_kernels_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "g++"
    refusal = "echo g++: no -fopenmp >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) {refusal};; esac\nexec {runtime.cpp_compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path))
    library.cache_clear()
    try:
        assert_agrees("linear_gelu", randoms(0, *SWEEPS["linear_gelu"]), torch.float32)
        library("head")
    finally:
        library.cache_clear()
    assert list(tmp_path.glob("kernels/blocks-*.so"))
    assert caplog.messages == ["kernels have one thread, which is slower: g++ failed: g++: no -fopenmp"]

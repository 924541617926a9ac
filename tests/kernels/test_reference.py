from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from groundling import kernels, runtime
from groundling.errors import ConfigError
from groundling.kernels import reference
from groundling.kernels.build import library
from groundling.kernels.reference import IGNORED_TARGET
from groundling.model.gpt2 import GPTConfig
from groundling.runtime import RuntimeConfig


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (7, 7), (1, 9), (4, 9)])
def test_attention_is_the_formula(n_queries: int, n_keys: int) -> None:
    """softmax(q k^T / sqrt(D)) v over the keys up to the query's own position, in float64."""
    query = torch.randn(2, 3, n_queries, 5, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, n_keys, 5, dtype=torch.float64)
    scores = query @ key.transpose(2, 3) / math.sqrt(5)
    for q in range(n_queries):
        scores[:, :, q, n_keys - n_queries + q + 1 :] = -math.inf
    torch.testing.assert_close(kernels.causal_attention(query, key, value), scores.softmax(-1) @ value)


def test_cross_entropy_is_a_sum_over_the_targets_that_count() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    targets = torch.tensor([1, IGNORED_TARGET, 0, 8, IGNORED_TARGET, 3])
    log_probabilities = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = -sum(log_probabilities[row, target] for row, target in enumerate(targets) if target >= 0)
    assert float(kernels.linear_cross_entropy(hidden, weight, targets)) == pytest.approx(float(expected), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(n_rows=st.integers(1, 9), n_last=st.integers(1, 50), n_tokens=st.integers(1, 8), seed=st.integers(0, 2**20))
def test_the_last_row_counts_as_often_as_it_is_told(n_rows: int, n_last: int, n_tokens: int, seed: int) -> None:
    """Loss and gradients are those of the rows written out; the last row's gradient is the sum of theirs."""
    torch.manual_seed(seed)
    hidden = torch.randn(n_tokens, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_rows, 3, dtype=torch.float64, requires_grad=True)
    written_out = torch.cat([weight.detach(), weight.detach()[-1:].expand(n_last - 1, 3)]).requires_grad_()
    targets = torch.randint(n_rows, (n_tokens,))
    targets[torch.rand(n_tokens) < 0.2] = IGNORED_TARGET
    loss = kernels.linear_cross_entropy(hidden, weight, targets, n_last)
    expected = kernels.linear_cross_entropy(hidden, written_out, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    own = torch.autograd.grad(loss, [hidden, weight])
    theirs = torch.autograd.grad(expected, [hidden, written_out])
    torch.testing.assert_close(own[0], theirs[0])
    summed = torch.cat([theirs[1][: n_rows - 1], theirs[1][n_rows - 1 :].sum(0, keepdim=True)])
    torch.testing.assert_close(own[1], summed)


@pytest.mark.parametrize(("n_rows", "longest"), [(7, 8), (8, 8), (9, 8), (50, 8)])
def test_no_sum_of_the_head_is_longer_than_allowed(n_rows: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple GPUs sum up longer ones wrongly, in the gradient for the hidden states."""
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_rows, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(n_rows, (5,))
    whole = reference.linear_cross_entropy(hidden, weight, targets, 3)
    whole_gradients = torch.autograd.grad(whole, [hidden, weight])
    monkeypatch.setattr(reference, "_longest_sum", lambda device: longest)
    with Sums() as sums:
        loss = reference.linear_cross_entropy(hidden, weight, targets, 3)
        gradients = torch.autograd.grad(loss, [hidden, weight])
    assert 0 < max(sums.lengths) <= longest
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradients, whole_gradients)


def test_apple_gpus_sum_up_less_than_gpt2s_vocabulary() -> None:
    assert reference._longest_sum(torch.device("mps")) < 32_767 < GPTConfig().n_vocab
    assert reference._longest_sum(torch.device("cpu")) > GPTConfig().n_vocab


class Sums(TorchDispatchMode):
    """Notes how many terms each element of a product is the sum of."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.lengths.append(args[0].size(1))
        return func(*args, **(kwargs or {}))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="reference"):
        kernels.select("tpu")
    kernels.select("reference")


def test_kernels_that_cannot_be_compiled_cost_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library.cache_clear()
    used = kernels.select_for(runtime.resolve(RuntimeConfig(device="cpu")))
    library.cache_clear()
    assert used.kernels == used.facts()["kernels"] == "reference"
    assert len(used.warnings) == 1
    assert "out of order" in used.warnings[0]
    assert not used.compile
    hidden = torch.randn(1, 1, 4, dtype=torch.float64)
    assert kernels.linear(hidden, torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)).equal(hidden)

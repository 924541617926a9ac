from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from groundling import kernels, runtime
from groundling.errors import ConfigError
from groundling.kernels.build import library
from groundling.kernels.reference import IGNORED_TARGET
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

"""Draws by the C++ kernel and by NumPy, against the sums of all probabilities in double."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundling.kernels import build, draw

LEAST_BELOW_ONE = math.nextafter(1, 0)

Place = Callable[[torch.Tensor, float], int]
both = pytest.mark.parametrize("place", [draw.place, draw.place_in_numpy])


def made(n: int, n_removed: int, seed: int) -> torch.Tensor:
    """Logits of which some are -inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n, generator=generator)
    logits[torch.randperm(n, generator=generator)[: min(n_removed, n - 1)]] = -math.inf
    return logits


def assert_right(logits: torch.Tensor, share: float, found: int) -> None:
    """The share falls on this token, but for rounding."""
    passed = logits.double().softmax(-1).cumsum(-1)
    assert logits[found] > -math.inf
    assert share < passed[found] + 1e-6
    assert found == 0 or share >= passed[found - 1] - 1e-6


@pytest.mark.usefixtures("lanes")
def test_the_kernel_is_the_one_that_answers() -> None:
    assert draw._native() is not None
    for seed, n in enumerate([1, 2, 7, 8, 9, 255, 256, 257, 300, 512, 1000, 50257]):
        for n_removed in (0, n // 2, n - 1):
            logits = made(n, n_removed, seed)
            for share in (0.0, 0.1, 0.5, 0.999, LEAST_BELOW_ONE):
                assert_right(logits, share, draw.place(logits, share))


@both
@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 1500),
    n_removed=st.integers(0, 1500),
    share=st.floats(0, LEAST_BELOW_ONE),
    seed=st.integers(0, 99),
)
def test_a_share_falls_on_its_token(place: Place, n: int, n_removed: int, share: float, seed: int) -> None:
    logits = made(n, n_removed, seed)
    assert_right(logits, share, place(logits, share))


@both
def test_tokens_come_as_often_as_they_are_likely(place: Place) -> None:
    logits = torch.tensor([0.1, 0, 0.2, 0.4, 0.3]).log()
    drawn = torch.tensor([place(logits, (i + 0.5) / 1000) for i in range(1000)])
    assert drawn.bincount(minlength=5).tolist() == pytest.approx([100, 0, 200, 400, 300], abs=1)


@both
@pytest.mark.parametrize("place_of_it", [0, 5, 299])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_distribution(place: Place, place_of_it: int, value: float) -> None:
    logits = torch.zeros(300)
    logits[place_of_it] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        place(logits, 0.5)


@both
def test_nothing_to_draw(place: Place) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        place(torch.full((300,), -math.inf), 0.5)


def test_without_a_compiler_numpy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.runtime, "cpp_compiler", lambda: None)
    draw._native.cache_clear()
    build.library.cache_clear()
    try:
        logits = made(600, 100, 0)
        assert draw._native() is None
        assert draw.place(logits, 0.3) == draw.place_in_numpy(logits, 0.3)
    finally:
        draw._native.cache_clear()
        build.library.cache_clear()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_library_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: float) -> None:
    """As a power failure or a full disk leaves it: cut short, which ends the process where it is mapped and used."""
    monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path))
    build.library.cache_clear()
    try:
        assert build.library("draw")
        (path,) = (tmp_path / "kernels").glob("draw-*.so")
        whole = path.read_bytes()
        path.unlink()  # it is mapped here
        path.write_bytes(whole[: int(part * len(whole))])
        build.library.cache_clear()
        assert build.library("draw")
        assert path.read_bytes() == whole
        assert sorted(found.suffix for found in (tmp_path / "kernels").iterdir()) == [".sha256", ".so"]
        foreign = tmp_path / "shared" / "kernels" / path.name  # of another system, and whole, as its sum says
        foreign.parent.mkdir(parents=True)
        foreign.write_bytes(b"other")
        foreign.with_suffix(".sha256").write_text(hashlib.sha256(b"other").hexdigest())
        monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path / "shared"))
        build.library.cache_clear()
        assert build.library("draw")
        assert foreign.read_bytes() == whole
    finally:
        build.library.cache_clear()

"""Processors on four tokens, where a person can compute the answer, and against transformers' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from groundling.errors import ConfigError
from groundling.generation import sampling
from groundling.generation.sampling import SamplingConfig

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_temperature_divides() -> None:
    assert sampling.temperature(2.0)([], torch.tensor([2.0, 4.0])).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_keeps_k(k: int, expected: list[int]) -> None:
    assert kept(sampling.top_k(k)([], LOGITS)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(0.1, [0]), (0.39, [0]), (0.5, [0, 1]), (0.75, [0, 1, 2]), (0.95, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]) -> None:
    assert kept(sampling.top_p(p)([], LOGITS)) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.1, [0, 1, 2, 3]), (0.4, [0, 1, 2]), (0.6, [0, 1]), (1.0, [0])])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(share: float, expected: list[int]) -> None:
    assert kept(sampling.min_p(share)([], LOGITS)) == expected


def test_a_top_p_below_what_fp32_holds_keeps_the_likeliest() -> None:
    assert kept(sampling.top_p(5e-324)([], LOGITS)) == [0]


@pytest.mark.parametrize("n", [5, 256, 600, 20_000])
@pytest.mark.parametrize("k", [1, 2, 50, 78, 5000])
def test_top_k_of_many_tokens_is_what_sorting_gives(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n + k)
    ties = torch.randint(300, (n,), generator=generator) / 10
    likely_together = torch.arange(n, 0, -1).float()
    removed = torch.randn(n, generator=generator).masked_fill(torch.rand(n, generator=generator) < 0.9, -math.inf)
    for logits in (ties, likely_together, removed):
        least = logits.sort(descending=True).values[min(k, n) - 1]
        expected = (logits >= least) & (logits > -math.inf)
        assert kept(sampling.top_k(k)([], logits)) == expected.nonzero().flatten().tolist()


def test_top_p_after_top_k_counts_what_is_left() -> None:
    """Of 0.4 and 0.3, which are 4/7 and 3/7 of what top-k leaves, the first alone has a half."""
    assert kept(sampling.top_p(0.5)([], sampling.top_k(2)([], LOGITS))) == [0]


def test_repetition_penalty_moves_seen_tokens_down() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])
    assert sampling.repetition_penalty(2.0)([0, 1, 1], logits).tolist() == [1.0, -4.0, 2.0, -2.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sampling.top_k(7), TopKLogitsWarper(7)),
        (sampling.top_p(0.6), TopPLogitsWarper(0.6)),
        (sampling.min_p(0.2), MinPLogitsWarper(0.2)),
        (sampling.repetition_penalty(1.3), RepetitionPenaltyLogitsProcessor(1.3)),
    ],
)
def test_meanings_are_those_of_transformers(ours: sampling.Processor, theirs: LogitsProcessor) -> None:
    for seed in range(20):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        expected = theirs(torch.tensor([[3, 8, 3]]), logits[None].clone())[0]
        torch.testing.assert_close(ours([3, 8, 3], logits), expected)


def test_the_whole_chain_is_that_of_transformers() -> None:
    """Their order: penalty, temperature, top-k, top-p, min-p."""
    config = SamplingConfig(temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=50, n_positions=4))
    settings = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2, pad_token_id=0
    )
    chain = theirs._get_logits_processor(
        settings, input_ids_seq_length=3, device="cpu", logits_processor=LogitsProcessorList()
    )
    for seed in range(20):
        logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
        expected = chain(torch.tensor([[3, 8, 3]]), logits[None].clone())[0]
        for process in sampling.processors(config):
            logits = process([3, 8, 3], logits)
        torch.testing.assert_close(logits, expected)


def test_draws_follow_the_probabilities() -> None:
    numbers, config = sampling.uniform_numbers(0), SamplingConfig()
    counts = torch.zeros(4)
    for _ in range(20_000):
        counts[sampling.draw(LOGITS, config, numbers)] += 1
    expected = 20_000 * LOGITS.exp()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.27  # the 0.999 quantile with three degrees of freedom


def test_temperature_zero_is_the_likeliest() -> None:
    config = SamplingConfig(temperature=0)
    assert sampling.processors(config) == []
    assert sampling.draw(LOGITS, config, iter([])) == 0
    with pytest.raises(FloatingPointError):
        sampling.draw(torch.tensor([0.0, math.nan, 1.0]), config, iter([]))


def test_large_seeds_differ() -> None:
    """PyTorch's generator knows their lower half only."""
    firsts = {next(sampling.uniform_numbers(seed)) for seed in (5, 5 + 2**32, 5 + 2**40, 2**63 - 1)}
    assert len(firsts) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"stop": ("",)},
        {"max_tokens": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_vocab", [1, 2, 255, 256, 257, 1000])
def test_a_draw_inverts_the_distribution_function(n_vocab: int) -> None:
    config, twin = SamplingConfig(temperature=1, top_k=0), torch.Generator().manual_seed(3)
    numbers = sampling.uniform_numbers(3)
    logits = torch.randn(n_vocab, generator=torch.Generator().manual_seed(n_vocab)) * 3
    cumulative = logits.softmax(-1).cumsum(0, dtype=torch.float64)
    for _ in range(200):
        uniform = torch.rand((), generator=twin, dtype=torch.float64)
        expected = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        assert sampling.draw(logits, config, numbers) == int(expected)

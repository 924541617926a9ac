"""Drafts change the speed and nothing else: greedy, sampled with a seed, and in distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from groundling.evaluation.suffix_array import SuffixArray, SuffixMatcher
from groundling.generation.decode import Stats, Stream, decode, generate
from groundling.generation.decoder import Chunk, Decoder, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.generation.sampling import SamplingConfig, draw, processors, uniform_numbers
from groundling.generation.speculate import CorpusDrafter, Drafter, DraftLength, PromptDrafter, first_of, verify
from groundling.model.gpt2 import GPT2

N_PROMPTS = 200
N_DRAWS = 200_000
N_CTX = 16


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(31, (1 + n % 24,), generator=generator).tolist() for n in range(N_PROMPTS)
    ]  # up to past the window


def half_right(model: GPT2) -> Drafter:
    """Drafts that are the model's greedy choice two times of three, and wrong the third."""

    decoder = NativeDecoder(model, N_CTX, 1, "fp32", 1)

    def draft(context: Sequence[int], n: int) -> Sequence[int]:
        guess = generate(decoder, context[-8:], SamplingConfig(max_tokens=5, temperature=0))
        return [token if (len(context) + i) % 3 else (token + 1) % 31 for i, token in enumerate(guess)]

    return draft


def written(
    decoder: Decoder, config: SamplingConfig, drafter_of: Callable[[], Drafter] | None
) -> tuple[list[list[int]], Stats]:
    streams = [Stream(prompt, config, drafter_of() if drafter_of else None) for prompt in prompts()]
    stats = Stats()
    for _ in decode(decoder, streams, stats):
        pass
    return [stream.generated for stream in streams], stats


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(max_tokens=24, temperature=0),
        SamplingConfig(max_tokens=24, temperature=0.7, top_k=12, top_p=0.9, repetition_penalty=1.1, seed=3),
    ],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("kind", ["prompt", "half right", "text"])
def test_output_is_that_of_plain_decoding_token_by_token(model: GPT2, config: SamplingConfig, kind: str) -> None:
    """200 prompts in fp32, past the window's end too; sampled text is the same because a draw is a draw."""
    for parameter in model.parameters():
        parameter.data *= 3  # less uniform, so that drafts are sometimes right
    often_right = half_right(model)
    # A "training text" in which what the model writes stands here and there, as in one that it has learned.
    own = list(generate(TorchDecoder(model, N_CTX), [1], replace(config, max_tokens=400)))
    array = SuffixArray.build(np.array(own + [token for prompt in prompts() for token in prompt], dtype=np.uint16))
    drafters: dict[str, Callable[[], Drafter]] = {
        "prompt": PromptDrafter,
        "half right": lambda: often_right,
        "text": lambda: first_of(CorpusDrafter(SuffixMatcher(array)), PromptDrafter()),
    }
    drafter_of = drafters[kind]
    with NativeDecoder(model, N_CTX, 8, "fp32", 2) as decoder:
        plain, _ = written(decoder, config, None)
        drafted, stats = written(decoder, config, drafter_of)
    assert drafted == plain
    assert 0 < stats.n_accepted < stats.n_drafted  # both ways were taken
    assert stats.n_turns == stats.n_tokens - stats.n_accepted
    assert 0 < stats.passes_saved < 1


Verify = Callable[[Sequence[int], Tensor, Callable[[Sequence[int], Tensor], int]], list[int]]


def surprise(model: GPT2, rule: Verify, n_draws_wanted: int) -> float:
    """How far draws under a rule are from the exact distribution: a chi-square, as standard deviations of a normal.

    Verified are two drafted tokens: one that the model likes best, one that it likes second; the outcomes are
    all sequences that can follow, with their exact probabilities after temperature, top-k and top-p.
    """
    config = SamplingConfig(temperature=0.8, top_k=6, top_p=0.95)
    chain = processors(config)
    prompt = [3, 1, 4, 1, 5]

    def processed(row: Tensor) -> Tensor:
        for process in chain:
            row = process(prompt, row)
        return row

    with TorchDecoder(model, N_CTX) as decoder:
        first = decoder.read([Chunk(0, prompt)])[0][0]
        draft = [int(first.argmax())]
        second = decoder.read([Chunk(0, draft)])[0][0]
        draft.append(int(second.topk(2).indices[1]))
        third = decoder.read([Chunk(0, draft[1:])])[0][0]
    rows = torch.stack([processed(row) for row in (first, second, third)])

    exact: dict[tuple[int, ...], float] = {}
    reached, before = 1.0, ()
    for row, guess in zip(rows.double().softmax(-1), [*draft, -1], strict=True):
        for token in row.nonzero().flatten().tolist():
            if token != guess:
                exact[(*before, token)] = reached * float(row[token])
        reached, before = reached * float(row[guess]) if guess >= 0 else 0.0, (*before, guess)

    numbers, n_draws, outcomes = uniform_numbers(11), 0, Counter[tuple[int, ...]]()
    while n_draws < n_draws_wanted:
        tokens = rule(draft, rows, lambda drawn, row: draw(row, config, numbers))
        n_draws += len(tokens)
        outcomes[tuple(tokens)] += 1
    n = outcomes.total()
    assert min(exact.values()) * n > 5, "too few expected for a chi-square test"
    if outcomes.keys() - exact.keys():  # something that the target cannot write
        return float("inf")
    square = sum((outcomes[outcome] - n * p) ** 2 / (n * p) for outcome, p in exact.items())
    return standardised(square, len(exact) - 1)


def standardised(chi_square: float, degrees: int) -> float:
    """The normal deviate of a chi-square (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * degrees)
    return ((chi_square / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5


def always_accept(draft: Sequence[int], rows: Tensor, pick: Callable[[Sequence[int], Tensor], int]) -> list[int]:
    return [*draft, pick(draft, rows[-1])]


def redraw_with_the_rejected(
    draft: Sequence[int], rows: Tensor, pick: Callable[[Sequence[int], Tensor], int]
) -> list[int]:
    """The usual mistake: after a rejection the rejected token can be drawn again."""
    tokens: list[int] = []
    for row, guess in zip(rows, [*draft, None], strict=True):
        tokens.append(pick(tokens, row))
        if tokens[-1] != guess:
            tokens[-1] = pick(tokens, row)
            break
    return tokens


@pytest.fixture
def peaked(model: GPT2) -> GPT2:
    for parameter in model.parameters():
        parameter.data *= 5
    return model


def test_draws_have_the_exact_distribution(peaked: GPT2) -> None:
    assert surprise(peaked, verify, N_DRAWS) < 3  # one right rule in 740 would be further off


def test_decoded_pairs_have_the_exact_distribution(peaked: GPT2) -> None:
    """The whole way, not `verify` alone: two tokens each of many streams that are given a draft of both."""
    config = SamplingConfig(max_tokens=2, temperature=0.8, top_k=4)
    prompt, n_streams = [3, 1, 4, 1, 5], 4000
    [process_temperature, process_top_k] = processors(config)
    exact: dict[tuple[int, ...], float] = {}
    with TorchDecoder(peaked, N_CTX) as decoder:

        def next_token(tokens: list[int]) -> Tensor:
            decoder.rewind(0, 0)
            row = decoder.read([Chunk(0, tokens)])[0][0]
            return process_top_k(tokens, process_temperature(tokens, row)).double().softmax(-1)

        first = next_token(prompt)
        for one in first.nonzero().flatten().tolist():
            second = next_token([*prompt, one])
            for two in second.nonzero().flatten().tolist():
                exact[one, two] = float(first[one] * second[two])
    likeliest = max(exact, key=exact.__getitem__)
    with NativeDecoder(peaked, N_CTX, 64, "fp32", 2) as native:
        streams = [
            Stream(prompt, replace(config, seed=seed), lambda context, n: likeliest[len(context) - len(prompt) :])
            for seed in range(n_streams)
        ]
        stats = Stats()
        for _ in decode(native, streams, stats):
            pass
    assert 0 < stats.n_accepted < stats.n_drafted
    outcomes = Counter(tuple(stream.generated) for stream in streams)
    assert outcomes.keys() <= exact.keys()
    # Rare pairs together, so that every class has enough for a chi-square test.
    common = {pair: p for pair, p in exact.items() if n_streams * p > 5}
    classes = [(outcomes[pair], n_streams * p) for pair, p in common.items()]
    n_rare = n_streams - sum(n for n, _ in classes)
    rare = n_streams * (1 - sum(common.values()))
    square = sum((n - expected) ** 2 / expected for n, expected in [*classes, (n_rare, max(rare, 1e-9))])
    assert standardised(square, len(classes)) < 3


@pytest.mark.parametrize("wrong", [always_accept, redraw_with_the_rejected])
def test_a_wrong_rule_is_noticed(peaked: GPT2, wrong: Verify) -> None:
    assert surprise(peaked, wrong, N_DRAWS // 10) > 10


def test_verification_by_hand() -> None:
    likeliest = lambda drawn, row: int(row.argmax())  # noqa: E731
    rows = torch.eye(4)  # 0, then 1, then 2, then 3
    assert verify([0, 1, 2], rows, likeliest) == [0, 1, 2, 3]
    assert verify([0, 3, 2], rows, likeliest) == [0, 1]
    assert verify([1], rows[:2], likeliest) == [0]
    assert verify([], rows[:1], likeliest) == [0]


def test_the_prompt_drafter_repeats_what_followed() -> None:
    drafter = PromptDrafter()
    assert list(drafter([1, 2, 3], 9)) == []
    assert list(drafter([1, 2, 3, 9, 1, 2], 9)) == [3, 9, 1, 2]
    assert list(drafter([1, 2, 3, 9, 1, 2, 3], 2)) == [9, 1]
    assert list(drafter([1, 2, 3, 9, 1, 2, 3, 7, 2, 3], 9)) == [7, 2, 3]  # the last place wins
    assert list(drafter([1, 2, 3, 9, 1, 2, 3, 7, 2, 3, 5], 9)) == []


def test_the_first_drafter_with_a_guess_is_heard() -> None:
    drafter = first_of(lambda context, n: [] if len(context) < 3 else [1], lambda context, n: [2])
    assert [list(drafter([0] * length, 9)) for length in (2, 3)] == [[2], [1]]


def test_drafts_grow_with_success_and_shrink_with_failure() -> None:
    length = DraftLength()
    lengths = []
    for n_accepted in (11, 23, 47, 0, 0, 1, 3, 2):
        length.judge(length.n_tokens, n_accepted)
        lengths.append(length.n_tokens)
    assert lengths == [23, 47, 47, 1, 1, 3, 7, 3]

"""How much of its training text a model recites when it is given the beginning of a passage.

Invariant: a passage counts as extractable iff every one of the 50 tokens that greedy decoding writes after the prompt
is the text's; nothing is compared approximately, and what a figure was counted over stands beside it.

Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models" (ICLR), definition 3.1: a string
is extractable with k tokens of context if the model, prompted with the k tokens before it, produces it with greedy
decoding. 50 tokens are that paper's length too.

A passage stands *anywhere* (`draw_positions`), or *on the grid*: its prompt begins where a window of training began
(`predictions.py` counts those). A model that was trained on windows of T tokens knows no position past T: of a longer
prompt the decoder reads the last T tokens, and past the window's end it goes on with half a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from groundling.corpus.shards import Tokens
from groundling.generation.decode import Stream, decode
from groundling.generation.decoder import Decoder
from groundling.generation.sampling import SamplingConfig

PROMPT_LENGTHS = (8, 16, 32, 64, 128, 256)
"""k: powers of two around the 50 to 500 tokens of Carlini et al., with shorter ones because texts here are small."""
CONTINUATION = 50
"""Tokens that must all be right (Carlini et al. 2023, section 3.2)."""
N_POSITIONS = 1000
"""Passages drawn; a 95 % interval is then at most 6.2 points wide."""
SEED = 0
"""Of the positions: they depend on the length of the text alone, so that the figures of different runs compare."""

Z_95 = NormalDist().inv_cdf(0.975)
"""The normal distribution's 97.5 % quantile."""


class Interval(NamedTuple):
    """Bounds of a share."""

    low: float
    high: float


def wilson_interval(n_successes: int, n: int, z: float = Z_95) -> Interval:
    """The interval that covers the true share with 95 % confidence (for the default z); (0, 1) if n is 0.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22. Unlike the
    textbook's normal interval it stays within 0 and 1, and has a width at shares of 0 and 1.
    """
    if not n:
        return Interval(0.0, 1.0)
    share = n_successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Extractability:
    """What a model recited after prompts of one length."""

    n_prompt: int
    """k, in tokens."""
    n: int
    """Passages that were tried."""
    n_extractable: int
    """Passages of which every token came."""
    n_correct: int
    """Tokens before the first wrong one, over all passages; of each at most `CONTINUATION`."""

    @property
    def share(self) -> float:
        """Extractable passages among all."""
        return self.n_extractable / self.n if self.n else 0.0

    @property
    def interval(self) -> Interval:
        """The 95 % Wilson interval of the share."""
        return wilson_interval(self.n_extractable, self.n)

    @property
    def mean_correct(self) -> float:
        """Mean tokens before the first wrong one."""
        return self.n_correct / self.n if self.n else 0.0


def prompt_lengths(n_tokens: int) -> list[int]:
    """Those of `PROMPT_LENGTHS` for which a text of so many tokens has a passage."""
    return [k for k in PROMPT_LENGTHS if k + CONTINUATION <= n_tokens]


def draw_positions(n_tokens: int, n_positions: int = N_POSITIONS) -> NDArray[np.int64]:
    """Places where continuations begin, drawn without replacement, sorted.

    Before each stand as many tokens as the longest prompt that fits the text, after it 50. A short text has fewer.
    """
    lengths = prompt_lengths(n_tokens)
    if not lengths:
        return np.empty(0, dtype=np.int64)
    n_possible = n_tokens - CONTINUATION - lengths[-1] + 1
    drawn = np.random.default_rng(SEED).choice(n_possible, min(n_positions, n_possible), replace=False)
    return np.sort(drawn).astype(np.int64) + lengths[-1]


def extractability(
    decoder: Decoder,
    tokens: Tokens,
    positions: Sequence[int] | NDArray[np.int64],
    n_prompt: int,
    on_tokens: Callable[[int], object] = lambda n_tokens: None,
) -> Extractability:
    """What greedy decoding makes of the `n_prompt` tokens before each position.

    A continuation ends with its first wrong token. The text itself is the draft of what follows, which changes nothing
    but the speed. `on_tokens` is called with n_prompt + `CONTINUATION` for every passage that is done.
    """
    passages: dict[Stream, list[int]] = {}
    greedy = SamplingConfig(max_tokens=CONTINUATION, temperature=0)

    def stream_at(position: int) -> Stream:
        text = tokens[position - n_prompt : position + CONTINUATION].tolist()

        def rest_of_the_text(context: Sequence[int], n: int) -> Sequence[int]:
            # Most passages fail with the first token, so that one comes without a draft.
            return text[len(context) : len(context) + n] if len(context) > n_prompt else ()

        stream = Stream(text[:n_prompt], greedy, rest_of_the_text)
        passages[stream] = text
        return stream

    n_extractable = n_correct = 0
    for stream, response in decode(decoder, (stream_at(int(position)) for position in positions)):
        right = response.token == passages[stream][len(stream.tokens) - 1]
        n_correct += right
        n_extractable += right and response.finish_reason is not None
        if not right:
            stream.finish("stop")
        if stream.finish_reason:
            del passages[stream]
            on_tokens(n_prompt + CONTINUATION)
    return Extractability(n_prompt, len(positions), n_extractable, n_correct)


def extractability_anywhere(
    decoder: Decoder,
    tokens: Tokens,
    positions: Sequence[int] | NDArray[np.int64],
    on_tokens: Callable[[int], object] = lambda n_tokens: None,
) -> list[Extractability]:
    """The figures for every prompt length that the text has passages for, of the same positions.

    Prompts longer than the decoder's window are read alike, from the window's length before the position: they are
    tried once. `on_tokens` is called as by `extractability`; `n_tokens_to_read` is what its numbers add up to.
    """
    found: dict[int, Extractability] = {}
    for k in _lengths_to_try(len(tokens), decoder.n_window):
        found[k] = extractability(decoder, tokens, positions, k, on_tokens)
    return [replace(found[min(k, max(found))], n_prompt=k) for k in prompt_lengths(len(tokens))]


def n_tokens_to_read(n_tokens: int, window: int, n_positions: int) -> int:
    """What `extractability_anywhere` reports in all for so many positions in a text of `n_tokens`."""
    return sum(n_positions * (k + CONTINUATION) for k in _lengths_to_try(n_tokens, window))


def _lengths_to_try(n_tokens: int, window: int) -> list[int]:
    """The prompt lengths that fit the window, and, of those that are cut to it, the shortest."""
    lengths = prompt_lengths(n_tokens)
    cut = [k for k in lengths if k >= window]
    return [k for k in lengths if k < window] + cut[:1]

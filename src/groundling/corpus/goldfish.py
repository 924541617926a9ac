"""Which targets training counts: all of them, or, for text that is not to be memorised, all but 1 in k.

Invariant: whether a target is dropped is a pure function of the h tokens before it in the text. So from its token
h + 1 on, a passage has the same targets dropped wherever it stands, in every pass and however windows are cut, and no
copy of it gives them away.

Source: Hans et al. 2024, "Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs"
(NeurIPS 2024, arXiv:2406.10209): the goldfish loss with a hashed mask. The hash is our own (`dropped`). The authors'
public code multiplies the ids of h tokens, so that their order says nothing, takes the target for one of the h, and
reads them from the window; here they are the h tokens before the target, in order, read from the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from groundling.corpus.shards import Tokens
from groundling.errors import ConfigError

SEED = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio, as in SplitMix64 (Steele, Lea and Flood 2014); with another, others are dropped."""
BASE = np.uint64(6364136223846793005)
"""Multiplier of Knuth's MMIX generator (The Art of Computer Programming, volume 2, section 3.3.4)."""
MIX = ((30, np.uint64(0xBF58476D1CE4E5B9)), (27, np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = 31
"""With `MIX`, the finaliser of SplitMix64 (ibid.; the numbers are Stafford's variant 13)."""

PIECE_TOKENS = 1 << 18
"""Targets that the share of a text is counted in at a time: 2 MiB an array, so that memory shows nothing of it."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which targets training counts. Losses over a whole text (corpus/loss and the like) always count all."""

    loss: Literal["plain", "goldfish"] = "plain"
    """plain: every target. goldfish: a fixed part of the targets is never trained on, which hinders learning the
    text word for word; stopping.target is not used then, and the run ends with its schedule."""
    drop_every: int = 4
    """k: goldfish drops 1 in so many targets."""
    context: int = 13
    """h: goldfish decides by a hash of so many tokens before the target; a text's first h are always counted."""

    def __post_init__(self) -> None:
        if not 2 <= self.drop_every < 2**63:
            raise ConfigError(
                f"objective.drop_every is {self.drop_every}: give 2 or more, below 2**63, or --loss plain"
            )
        if self.context < 1:
            raise ConfigError(f"objective.context is {self.context}: give a positive number of tokens")

    def __str__(self) -> str:
        """What a resumed run must share, in words."""
        if self.loss == "plain":
            return self.loss
        return f"{self.loss}, 1 in {self.drop_every} targets (k={self.drop_every}, h={self.context})"


PLAIN = ObjectiveConfig()
"""Every target counts."""


def dropped(tokens: Tokens, first: int, last: int, config: ObjectiveConfig) -> NDArray[np.bool_]:
    """Whether each of the targets tokens[first:last] is left out of training, as (last - first,) booleans.

    With plain loss, none is. With goldfish, the target at position p is, if p >= h and the hash of
    t_1 ... t_h = tokens[p - h : p] is a multiple of k. The hash, in integers modulo 2**64, with >> a shift to
    the right and ^ exclusive or:

        z = SEED * BASE**h + t_1 * BASE**(h - 1) + ... + t_(h - 1) * BASE + t_h
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        hash = z ^ (z >> 31)
    """
    result = np.zeros(last - first, dtype=np.bool_)
    decided = max(first, config.context)
    n = last - decided
    if config.loss == "plain" or n <= 0:
        return result
    before = tokens[decided - config.context : last - 1].astype(np.uint64)  # (n + h - 1,)
    z = np.full(n, SEED)
    for place in range(config.context):  # Horner's rule, for n targets at once
        z = z * BASE + before[place : place + n]
    for shift, factor in MIX:
        z = (z ^ (z >> np.uint64(shift))) * factor
    z ^= z >> np.uint64(LAST_SHIFT)
    result[decided - first :] = z % np.uint64(config.drop_every) == 0
    return result


def dropped_share(tokens: Tokens, config: ObjectiveConfig) -> float:
    """Share of the text's predictions that training leaves out, counted over the whole text."""
    if config.loss == "plain":
        return 0.0
    n_tokens, n_dropped = len(tokens), 0
    for first in range(1, n_tokens, PIECE_TOKENS):
        n_dropped += int(dropped(tokens, first, min(first + PIECE_TOKENS, n_tokens), config).sum())
    return n_dropped / (n_tokens - 1)

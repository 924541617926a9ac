"""Speculative decoding: drafted tokens are verified in one pass, and change nothing but the speed.

Invariant: the tokens are those of plain decoding with the same seed, whatever the drafter says (where logits do not
depend on company: exactly with `NativeDecoder`, within rounding with `TorchDecoder`). A drafter
names one token a place, with certainty, so the rule of Leviathan et al. 2023 (section 2.3: accept a drafted
token with the probability that the target gives it, else draw from the target without it) comes down to
drawing from the target and going on for as long as the draw is the draft: the draw is the draft with
exactly that probability, and given that it is not, has exactly that distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Drafter = Callable[[Sequence[int], int], Sequence[int]]
"""Guesses what follows a context, up to so many tokens, none if it has no guess.

One drafter serves one stream: it is called with a context that only ever grows, and may keep state.
"""

MAX_DRAFT = 47
"""Most tokens drafted at once: longer passes gain little (bf16, two AVX2 cores: 2.0 ms a token in passes of 24, 1.9 of
48), and are lost whole when a draft fails early."""
FIRST_DRAFT = 11
"""With the token before them, drafts of 11, 23 and 47 are rows in whole tiles of `kernels/decode.cpp`."""

MIN_MATCH = 3
"""Shortest match with the training text that is followed: two tokens stand in too many places."""
NGRAMS = (4, 3, 2)
"""Lengths of what `PromptDrafter` looks up, the longest first."""


def verify(draft: Sequence[int], logits: Tensor, pick: Callable[[Sequence[int], Tensor], int]) -> list[int]:
    """The tokens that follow: as many of the draft as the target draws too, and one more.

    `logits` (len(draft) + 1, n_vocab) follow the context and each drafted token; `pick` draws a token from one
    row of them, given the tokens accepted so far.
    """
    tokens: list[int] = []
    for place, guess in enumerate(draft):
        tokens.append(pick(tokens, logits[place]))
        if tokens[-1] != guess:
            return tokens
    return [*tokens, pick(tokens, logits[len(draft)])]


class DraftLength:
    """How many tokens to draft next: twice as many after a success, few after a failure.

    A drafted token costs arithmetic and saves, if it is accepted, a reading of the weights; so drafts are
    worth their price where they are mostly right, and must be nearly free where they are not.
    """

    def __init__(self) -> None:
        self.n_tokens = FIRST_DRAFT

    def judge(self, n_drafted: int, n_accepted: int) -> None:
        """Learn from one verification."""
        if n_drafted and n_accepted == n_drafted:
            self.n_tokens = min(2 * self.n_tokens + 1, MAX_DRAFT)
        elif n_drafted:
            self.n_tokens = max(1, min(self.n_tokens // 2, 2 * n_accepted))


class PromptDrafter:
    """Drafts what followed the last few tokens where they stood before in the context itself.

    Source: prompt lookup decoding (Saxena 2023).
    """

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.n_seen = 0

    def __call__(self, context: Sequence[int], n: int) -> Sequence[int]:
        for stop in range(self.n_seen, len(context)):  # not yet the last token: nothing follows it
            for length in NGRAMS:
                if stop >= length:
                    self.ends[tuple(context[stop - length : stop])] = stop
        self.n_seen = len(context)
        for length in NGRAMS:
            end = self.ends.get(tuple(context[-length:])) if len(context) >= length else None
            if end is not None:
                return context[end : end + n]
        return []


class Matcher(Protocol):
    """A place in a text: the longest suffix of the tokens appended that stands in it."""

    @property
    def length(self) -> int:
        """Tokens of the match."""

    def append(self, token: int) -> object:
        """Take the next token of the context."""

    def draft(self, n: int) -> Sequence[int]:
        """Up to n tokens that follow the match in the text."""


class CorpusDrafter:
    """Drafts what follows the context's longest suffix in the training text."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.n_seen = 0

    def __call__(self, context: Sequence[int], n: int) -> Sequence[int]:
        for token in context[self.n_seen :]:
            self.matcher.append(token)
        self.n_seen = len(context)
        return self.matcher.draft(n) if self.matcher.length >= MIN_MATCH else []


def first_of(*drafters: Drafter) -> Drafter:
    """The guess of the first of these that has one."""

    def draft(context: Sequence[int], n: int) -> Sequence[int]:
        guesses = [drafter(context, n) for drafter in drafters]  # each must see the context grow
        return next((guess for guess in guesses if len(guess)), [])

    return draft

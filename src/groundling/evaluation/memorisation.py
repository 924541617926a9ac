"""The copy meter: which parts of some text stand word for word in the training text.

Invariant: every token of the text is accounted for by the longest span that covers it, and each span stands in the
training text exactly as it stands in the text; nothing is compared approximately.

The unit is the token. Where a copied passage begins or ends inside a token of the text, or is tokenized differently
there because of what surrounds it, the span ends at the last token that both share: a span is never longer than the
copied passage, and may be some tokens shorter.

Spans are maximal exact matches (Gusfield, "Algorithms on Strings, Trees, and Sequences", 1997, section 7.8 calls the
lengths matching statistics): a `SuffixMatcher` gives for each token the longest match that ends there, which cannot be
extended to the left; it is a span if the next token does not extend it to the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundling.evaluation.suffix_array import SuffixArray, SuffixMatcher

DEFAULT_MINIMUM = 12
"""Tokens from which a span counts as copied: see docs/memorisation.md for how long spans of plays are that the
training text does not hold."""


PROGRESS_TOKENS = 1 << 13
"""Tokens between two reports of progress."""


@dataclass(frozen=True)
class Span:
    """A part of a text that stands in the training text and does so no further on either side."""

    start: int
    """Its first token in the text that was measured."""
    length: int
    """In tokens."""
    count: int
    """How often it stands in the training text."""
    position: int
    """Its first token where it first stands there."""

    @property
    def stop(self) -> int:
        """The token after it."""
        return self.start + self.length


@dataclass(frozen=True, eq=False)
class Copies:
    """What of a text is copied."""

    spans: tuple[Span, ...]
    """Those of at least the minimum asked for, by start. They may overlap, and none lies inside another."""
    covered: NDArray[np.int32]
    """For each token the length of the longest span that it lies in, short ones included; 0 if there is none."""
    longest_span: Span | None
    """The longest of all, short ones included, the first of equals; None if no token stands in the training text."""

    @property
    def n_tokens(self) -> int:
        """The number of tokens that were measured."""
        return len(self.covered)

    def share(self, minimum: int) -> float:
        """The share of the tokens that lie in spans of at least `minimum` tokens; 0 for a text without tokens."""
        return float(np.mean(self.covered >= minimum)) if len(self.covered) else 0.0

    def longest(self, n_spans: int) -> list[Span]:
        """The longest spans, longest first; of equals the one that comes first."""
        return sorted(self.spans, key=lambda span: (-span.length, span.start))[:n_spans]

    def pieces(self) -> list[tuple[slice, Span | None]]:
        """The text cut where listed spans begin and end: tokens, and the span to which they belong.

        Where spans overlap, a token belongs to the longest, of equals to the first.
        """
        owners = np.full(self.n_tokens, -1)
        for index in sorted(range(len(self.spans)), key=lambda index: (self.spans[index].length, -index)):
            owners[self.spans[index].start : self.spans[index].stop] = index
        cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), self.n_tokens]
        parts = [slice(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]
        return [(part, self.spans[owners[part.start]] if owners[part.start] >= 0 else None) for part in parts]


def find_copies(
    array: SuffixArray,
    tokens: Iterable[int],
    minimum: int = 1,
    on_tokens: Callable[[int], object] = lambda n_tokens: None,
) -> Copies:
    """The maximal spans of `tokens` that stand in the array's text, those of at least `minimum` tokens listed.

    One pass; memory grows by four bytes a token and with the number of listed spans. `on_tokens` is called now and
    then with the number of tokens just read. For text that a model wrote, give what it wrote without its prompt.
    """
    matcher = SuffixMatcher(array)
    spans: list[Span] = []
    lengths: list[NDArray[np.int32]] = []
    block: list[int] = []
    n_tokens, length = 0, 0
    longest: Span | None = None

    def end(length: int, low: int, high: int) -> None:
        """Take up the match that ended with the last token."""
        nonlocal longest
        surpasses = length > (longest.length if longest else 0)
        if surpasses or length >= max(1, minimum):
            span = Span(n_tokens - length, length, high - low, array.first_position(low, high))
            longest = span if surpasses else longest
            if length >= minimum:
                spans.append(span)

    for token in tokens:
        before, interval = length, matcher.interval
        length = matcher.append(token)
        if length <= before:  # it was not extended by this token
            end(before, *interval)
        block.append(length)
        n_tokens += 1
        if len(block) == PROGRESS_TOKENS:
            lengths.append(np.array(block, dtype=np.int32))
            on_tokens(len(block))
            block = []
    end(length, *matcher.interval)
    lengths.append(np.array(block, dtype=np.int32))
    on_tokens(len(block))
    return Copies(tuple(spans), _cover(np.concatenate(lengths)), longest)


def _cover(matches: NDArray[np.int32]) -> NDArray[np.int32]:
    """For each token the length of the longest span over it, from the longest match that ends at each token."""
    covered = np.zeros(len(matches), dtype=np.int32)
    extended = np.append(matches[1:] == matches[:-1] + 1, False)[: len(matches)]
    for stop in (np.flatnonzero(~extended & (matches > 0)) + 1).tolist():
        length = int(matches[stop - 1])
        part = covered[stop - length : stop]
        np.maximum(part, length, out=part)
    return covered

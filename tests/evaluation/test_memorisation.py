"""The copy meter finds every maximal span, and only those."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from groundling.evaluation.memorisation import Copies, Span, find_copies
from groundling.evaluation.suffix_array import SuffixArray

sequences = st.lists(st.integers(0, 2), max_size=40)


def copies_of(training: list[int], text: list[int], minimum: int = 1) -> Copies:
    return find_copies(SuffixArray.build(np.array(training, dtype=np.uint16)), text, minimum)


def places_of(part: list[int], text: list[int]) -> list[int]:
    return [place for place in range(len(text) - len(part) + 1) if text[place : place + len(part)] == part]


def maximal_spans(training: list[int], text: list[int]) -> list[Span]:
    """By the definition: every part of the text that occurs, unless it does with a token more on either side."""
    occurring = {
        (start, stop)
        for start in range(len(text))
        for stop in range(start + 1, len(text) + 1)
        if places_of(text[start:stop], training)
    }
    spans = []
    for start, stop in sorted(occurring):
        if (start - 1, stop) not in occurring and (start, stop + 1) not in occurring:
            places = places_of(text[start:stop], training)
            spans.append(Span(start, stop - start, len(places), places[0]))
    return spans


@given(sequences, sequences, st.integers(0, 5))
@settings(max_examples=300)
def test_the_spans_are_the_maximal_ones(training: list[int], text: list[int], minimum: int) -> None:
    expected = maximal_spans(training, text)
    copies = copies_of(training, text, minimum)
    assert list(copies.spans) == [span for span in expected if span.length >= minimum]
    covered = [max((s.length for s in expected if s.start <= n < s.stop), default=0) for n in range(len(text))]
    assert copies.covered.tolist() == covered
    assert copies.longest_span == max(expected, key=lambda span: span.length, default=None)
    assert copies.n_tokens == len(text)
    if text:
        assert copies.share(minimum) == sum(length >= minimum for length in covered) / len(text)


@given(sequences, st.integers(0, 39), st.integers(1, 40))
def test_a_copy_is_one_span(training: list[int], start: int, length: int) -> None:
    copy = training[start : start + length]
    copies = copies_of(training, copy)
    assert [(span.start, span.length) for span in copies.spans] == ([(0, len(copy))] if copy else [])
    assert copies.share(len(copy)) == (1.0 if copy else 0.0)


@given(sequences, sequences, st.integers(1, 5))
def test_pieces_are_the_whole_text_each_with_its_longest_span(
    training: list[int], text: list[int], minimum: int
) -> None:
    copies = copies_of(training, text, minimum)
    pieces = copies.pieces()
    assert [token for part, _ in pieces for token in text[part]] == text
    assert all(first is not second for (_, first), (_, second) in itertools.pairwise(pieces))
    for part, span in pieces:
        for place in range(part.start, part.stop):
            over = [span for span in copies.spans if span.start <= place < span.stop]
            assert span == max(over, key=lambda span: span.length, default=None)


def test_the_longest_come_first() -> None:
    copies = copies_of([1, 2, 3, 9, 4, 5, 9, 6, 7], [4, 5, 8, 6, 7, 8, 1, 2, 3])
    assert [(span.start, span.length) for span in copies.longest(2)] == [(6, 3), (0, 2)]


def test_progress_covers_every_token() -> None:
    counts: list[int] = []
    array = SuffixArray.build(np.arange(5, dtype=np.uint16))
    find_copies(array, iter([1, 2] * 10_000), on_tokens=counts.append)
    assert sum(counts) == 20_000
    assert len(counts) > 1

"""The index and its matcher equal a search of the whole text, token by token."""

from __future__ import annotations

import errno
import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundling.evaluation.suffix_array import DRAFT_SAMPLE, SuffixArray, SuffixMatcher

# Ids on both sides of a byte, and few of them, so that matches are long and break in every way.
IDS = [0, 1, 255, 256, 65535]
sequences = st.one_of(
    st.lists(st.sampled_from(IDS[:2]), max_size=40),
    st.lists(st.sampled_from(IDS), max_size=60),
    st.builds(
        lambda part, times: (part * times)[:80], st.lists(st.sampled_from(IDS[:3]), max_size=7), st.integers(1, 20)
    ),
)


def places_of(pattern: list[int], text: list[int]) -> list[int]:
    return [place for place in range(len(text)) if text[place : place + len(pattern)] == pattern]


def found(array: SuffixArray, pattern: list[int]) -> list[int]:
    """Where the index says that the pattern stands."""
    low, high = array.encoded_interval(array.encode(pattern))
    return sorted(array.first_position(n, n + 1) for n in range(low, high))


def longest_suffix(context: list[int], text: list[int]) -> int:
    return next(n for n in range(len(context), -1, -1) if n == 0 or places_of(context[len(context) - n :], text))


def as_tokens(text: list[int], dtype: type = np.uint16) -> NDArray[np.uint16]:
    return np.array(text, dtype=dtype)


def opened(tokens: NDArray[np.uint16], directory: Path, warnings: list[str] | None = None) -> SuffixArray:
    sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
    return SuffixArray.open_or_build(tokens, sha256, directory, [].append if warnings is None else warnings.append)


@given(sequences, st.sampled_from([np.uint16, np.uint32]))
def test_the_suffixes_are_sorted(text: list[int], dtype: type) -> None:
    array = SuffixArray.build(as_tokens(text, dtype))
    low, high = array.encoded_interval(b"")
    order = [array.first_position(n, n + 1) for n in range(low, high)]
    assert order == sorted(range(len(text)), key=lambda place: text[place:])


@given(sequences, st.lists(st.sampled_from(IDS[:3]), min_size=1, max_size=5), st.sampled_from([np.uint16, np.uint32]))
def test_a_pattern_is_found_wherever_it_stands(text: list[int], pattern: list[int], dtype: type) -> None:
    array = SuffixArray.build(as_tokens(text, dtype))
    assert found(array, pattern) == places_of(pattern, text)


@given(sequences, sequences)
@settings(max_examples=300)
def test_the_matcher_equals_a_search_of_the_whole_text(text: list[int], context: list[int]) -> None:
    array = SuffixArray.build(as_tokens(text))
    matcher = SuffixMatcher(array)
    for end, token in enumerate(context, 1):
        length = matcher.append(token)
        assert length == longest_suffix(context[:end], text)
        match = context[end - length : end]
        low, high = matcher.interval
        if match:
            assert sorted(array.first_position(n, n + 1) for n in range(low, high)) == places_of(match, text)
        else:
            assert (low, high) == (0, len(text))


@given(sequences, sequences, st.integers(0, 9))
def test_a_draft_stands_in_the_text_after_the_match(text: list[int], context: list[int], n_tokens: int) -> None:
    matcher = SuffixMatcher(SuffixArray.build(as_tokens(text)))
    for token in context:
        matcher.append(token)
    length = matcher.length
    draft = matcher.draft(n_tokens)
    if not length:
        assert draft == []
        return
    match = context[len(context) - length :]
    places = places_of(match + draft, text)
    assert places
    if len(draft) < n_tokens:  # only where the text ends is a draft shorter than asked for
        assert places[-1] + length + len(draft) == len(text)
    if draft and len(places_of(match, text)) <= DRAFT_SAMPLE:
        following = [text[place + length] for place in places_of(match, text) if place + length < len(text)]
        assert following.count(draft[0]) == max(map(following.count, following))


def test_a_draft_of_a_common_match_takes_the_majority() -> None:
    text = [7, 1] * 300 + [7, 2] * 700 + [7, 3] * 300
    matcher = SuffixMatcher(SuffixArray.build(as_tokens(text)))
    matcher.append(7)
    assert matcher.draft(5) == [2, 7, 2, 7, 2]


def test_an_id_that_the_text_cannot_hold_is_refused(tokens: NDArray[np.uint16]) -> None:
    with pytest.raises(OverflowError):
        SuffixArray.build(tokens).encode([70_000])


def test_an_id_that_the_text_cannot_hold_ends_a_match(tokens: NDArray[np.uint16]) -> None:
    matcher = SuffixMatcher(SuffixArray.build(tokens))
    assert [matcher.append(token) for token in (int(tokens[0]), 70_000, int(tokens[0]))] == [1, 0, 1]


def test_the_index_is_kept_and_opened_again(tokens: NDArray[np.uint16], tmp_path: Path) -> None:
    warnings: list[str] = []
    first = opened(tokens, tmp_path, warnings)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    again = opened(tokens, tmp_path, warnings)
    assert path.stat().st_mtime_ns == written
    assert warnings == []
    for pattern in (tokens[:1].tolist(), tokens[5:7].tolist()):
        assert found(first, pattern) == found(again, pattern) == found(SuffixArray.build(tokens), pattern) != []


@pytest.mark.parametrize("place", [3, 30, 70, 130, 500, 1100, -1])
def test_a_damaged_index_is_made_anew_with_one_warning(tokens: NDArray[np.uint16], tmp_path: Path, place: int) -> None:
    opened(tokens, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    for content in (bytes(damaged), whole[:-2], whole + b"\0", b""):
        path.write_bytes(content)
        warnings: list[str] = []
        array = opened(tokens, tmp_path, warnings)
        assert len(warnings) == 1
        assert path.name in warnings[0]
        assert path.read_bytes() == whole
        assert found(array, tokens[:3].tolist())[0] == 0


def test_where_nothing_can_be_written_the_index_is_made_in_memory(tokens: NDArray[np.uint16], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warnings: list[str] = []
    array = opened(tokens, tmp_path / "file", warnings)
    assert len(warnings) == 1
    assert found(array, tokens[:3].tolist())[0] == 0


def test_a_cache_that_may_not_be_searched_is_done_without(
    tokens: NDArray[np.uint16], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    warnings: list[str] = []
    assert found(opened(tokens, tmp_path, warnings), tokens[:3].tolist())[0] == 0
    assert "Permission denied" in warnings[0]


def test_an_append_is_quick_and_stays_so_in_a_repetitive_text() -> None:
    """Not a measurement, a guard: a search of the text, or one of quadratic cost, takes a hundred times as long."""
    text = np.zeros(200_000, dtype=np.uint16)
    text[::1000] = 1
    matcher = SuffixMatcher(SuffixArray.build(text))
    start = time.process_time()
    for token in [0] * 1500 + [1] + [0] * 900 + [1, 1] + [0] * 100:
        matcher.append(token)
    assert time.process_time() - start < 2

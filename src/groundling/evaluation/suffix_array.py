"""Where any sequence of tokens stands in a text: a suffix array, and a matcher that follows a growing context.

Invariant: every answer equals that of a search of the whole text, token by token. The index is derived from the
tokens alone and named by their SHA-256, so a stale or damaged file is made anew, never believed.

The array (Manber and Myers, "Suffix arrays: a new method for on-line string searches", SIAM J. Comput. 22, 1993)
holds the positions of the text sorted by what follows them; all places of a pattern are neighbours in it, and two
binary searches find them. libdivsufsort sorts bytes: with tokens written big-endian, bytes sort as tokens do, and
the suffixes that begin inside a token are dropped from its result.

File: `HEADER_BYTES` of header (magic, bytes per token, number of tokens, SHA-256 of the tokens' little-endian bytes
as `TokenFile.sha256` has it, SHA-256 of the rest of the file), the array as little-endian int32, the big-endian tokens.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from groundling.corpus.shards import MAX_TOKENS, Tokens
from groundling.files import HASH_BLOCK_BYTES, atomic_file

MAGIC = b"groundling suffixes 1\n".ljust(24, b"\0")
HEADER = struct.Struct("<24sqq32s32s")
HEADER_BYTES = 128
"""A multiple of four, so that the mapped array is aligned."""
CHUNK = 1 << 22
"""Entries of libdivsufsort's result that are filtered at a time."""
NAME_CHARS = 32
"""Of a SHA-256 in hexadecimal, as in the names of cached token files."""
DRAFT_SAMPLE = 64
"""Occurrences of a match whose next tokens are counted; more are sampled evenly."""

Warn = Callable[[str], None]


class SuffixArray:
    """The sorted suffixes of a text of up to 2**31 - 1 tokens; `build` or `open_or_build` makes one.

    Tokens go in and out as ids; `encode` raises OverflowError for one from `n_ids` on.
    """

    def __init__(self, text: bytes | mmap.mmap, start: int, token_bytes: int, order: NDArray[np.int32]) -> None:
        self.n_tokens = len(order)
        self._text = text  # big-endian tokens from `start` to its end, where slices end by themselves
        self._start = start
        self.n_ids = 1 << 8 * token_bytes
        """Ids that the text's type can hold; a larger one stands nowhere."""
        self._token_bytes = token_bytes
        self._order = order
        self._entries = order.data  # gives int, several times as quickly as NumPy gives its scalars

    @classmethod
    def build(cls, tokens: Tokens) -> Self:
        """The index of some tokens, in memory: 4 bytes a token for the array, and a copy of the tokens."""
        text, order = _big_endian(tokens), np.empty(len(tokens), dtype=np.int32)
        begin = 0
        for part in _sorted_positions(text, tokens.itemsize):
            order[begin : begin + len(part)] = part
            begin += len(part)
        return cls(text.tobytes(), 0, tokens.itemsize, order)

    @classmethod
    def open_or_build(cls, tokens: Tokens, sha256: str, directory: Path, warn: Warn) -> Self:
        """The index of the tokens with this sum, memory-mapped from `directory`, where it is made if need be.

        Opening it reads the whole file once, for its sum. `warn` is told once if a file was there and could not
        be used, or if none can be written; the index is then in memory.
        """
        path = directory / f"suffixes-{sha256[:NAME_CHARS]}.bin"
        try:
            if path.exists():
                if found := cls._open(path, sha256, tokens):
                    return found
                warn(f"the index {path} is damaged or stale: it is made anew")
            _write(tokens, sha256, path)
        except OSError as error:
            warn(f"the index {path} cannot be written ({error.strerror}): it is made in memory")
            return cls.build(tokens)
        return cls._open(path, sha256, tokens) or cls.build(tokens)

    @classmethod
    def _open(cls, path: Path, sha256: str, tokens: Tokens) -> Self | None:
        """The index at `path`, or None unless it is whole and of these tokens."""
        n_tokens, token_bytes = len(tokens), tokens.itemsize
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                rest = hashlib.sha256()
                while block := file.read(HASH_BLOCK_BYTES):  # not through the mapping: its pages would count as ours
                    rest.update(block)
                expected = _header(token_bytes, n_tokens, sha256, rest.digest())
                if header != expected or file.tell() != HEADER_BYTES + n_tokens * (4 + token_bytes):
                    return None
                text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            return None
        order = np.frombuffer(text, dtype="<i4", count=n_tokens, offset=HEADER_BYTES)
        native = order.astype(np.int32, copy=False)
        return cls(text, HEADER_BYTES + 4 * n_tokens, token_bytes, native)

    def first_position(self, low: int, high: int) -> int:
        """The least position in a range of sorted suffixes."""
        return int(self._order[low:high].min())

    def encode(self, tokens: Sequence[int]) -> bytes:
        """Tokens as the index compares them."""
        size = self._token_bytes
        return b"".join([token.to_bytes(size, "big") for token in map(int, tokens)])

    def tokens_at(self, position: int, n_tokens: int) -> list[int]:
        """Up to `n_tokens` tokens of the text from `position` on; fewer at its end."""
        start = self._start + position * self._token_bytes
        found = self._text[start : start + n_tokens * self._token_bytes]
        return np.frombuffer(found, dtype=f">u{self._token_bytes}").tolist()  # type: ignore[no-any-return]

    def encoded_interval(self, wanted: bytes) -> tuple[int, int]:
        """The range [low, high) of sorted suffixes that begin with an encoded pattern; low == high if none does."""
        # Suffixes cut to the pattern's length are still in order, so both ends of the range can be searched.
        beginning = self._beginning(len(wanted))
        low = bisect_left(self._entries, wanted, key=beginning)
        if low == self.n_tokens or beginning(self._entries[low]) != wanted:
            return low, low
        return low, bisect_right(self._entries, wanted, low, key=beginning)

    def narrowed(self, low: int, high: int, depth: int, token: bytes) -> tuple[int, int]:
        """Of the suffixes in [low, high), which agree in `depth` tokens, those with this encoded token next."""
        text, start, size = self._text, self._start + depth * self._token_bytes, self._token_bytes

        def following(position: int) -> bytes:
            begin = start + position * size
            return text[begin : begin + size]  # empty at the end of the text: before every token, as it is sorted

        low = bisect_left(self._entries, token, low, high, key=following)
        if low == high or following(self._entries[low]) != token:
            return low, low
        if high - low == 1 or following(self._entries[high - 1]) == token:
            return low, high
        return low, bisect_right(self._entries, token, low, high, key=following)

    def longest_suffix(self, encoded: bytes, longest: int) -> int:
        """The largest length up to `longest` (tokens) at which the end of `encoded` stands in the text.

        If a suffix stands there so does every shorter one: lengths are doubled until one fails, then halved between.
        """
        found, length = 0, 1
        while length <= longest and self._occurs(encoded[len(encoded) - length * self._token_bytes :]):
            found, length = length, 2 * length
        fails = min(length, longest + 1)
        while fails - found > 1:
            middle = (found + fails) // 2
            if self._occurs(encoded[len(encoded) - middle * self._token_bytes :]):
                found = middle
            else:
                fails = middle
        return found

    def _beginning(self, n_bytes: int) -> Callable[[int], bytes]:
        """Of the suffix at a position, so many bytes."""
        text, start, size = self._text, self._start, self._token_bytes

        def beginning(position: int) -> bytes:
            begin = start + position * size
            return text[begin : begin + n_bytes]

        return beginning

    def _occurs(self, wanted: bytes) -> bool:
        beginning = self._beginning(len(wanted))
        low = bisect_left(self._entries, wanted, key=beginning)
        return low < self.n_tokens and beginning(self._entries[low]) == wanted

    def likely_next(self, low: int, high: int, depth: int) -> int | None:
        """The commonest token after the first `depth` of the suffixes in [low, high), None if all end there.

        Counted over all of up to `DRAFT_SAMPLE` suffixes, else over that many, spread evenly: they are sorted by the
        next token, so a sample misses only tokens with less than their share of it. Of equals, the lowest id.
        """
        step = -(-(high - low) // DRAFT_SAMPLE)
        size, start = self._token_bytes, self._start + depth * self._token_bytes
        places = self._order[low:high:step].tolist()
        following = Counter(self._text[start + place * size : start + (place + 1) * size] for place in places)
        following.pop(b"", None)
        if not following:
            return None
        return int.from_bytes(max(sorted(following), key=following.__getitem__), "big")


class SuffixMatcher:
    """Follows a context that grows at its end: the longest suffix of it that the text has.

    An `append` that extends the match costs one binary search inside the present range; one that breaks it, some
    `2 log2(new length)` searches of the array.
    """

    def __init__(self, array: SuffixArray) -> None:
        self.array = array
        self.reset()

    def reset(self) -> None:
        """Begin with an empty context."""
        self.length = 0
        """Tokens in the longest suffix of the context that stands in the text."""
        self._matched = bytearray()
        self._low, self._high = 0, self.array.n_tokens

    @property
    def interval(self) -> tuple[int, int]:
        """The range of sorted suffixes that begin with the match; of an empty match, the whole array."""
        return self._low, self._high

    def append(self, token: int) -> int:
        """Add a token to the context and return the new length of the match."""
        array = self.array
        if token >= array.n_ids:
            self.reset()
            return 0
        encoded = array.encode((token,))
        low, high = array.narrowed(self._low, self._high, self.length, encoded)
        self._matched += encoded
        if low < high:
            self.length += 1
            self._low, self._high = low, high
            return self.length
        self.length = array.longest_suffix(bytes(self._matched), self.length)
        del self._matched[: len(self._matched) - self.length * len(encoded)]
        self._low, self._high = array.encoded_interval(bytes(self._matched))
        return self.length

    def draft(self, n_tokens: int) -> list[int]:
        """Up to `n_tokens` tokens that follow the match in the text: at each, the commonest (see `likely_next`).

        Narrows the occurrences to those that go on with the chosen token, so that what is drafted as a whole stands
        in the text after the match. Empty without a match; shorter than asked for where the text ends.
        """
        drafted: list[int] = []
        if not self.length:
            return drafted
        low, high, depth = self._low, self._high, self.length
        while len(drafted) < n_tokens and high - low > 1:
            token = self.array.likely_next(low, high, depth)
            if token is None:
                return drafted
            drafted.append(token)
            low, high = self.array.narrowed(low, high, depth, self.array.encode((token,)))
            depth += 1
        if high - low == 1:
            position = self.array.first_position(low, high) + depth
            drafted += self.array.tokens_at(position, n_tokens - len(drafted))
        return drafted


def _big_endian(tokens: Tokens) -> NDArray[np.uint8]:
    return tokens.astype(f">u{tokens.itemsize}").view(np.uint8)


def _sorted_positions(text: NDArray[np.uint8], token_bytes: int) -> Iterator[NDArray[np.int32]]:
    """The positions of big-endian tokens in the order of their suffixes, in parts.

    Peak memory is the text and, for as long as the parts are drawn, 4 bytes for each of the text's bytes (8 from
    2**31 on). `divsufsort` of a wider array would do the same with two more copies of both.
    """
    if len(text) > MAX_TOKENS * token_bytes:
        raise ValueError(f"an index holds at most {MAX_TOKENS:,} tokens")
    if not len(text):
        return
    # Here, because its extension loads an OpenMP runtime, which only those who build an index should have.
    from pydivsufsort import divsufsort

    order = divsufsort(text)
    for begin in range(0, len(order), CHUNK):
        part = order[begin : begin + CHUNK]
        yield (part[part % token_bytes == 0] // token_bytes).astype(np.int32)


def _header(token_bytes: int, n_tokens: int, tokens_sum: str, rest_sum: bytes) -> bytes:
    return HEADER.pack(MAGIC, token_bytes, n_tokens, bytes.fromhex(tokens_sum), rest_sum).ljust(HEADER_BYTES, b"\0")


def _write(tokens: Tokens, sha256: str, path: Path) -> None:
    """Write the index of tokens with this sum, part by part."""
    text = _big_endian(tokens)
    rest = hashlib.sha256()
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for part in _sorted_positions(text, tokens.itemsize):
            entries = part.astype("<i4", copy=False).tobytes()
            rest.update(entries)
            file.write(entries)
        rest.update(text.data)
        file.write(text.data)
        file.seek(0)
        file.write(_header(tokens.itemsize, len(tokens), sha256, rest.digest()))

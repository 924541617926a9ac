"""Token files: a memory-mapped array of token ids behind llm.c's header.

Invariant: what is opened holds as many tokens as its header says; a bare file has none that could.

Format (llm.c, dev/data/data_common.py): 256 little-endian int32 (magic, version, number of tokens), then the
tokens, uint16 (magic 20240520, version 1) or uint32 (20240801, 7). llm.c leaves the rest of the header zero;
here it also carries two SHA-256 sums: of what the tokens were made of, and of the tokens. nanoGPT's files,
bare uint16 without a header, are read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from groundling.errors import CorpusError

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
TokenType = np.dtype[np.uint16] | np.dtype[np.uint32]

HEADER_BYTES = 1024
VERSIONS: dict[int, tuple[int, TokenType]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""magic -> version, type of a token"""
EVALUATION_MAGIC = 20240522
"""llm.c's multiple-choice files: the same suffix, other content."""
MAX_TOKENS = 2**31 - 1
"""The header's number of tokens is an int32."""
SOURCE_SUM = slice(16, 48)
TOKENS_SUM = slice(48, 80)
"""Bytes of the header that hold the two sums; zero in files by others."""
SCAN_TOKENS = 1 << 22


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of a file, read-only and paged in from the disk as they are used."""

    path: Path
    tokens: Tokens
    """One dimension; uint16, or uint32 where the vocabulary has more than 65,536 ids."""
    header: bytes = b""
    """The file's header, empty if it has none."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a token file with llm.c's header, or a bare one of uint16 as nanoGPT writes it.

        Raises `CorpusError` if it is not whole, or has fewer than two tokens.
        """
        if path.exists() and not path.is_file():  # opening a FIFO would wait for its writer
            raise CorpusError(f"{path} is not a regular file: give a token file")
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
        except OSError as error:
            raise CorpusError(f"the token file {path} cannot be read ({error.strerror}): check the path") from None
        dtype: TokenType
        magic, version, count = np.frombuffer(header[:12].ljust(12, b"\0"), dtype="<i4").tolist()
        if magic == EVALUATION_MAGIC:
            raise CorpusError(f"{path} is an evaluation file of llm.c, not a token file: give one with text in it")
        if magic in VERSIONS:
            expected_version, dtype = VERSIONS[magic]
            if version != expected_version:
                raise CorpusError(
                    f"the token file {path} has version {version} of its format, not {expected_version}: "
                    f"write it again with a current llm.c or Groundling"
                )
            whole_size = HEADER_BYTES + count * dtype.itemsize
            if size != whole_size:
                raise CorpusError(
                    f"the token file {path} is damaged: {count:,} tokens take {whole_size:,} bytes, and it "
                    f"has {size:,}; copy or make it again"
                )
        else:
            header, dtype, count = b"", np.dtype("<u2"), size // 2
            if size % 2:
                raise CorpusError(
                    f"the token file {path} has {size:,} bytes, an odd number: it is cut off, or it is not "
                    f"made of 16-bit tokens; copy or make it again"
                )
        if count < 2:
            raise CorpusError(
                f"the token file {path} has {max(count, 0)} tokens, and at least two are needed to predict "
                f"one from the other: give a larger one"
            )
        tokens = np.memmap(path, dtype=dtype, mode="r", offset=len(header), shape=(count,))
        return cls(path, tokens, header)

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.tokens)

    def sha256(self) -> str:
        """SHA-256 of the tokens' bytes, little-endian, without the header."""
        digest = hashlib.sha256()
        for tokens in self.scan():
            digest.update(np.ascontiguousarray(tokens).data)
        return digest.hexdigest()

    def max_token(self) -> int:
        """The largest id in the file."""
        return max(int(tokens.max()) for tokens in self.scan())

    def scan(self) -> Iterator[Tokens]:
        """All tokens in order, in pieces of constant size."""
        for begin in range(0, self.n_tokens, SCAN_TOKENS):
            yield self.tokens[begin : begin + SCAN_TOKENS]

    def holds(self, source: str) -> bool:
        """Whether the file was made of `source`, a SHA-256, and its tokens are still what was written."""
        return self.header[SOURCE_SUM].hex() == source and self.header[TOKENS_SUM].hex() == self.sha256()

    def split(self, fraction: float) -> tuple[Self, Self]:
        """The file without its last `fraction` of tokens, and that tail; two views of one mapping."""
        cut = self.n_tokens - round(fraction * self.n_tokens) if 0 < fraction < 1 else 0
        if not 2 <= cut <= self.n_tokens - 2:
            raise CorpusError(
                f"{self.path} with {self.n_tokens:,} tokens cannot be split at heldout_fraction={fraction}: "
                f"each side needs two tokens"
            )
        return replace(self, tokens=self.tokens[:cut]), replace(self, tokens=self.tokens[cut:])


def occurring_ids(tokens: Tokens, n_vocab: int) -> NDArray[np.int64]:
    """The ids that occur in the tokens, ascending."""
    occurs = np.zeros(n_vocab, dtype=np.bool_)
    for begin in range(0, len(tokens), SCAN_TOKENS):
        occurs[tokens[begin : begin + SCAN_TOKENS]] = True
    return np.flatnonzero(occurs)


def token_dtype(n_vocab: int) -> TokenType:
    """The smallest type for that many ids: uint16 up to 65,536 of them, else uint32."""
    return np.dtype("<u2") if n_vocab <= 1 << 16 else np.dtype("<u4")


def make_header(dtype: TokenType, n_tokens: int, source: str, tokens: str) -> bytes:
    """llm.c's header; `source` and `tokens` are SHA-256 sums in hexadecimal."""
    magic = next(magic for magic, (_, its_dtype) in VERSIONS.items() if its_dtype == dtype)
    header = bytearray(HEADER_BYTES)
    header[:12] = np.array([magic, VERSIONS[magic][0], n_tokens], dtype="<i4").tobytes()
    header[SOURCE_SUM] = bytes.fromhex(source)
    header[TOKENS_SUM] = bytes.fromhex(tokens)
    return bytes(header)

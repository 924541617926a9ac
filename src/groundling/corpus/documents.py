"""A document: one text with a name, read in constant memory as often as it is needed.

Invariant: a document's blocks are the same at every reading, or the reading ends in a `CorpusError`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from groundling.corpus.blocks import cut_blocks, read_text
from groundling.errors import CorpusError

MAX_CHARACTER_BYTES = 4
"""Of UTF-8."""
SEARCH_BYTES = 1 << 20
"""How far from the wanted place a line end is looked for when one document is split, in constant memory."""


@dataclass(frozen=True)
class Document:
    """A text: where its bytes come from, and which of them are meant."""

    name: str
    """As the user would name it; stands in messages."""
    origins: tuple[str, ...]
    """What it is made of, itself first: a path without symbolic links, or packaged names. Two documents are
    the same if their first origin is, and share text if they have any in common."""
    open: Callable[[], BinaryIO]
    start: int = 0
    stop: int | None = None
    """The range of bytes meant, before normalisation; None is the end."""

    @classmethod
    def from_text(cls, name: str, render: Callable[[], str], shares: Sequence[str] = ()) -> Document:
        """A packaged text, rendered anew at each reading; `shares` names the texts that it is made of."""
        return cls(name, (name, *shares), lambda: io.BytesIO(render().encode("utf-8")))

    @classmethod
    def from_file(cls, path: Path, name: str | None = None) -> Document:
        """A text in a regular file."""
        return cls(name or str(path), (str(path.resolve()),), lambda: path.open("rb"))

    @property
    def origin(self) -> str:
        """What tells this document from others."""
        return self.origins[0]

    def blocks(self) -> Iterator[str]:
        """The normalised text in blocks that can be tokenized one by one (see `blocks.cut_blocks`).

        Raises `CorpusError` if the text cannot be read, or is not UTF-8.
        """
        try:
            with self.open() as file:
                yield from cut_blocks(read_text(file, self.name, self.start, self.stop))
        except OSError as error:
            raise CorpusError(
                f"{self.name} cannot be read: {error.strerror}; check the file and its permissions"
            ) from error

    def blocks_as_summed(self) -> Iterator[str]:
        """`blocks`, and after the last one a `CorpusError` if they no longer are the text that `sha256` is of."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block.encode("utf-8"))
            yield block
        if digest.hexdigest() != self.sha256:
            raise CorpusError(f"{self.name} changed while it was read: start again when it is at rest")

    @property
    def sha256(self) -> str:
        """SHA-256 of the normalised text's bytes."""
        return self._measured[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of the normalised text in UTF-8."""
        return self._measured[1]

    @cached_property
    def _measured(self) -> tuple[str, int]:
        digest, n_bytes = hashlib.sha256(), 0
        for block in self.blocks():
            encoded = block.encode("utf-8")
            digest.update(encoded)
            n_bytes += len(encoded)
        if not n_bytes:
            raise CorpusError(f"{self.name} is empty: give a file with text in it")
        return digest.hexdigest(), n_bytes


def split_heldout(documents: Sequence[Document], fraction: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Documents to train on, and documents to hold out: about `fraction` of the bytes, from the end.

    Of several documents the last ones, whole: as many as come nearest to the fraction, at least one on
    either side. Of a single one its tail, from a line's beginning, or a word's where no line ends near (within
    1 MiB, and half of the smaller side). Never windows drawn at random, whose neighbours would give the held-out text
    away. Raises `CorpusError` unless 0 < fraction < 1 and both sides have text, and if most of it were held out where
    less than half of that was asked for.
    """
    if not 0 < fraction < 1:
        raise CorpusError(f"heldout_fraction is {fraction}: give a number between 0 and 1, such as 0.1")
    if not documents:
        raise CorpusError("there is no document to hold anything out of: name a text")
    if len(documents) == 1:
        train, heldout = _split_one(documents[0], fraction)
        return (train,), (heldout,)
    total = sum(document.n_bytes for document in documents)
    wanted = fraction * total
    best, best_size, size = 1, documents[-1].n_bytes, 0
    for count in range(1, len(documents)):
        size += documents[-count].n_bytes
        if abs(size - wanted) < abs(best_size - wanted):
            best, best_size = count, size
    if best_size > max(total / 2, 2 * wanted):
        raise CorpusError(
            f"{documents[-1].name}, the last document, is {best_size / total:.0%} of the text, where heldout_fraction="
            f"{fraction} asks for less, and documents are held out whole: name a held-out text, or order them otherwise"
        )
    return tuple(documents[:-best]), tuple(documents[-best:])


def _split_one(document: Document, fraction: float) -> tuple[Document, Document]:
    with document.open() as file:
        stop = document.stop if document.stop is not None else file.seek(0, io.SEEK_END)
        wanted = stop - round(fraction * (stop - document.start))
        cut = _cut_near(file, wanted, document.start, stop)
    train, heldout = replace(document, stop=cut), replace(document, start=cut, stop=stop)
    if not (_has_text(train) and _has_text(heldout)):
        raise CorpusError(
            f"{document.name} cannot be split at heldout_fraction={fraction}: one side would have "
            f"no text; choose another fraction, or name a held-out text"
        )
    return train, heldout


def _cut_near(file: BinaryIO, wanted: int, start: int, stop: int) -> int:
    """The byte in [start, stop] nearest to `wanted` where a line begins, else a word, else a character."""
    near = max(MAX_CHARACTER_BYTES, min(SEARCH_BYTES, (wanted - start) // 2, (stop - wanted) // 2))
    low, high = max(start, wanted - near), min(stop, wanted + near)
    file.seek(low)
    around = file.read(high - low)
    middle = wanted - low
    for mark in (rb"\n", rb"\r(?!\n)", rb" "):  # all ASCII, so never a part of another character
        places = [match.end() for match in re.finditer(mark, around) if match.end() < len(around)]
        if places:
            return low + min(places, key=lambda place: abs(place - middle))
    while 0 < middle < len(around) and around[middle] & 0xC0 == 0x80:  # the inside of a UTF-8 sequence
        middle -= 1
    return low + middle


def _has_text(document: Document) -> bool:
    return document.stop != document.start and any(not block.isspace() for block in document.blocks())

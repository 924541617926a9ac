"""The copy meter of the page: a text cut where its copied passages begin and end, and what is said of them.

Invariant: what is marked stands in the training text exactly, as `evaluation.memorisation` found it. Where passages
overlap, a token belongs to the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from groundling.corpus.places import Place, Places
from groundling.corpus.tokenizer import Tokenizer
from groundling.evaluation.memorisation import DEFAULT_MINIMUM, Span, find_copies
from groundling.evaluation.suffix_array import SuffixArray

LISTED = 5
"""Passages that are listed beside a text."""


@dataclass(frozen=True)
class Passage:
    """A copied span and where it stands."""

    text: str
    length: int
    """In tokens."""
    count: int
    """How often it stands in the training text."""
    place: Place

    @property
    def where(self) -> str:
        """Where it first stands, and how often else."""
        others = self.count - 1
        more = f", and in {others:,} more {'place' if others == 1 else 'places'}" if others else ""
        return f"{self.place}{more}"


@dataclass(frozen=True)
class Measured:
    """What of a text is copied."""

    pieces: tuple[tuple[str, Passage | None], ...]
    """The whole text, in order."""
    share: float
    """Of its tokens, those that lie in copied passages."""
    n_tokens: int
    minimum: int
    """Tokens from which a passage counts."""

    @property
    def passages(self) -> list[Passage]:
        """Each copied passage once, longest first."""
        found = {id(passage): passage for _, passage in self.pieces if passage}
        return sorted(found.values(), key=lambda passage: -passage.length)

    @property
    def sentence(self) -> str:
        """How much is copied, and mostly from where."""
        if not self.n_tokens:
            return "Nothing was written."
        by_scene = Counter[str]()
        for text, passage in self.pieces:
            if passage:
                by_scene[scene(passage.place)] += len(text)
        if not by_scene:
            return f"Nothing of this stands in the training text in passages of {self.minimum} tokens or more."
        (most, n_characters), *others = by_scene.most_common()
        share = whole_percent(self.share)
        if not others:
            return f"{share} of this is verbatim from {most}."
        of_it = whole_percent(n_characters / by_scene.total())
        return f"{share} of this is verbatim from the training text, {of_it} of that from {most}."


def scene(place: Place) -> str:
    """A place without its speaker or line."""
    return ", ".join(part for part in (place.play, place.act, place.scene) if part) or place.document


def whole_percent(share: float) -> str:
    """A share in whole per cent; 0 and 100 only where they are exact."""
    rounded = round(100 * share)
    whole = rounded if share in (0, 1) else min(99, max(1, rounded))
    return f"{whole}\N{NO-BREAK SPACE}%"


@dataclass(frozen=True, eq=False)
class CopyMeter:
    """A training text, ready to be searched."""

    array: SuffixArray
    places: Places
    tokenizer: Tokenizer
    minimum: int = DEFAULT_MINIMUM

    def measure(self, tokens: Sequence[int]) -> Measured:
        """What of these tokens, which a model wrote, stands in the training text."""
        copies = find_copies(self.array, tokens, self.minimum)
        passages = {span: self._passage(tokens, span) for span in copies.spans}
        pieces = copies.pieces()
        texts = self.tokenizer.decode_parts(tokens[part] for part, _ in pieces)
        marked = ((text, passages[span] if span else None) for text, (_, span) in zip(texts, pieces, strict=True))
        return Measured(tuple(marked), copies.share(self.minimum), len(tokens), self.minimum)

    def _passage(self, tokens: Sequence[int], span: Span) -> Passage:
        text = self.tokenizer.decode(list(tokens[span.start : span.stop]))
        return Passage(text, span.length, span.count, self.places.at(span.position))

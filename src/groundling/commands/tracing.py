"""How copied spans are shown: a text in colours on a terminal, lists elsewhere, JSON for programs.

Invariant: shows what `evaluation.memorisation` measured. What is not asked about, a prompt, is shown dim and not
counted: spans are looked for in what follows it alone.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from groundling import runtime
from groundling.commands.saying import say
from groundling.corpus.places import Places
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError
from groundling.evaluation.memorisation import DEFAULT_MINIMUM, Copies, Span, find_copies
from groundling.evaluation.suffix_array import SuffixArray
from groundling.training.checkpoint import MANIFEST
from groundling.training.progress import progress_bar
from groundling.training.run_folder import RunFolder, folder_of

TokenArray = NDArray[np.uint32]

STYLES = ("", "cyan", "green", "yellow", "bold red")
"""Of tokens in no span of the minimum, and in spans from 1, 2, 4 and 8 times the minimum on."""

LISTED_SPANS = 10
SLOW_INDEX_TOKENS = 5_000_000
"""Their index takes some seconds to make: a hundred million took a minute (docs/memorisation.md)."""
QUOTE_CHARS = 48
BLOCK_TOKENS = 1 << 16

# A traced text may hold escape sequences, which are not for the reader's terminal to obey.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


@dataclass(frozen=True, eq=False)
class Tracer:
    """The training text of a run, ready to be searched."""

    array: SuffixArray
    places: Places
    tokenizer: Tokenizer

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """The tracer of a run folder, or of a checkpoint in one; its index is kept in the cache folder.

        Raises `CheckpointError` if the folder has no training text, `CorpusError` if it is damaged.
        """
        if not run.is_dir():
            raise CheckpointError(f"{run} is no run folder: give the folder that `groundling train` printed")
        folder = folder_of(run, run) if (run / MANIFEST).exists() else RunFolder(run)
        corpus = folder.text()
        places = Places(corpus.train.tokens, corpus.tokenizer, folder.document_names())
        if corpus.train.n_tokens >= SLOW_INDEX_TOKENS:
            say(f"opening the index of {corpus.train.n_tokens:,} tokens, which is made at its first use ...")
        warn = lambda message: say(f"warning: {message}")  # noqa: E731
        array = SuffixArray.open_or_build(corpus.train.tokens, corpus.train.sha256(), runtime.cache_dir(), warn)
        return cls(array, places, corpus.tokenizer)

    def trace_written(self, prompt: str, text: str) -> Trace:
        """`trace` of what a model wrote after a prompt, without a last character that it did not finish."""
        prompt_ids = self.tokenizer.encode(prompt)
        whole = text.removesuffix("\N{REPLACEMENT CHARACTER}")  # its three bytes are not what the model wrote
        return self.trace(prompt_ids + self.tokenizer.encode(whole), len(prompt_ids))

    def trace(self, tokens: Sequence[int] | TokenArray, n_prompt: int = 0, minimum: int = DEFAULT_MINIMUM) -> Trace:
        """What of `tokens`, after the first `n_prompt`, stands in the training text."""
        ids = np.asarray(tokens, dtype=np.uint32)
        with progress_bar("tracing", len(ids) - n_prompt) as advance:
            copies = find_copies(self.array, _in_order(ids[n_prompt:]), minimum, advance)
        return Trace(self, ids, n_prompt, minimum, copies)


@dataclass(frozen=True, eq=False)
class Trace:
    """What of a text stands in the training text. The spans' starts count from the prompt's end."""

    tracer: Tracer
    tokens: TokenArray
    n_prompt: int
    minimum: int
    copies: Copies

    def print(self, console: Console, n_spans: int = LISTED_SPANS) -> None:
        """The text, in colours if the console has them; the longest spans; the summary."""
        self.print_text(console)
        for line in trace_lines(self, n_spans):
            console.print(Text(line), soft_wrap=True)

    def print_text(self, console: Console) -> None:
        """The text and an empty line; on a terminal with colours, the copied spans coloured, with a legend."""
        coloured = console.is_terminal and not console.no_color
        last = "\n"
        for band, piece in self._pieces(coloured):
            shown = piece.translate(_CONTROLS) if console.is_terminal else piece
            if coloured:
                console.print(Text(shown, "dim" if band < 0 else STYLES[band]), end="", soft_wrap=True)
            else:
                console.file.write(shown)
            last = piece[-1:] or last
        console.print("" if last == "\n" else "\n")
        if coloured:
            console.print(self._legend(), soft_wrap=True)

    def _pieces(self, coloured: bool) -> Iterator[tuple[int, str]]:
        """The text in pieces of one band of span lengths each: an index of `STYLES`, -1 for the prompt."""
        bands = np.full(len(self.tokens), -1)
        bounds = band_bounds(self.minimum)
        bands[self.n_prompt :] = np.searchsorted(bounds, self.copies.covered, side="right") if coloured else 0
        cuts = np.flatnonzero(np.diff(bands)) + 1
        parts = [
            slice(first, min(end, first + BLOCK_TOKENS))
            for begin, end in itertools.pairwise([0, *cuts.tolist(), len(bands)])
            for first in range(begin, end, BLOCK_TOKENS)
        ]
        texts = self.tracer.tokenizer.decode_parts(self.tokens[part].tolist() for part in parts)
        for part, text in zip(parts, texts, strict=True):
            yield int(bands[part.start]), text

    def _legend(self) -> Text:
        bounds = band_bounds(self.minimum)
        ranges = [f"{low}-{high - 1}" for low, high in itertools.pairwise(bounds)] + [f"{bounds[-1]}+"]
        legend = Text("tokens in the span:")
        for style, tokens in zip(STYLES[1:], ranges, strict=True):
            legend.append(" ").append(tokens, style)
        return legend

    def text_of(self, span: Span) -> str:
        """The text of a span."""
        begin = self.n_prompt + span.start
        return self.tracer.tokenizer.decode(self.tokens[begin : begin + span.length].tolist())

    def quote(self, span: Span, n_chars: int) -> str:
        """How a span begins, in a line of about so many characters."""
        text = self.text_of(span).strip("\N{REPLACEMENT CHARACTER}")  # a span may begin inside a character
        words = " ".join(text.replace("\n", " / ").split()).strip("/ ")
        return words if len(words) <= n_chars else words[:n_chars].rsplit(" ", 1)[0] + " ..."

    def line_of(self, span: Span) -> int:
        """The line, counted from 1, in which the first word of a span stands, the prompt's lines included."""
        text = self.text_of(span)
        before = int(self._line_ends[: self.n_prompt + span.start].sum())
        return 1 + before + text[: len(text) - len(text.lstrip())].count("\n")

    @cached_property
    def _line_ends(self) -> NDArray[np.int64]:
        """How many line ends each token holds."""
        return np.array([token.count(b"\n") for token in self.tracer.tokenizer.token_bytes])[self.tokens]

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, for JSON."""
        longest = self.copies.longest_span
        return {
            "n_tokens": self.copies.n_tokens,
            "minimum": self.minimum,
            "share": self.copies.share(self.minimum),
            "longest": self._span_as_dict(longest) if longest else None,
            "spans": [self._span_as_dict(span) for span in self.copies.spans],
        }

    def _span_as_dict(self, span: Span) -> dict[str, Any]:
        place = {name: value for name, value in asdict(self.tracer.places.at(span.position)).items() if value}
        return asdict(span) | {"place": place, "text": self.text_of(span)}


def band_bounds(minimum: int) -> list[int]:
    """Lengths of spans from which each colour is used."""
    return [minimum * 2**n for n in range(len(STYLES) - 1)]


def trace_lines(trace: Trace, n_spans: int = LISTED_SPANS) -> list[str]:
    """The longest spans of at least the minimum with where they stand, if there are any, and the summary."""
    spans = trace.copies.longest(n_spans)
    lines = [f"{'tokens':>6} {'times':>6} {'line':>6}  first stands in"] if spans else []
    for span in spans:
        place, quote = trace.tracer.places.at(span.position), trace.quote(span, QUOTE_CHARS)
        line = f'{span.length:6,} {span.count:6,} {trace.line_of(span):6,}  {place}: "{quote}"'
        lines.append(line.translate(_CONTROLS))
    return [*lines, summary_line(trace)]


def summary_line(trace: Trace) -> str:
    """The share of the tokens that are copied, and the longest span, in one sentence."""
    copies = trace.copies
    share = 100 * copies.share(trace.minimum)
    shown = f"{share:.{0 if share >= 10 or not share else 1}f}"
    if shown in ("0.0", "100") and share < 100:  # not none, and not all
        shown = "less than 0.1" if share < 1 else f"{min(share, 99.9):.1f}"
    summary = (
        f"{shown} % of {copies.n_tokens:,} tokens stand verbatim in the"
        f" training text in spans of at least {trace.minimum:,} tokens"
    )
    if longest := copies.longest_span:
        summary += f"; longest {longest.length:,}, from {trace.tracer.places.at(longest.position)}"
    return summary


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Called where the error is handled, which goes on: a reader who has left is no failure, as `cli` has it."""
        raise


def standard_output() -> Console:
    """Where results go; it has colours on a terminal, unless NO_COLOR is set."""
    return _Console(file=sys.stdout, highlight=False)


def _in_order(tokens: TokenArray) -> Iterator[int]:
    for begin in range(0, len(tokens), BLOCK_TOKENS):
        yield from tokens[begin : begin + BLOCK_TOKENS].tolist()

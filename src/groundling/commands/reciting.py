"""What the report measures of a model: what it predicts and recites of its training text, and what it writes.

Invariant: a long measurement says soon after its beginning how long it will take.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from groundling.commands.model_options import MAX_SLOTS, OpenRun
from groundling.commands.saying import say
from groundling.commands.tracing import Trace, Tracer, band_bounds, summary_line
from groundling.corpus.goldfish import ObjectiveConfig
from groundling.corpus.shards import Tokens
from groundling.evaluation.extraction import (
    Extractability,
    draw_positions,
    extractability_anywhere,
    n_tokens_to_read,
)
from groundling.evaluation.memorisation import DEFAULT_MINIMUM, Span
from groundling.evaluation.predictions import Predictions, chosen_windows, predict
from groundling.generation.sampling import SamplingConfig
from groundling.generation.text import write
from groundling.training.progress import clock, progress_bar

ESTIMATE_AFTER_S = 4.0
"""Seconds after which an estimate is worth something; what is done by then needs none."""
QUOTE_CHARS = 60
MAX_PROMPTS = 4
"""Of the run's prompts that are continued."""
BEGINNING_TOKENS = 16
"""Of the training text, which are a prompt too."""

BANDS = band_bounds(DEFAULT_MINIMUM)
"""Lengths of spans from which each colour is used, as `groundling trace` does."""


@contextmanager
def estimating(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """A progress bar, to call with what was done, that after the first pieces says how long the rest will take."""
    began = time.monotonic()
    done, said = 0.0, False
    with progress_bar(what, total) as advance:

        def show(more: float) -> None:
            nonlocal done, said
            advance(more)
            done += more
            spent_s = time.monotonic() - began
            if not said and spent_s >= ESTIMATE_AFTER_S:
                said = True
                say(f"{what}: about {clock(spent_s * (total - done) / done)} to go (--quick takes less)")

        yield show


def predictions_of(
    run: OpenRun, tokens: Tokens, objective: ObjectiveConfig, n_windows: int | None
) -> list[Predictions]:
    """What the model predicts on the grid, and on the grid moved by half a window (or half a shorter text)."""
    half = min(run.window, len(tokens) - 1) // 2
    offsets = [0, half] if half else [0]
    total = sum(len(chosen_windows(len(tokens), run.window, offset, n_windows)) for offset in offsets)
    with estimating("reading the text", total) as advance:
        return [
            predict(run.model, tokens, run.window, run.runtime, offset, n_windows, objective, on_windows=advance)
            for offset in offsets
        ]


def recited_anywhere(run: OpenRun, tokens: Tokens, n_positions: int) -> tuple[int, list[Extractability]]:
    """How many places of the text were tried, and what the model recited there."""
    positions = draw_positions(len(tokens), n_positions)
    total = n_tokens_to_read(len(tokens), run.window, len(positions))
    if not len(positions):
        return 0, []
    with run.decoder(MAX_SLOTS) as decoder, estimating("reciting", total) as advance:
        return len(positions), extractability_anywhere(decoder, tokens, positions, advance)


@dataclass
class Piece:
    """Part of a sample, in one colour: -1 for the prompt, 0 for what is not copied."""

    text: str
    band: int
    number: int = 0
    """Of the source in the sample's list, on the last piece of a span; 0 for none."""
    title: str = ""


@dataclass
class Sample:
    """What a model wrote after one prompt."""

    title: str
    prompt: str
    settings: str
    text: str
    trace: Trace | None = None
    pieces: list[Piece] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def for_page(self) -> dict[str, Any]:
        """What the page shows."""
        shown = {"title": self.title, "settings": self.settings, "pieces": self.pieces, "sources": self.sources}
        trace = self.trace
        if self.pieces:
            self.pieces[-1].text = self.pieces[-1].text.rstrip("\n")
        return shown | {"trace": trace, "summary": summary_line(trace) if trace else ""}

    def for_json(self) -> dict[str, Any]:
        """What a program may want."""
        facts = {"title": self.title, "prompt": self.prompt, "settings": self.settings, "text": self.text}
        return facts | ({"trace": self.trace.as_dict()} if self.trace else {})


def samples_of(run: OpenRun, tracer: Tracer | None, settings: Mapping[str, Any]) -> list[Sample]:
    """The run's own prompts continued with the likeliest tokens, and as its settings say; first the text's beginning.

    The beginning of the training text, continued with the likeliest tokens, lies on the grid as no other prompt does.
    """
    prompts = [str(prompt) for prompt in settings.get("prompts") or [""]][:MAX_PROMPTS]
    known = {one.name for one in fields(SamplingConfig)}
    chosen = {name: value for name, value in (settings.get("sampling") or {}).items() if name in known}
    sampling = SamplingConfig(**chosen | {"stop": tuple(chosen.get("stop", ()))})
    greedy = SamplingConfig(max_tokens=sampling.max_tokens, temperature=0)
    configs = [greedy] + ([sampling] if sampling.temperature else [])
    asked = [(_title(prompt), prompt, config) for prompt in prompts for config in configs]
    if tracer is not None:
        first = tracer.array.tokens_at(0, BEGINNING_TOKENS)
        beginning = tracer.tokenizer.decode(tracer.tokenizer.first_document(first))
        beginning = beginning.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that was cut in two
        asked.insert(0, ("The training text's beginning", beginning, configs[0]))
    texts = [""] * len(asked)
    with run.decoder(min(MAX_SLOTS, len(asked))) as decoder:
        for written in write(decoder, run.tokenizer, [(prompt, config) for _, prompt, config in asked]):
            texts[written.which] += written.text
    samples = []
    for (title, prompt, config), text in zip(asked, texts, strict=True):
        sample = Sample(
            title, prompt, config.in_words() + (f", seed {config.seed}" if config.temperature else ""), text
        )
        if tracer is None:
            sample.pieces = [Piece(prompt, -1), Piece(text, 0)]
        else:
            sample.trace = tracer.trace_written(prompt, text)
            sample.pieces, sample.sources = marked(sample.trace)
        samples.append(sample)
    return samples


def _title(prompt: str) -> str:
    """The beginning of a prompt, on one line."""
    words = " ".join(prompt.split())
    return (words if len(words) <= QUOTE_CHARS else f"{words[:QUOTE_CHARS]} ...") or "Without a prompt"


def marked(trace: Trace) -> tuple[list[Piece], list[str]]:
    """The text in pieces, each of one copied span or of none, and the sources of the spans in their order."""
    tokens = trace.tokens.tolist()
    prompt, written, cut = tokens[: trace.n_prompt], tokens[trace.n_prompt :], trace.copies.pieces()
    asked, *texts = trace.tracer.tokenizer.decode_parts([prompt, *(written[part] for part, _ in cut)])
    pieces, sources = [Piece(asked, -1)] if asked else [], list[str]()
    for text, (_, span) in zip(texts, cut, strict=True):
        if span is None:
            pieces.append(Piece(text, 0))
            continue
        sources.append(_source(trace, span))
        band = int(np.searchsorted(BANDS, span.length, side="right"))
        pieces.append(Piece(text, band, len(sources), sources[-1]))
    return pieces, sources


def _source(trace: Trace, span: Span) -> str:
    """Where a span stands, and how it begins."""
    quote = trace.quote(span, QUOTE_CHARS)
    times = "once" if span.count == 1 else f"{span.count:,} times, first"
    return (
        f"{span.length:,} tokens, {times} in {trace.tracer.places.at(span.position)}: \N{LEFT DOUBLE QUOTATION MARK}"
        + (f"{quote}\N{RIGHT DOUBLE QUOTATION MARK}")
    )


def band_labels() -> list[str]:
    """What each colour means, in tokens."""
    return [f"{low} to {high - 1}" for low, high in itertools.pairwise(BANDS)] + [f"{BANDS[-1]} and more"]

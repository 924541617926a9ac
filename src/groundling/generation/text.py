"""From tokens to text as it is written: whole characters, and nothing of a stop string.

Invariant: every piece is valid UTF-8, and no piece ever has to be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.decode import FinishReason, Stats, Stream, decode
from groundling.generation.decoder import Decoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.speculate import Drafter


class Writer:
    """The text of tokens, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # might be the beginning of a stop string

    def take(self, token: int, reason: FinishReason | None) -> tuple[str, FinishReason | None]:
        """What is certain of the text with this token, and why it ends with it, if it does; `reason` is decoding's."""
        text = self._feed(token)
        if reason and not self.stopped:
            text += self._end()
        return text, "stop" if self.stopped else reason

    def _feed(self, token: int) -> str:
        if token == self.tokenizer.end_of_text_id:
            return ""
        return self._add(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def _end(self) -> str:
        """What was still held back."""
        rest = self._add(self._decoder.decode(b"", final=True))
        return rest if self.stopped else rest + self._held

    def _add(self, text: str) -> str:
        text = self._held + text
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop string, if it went on, would begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Piece(NamedTuple):
    """A piece of one of several texts."""

    which: int
    """The prompt that it continues."""
    text: str
    finish_reason: FinishReason | None
    """Why this piece is the last one, or None."""


def write(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[str, SamplingConfig]],
    drafters: Sequence[Drafter | None] | None = None,
    stats: Stats | None = None,
) -> Iterator[Piece]:
    """Pieces of the texts that continue these prompts, each as soon as it is certain.

    An empty prompt starts after `<|endoftext|>`, which also ends a text where the model draws it.
    """
    end = tokenizer.end_of_text_id
    streams = [
        Stream(tokenizer.encode(prompt) or [end], config, drafters[i] if drafters else None, end)
        for i, (prompt, config) in enumerate(requests)
    ]
    places = {id(stream): i for i, stream in enumerate(streams)}
    writers = [Writer(tokenizer, config.stop) for _, config in requests]
    for stream, response in decode(decoder, streams, stats):
        which = places[id(stream)]
        text, reason = writers[which].take(response.token, response.finish_reason)
        if reason:
            stream.finish(reason)
        if text or reason:
            yield Piece(which, text, reason)


def continue_text(decoder: Decoder, tokenizer: Tokenizer, prompt: str, config: SamplingConfig) -> Iterator[str]:
    """Pieces of the text that continues one prompt."""
    for piece in write(decoder, tokenizer, [(prompt, config)]):
        yield piece.text


def repeated(prompts: Iterable[str], config: SamplingConfig, n: int) -> list[tuple[str, SamplingConfig]]:
    """Requests for n samples of each prompt; the i-th of a prompt has seed + i, so it can be had alone."""
    return [(prompt, replace(config, seed=config.seed + i)) for prompt in prompts for i in range(n)]

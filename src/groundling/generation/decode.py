"""Decoding: many texts at a time, a token or a verified draft of each in every pass.

Invariant: what a stream writes depends on its prompt, settings and seed alone: not on the streams that are
decoded with it (exactly so with `NativeDecoder`, within rounding with `TorchDecoder`), nor on its drafter.

Past the decoder's window the context slides: the last half of it is read anew, so that decoding goes on
with at least half a window of context.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundling.generation.decoder import Chunk, Decoder
from groundling.generation.sampling import SamplingConfig, draw, processors
from groundling.generation.speculate import Drafter, DraftLength, verify

MAX_DRAFTED_ROWS = 192
"""Drafted tokens of all streams in one pass: with more, everybody waits long for one whose drafts fail."""

FinishReason = Literal["stop", "length"]
"""stop: the end of the text, or a stop string; length: as many tokens as were asked for (OpenAI's words)."""


class Response(NamedTuple):
    """One generated token."""

    token: int
    from_draft: bool
    finish_reason: FinishReason | None
    """Why this token is the last one, or None."""


@dataclass
class Stats:
    """What decoding took."""

    n_tokens: int = 0
    """Tokens generated."""
    n_turns: int = 0
    """Times that a stream was part of a pass: without drafts, one for each token."""
    n_drafted: int = 0
    n_accepted: int = 0
    n_prompt_tokens: int = 0
    prompt_s: float = 0.0
    """Time of passes that read a prompt."""
    decode_s: float = 0.0
    """Time of the others."""
    n_decoded: int = 0
    """Tokens generated in those."""

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the prompt, or None if nothing was decoded after it."""
        return self.n_decoded / self.decode_s if self.n_decoded else None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were accepted."""
        return self.n_accepted / self.n_drafted if self.n_drafted else None

    @property
    def passes_saved(self) -> float:
        """Share of the passes over the weights that plain decoding of the same tokens would have needed more."""
        return 1 - self.n_turns / self.n_tokens if self.n_tokens else 0.0


class Stream:
    """One text being written: its tokens, its draws, and what must be read next."""

    def __init__(
        self,
        prompt: Sequence[int],
        config: SamplingConfig,
        drafter: Drafter | None = None,
        end_token: int | None = None,
    ) -> None:
        """A prompt has at least one token; `end_token` ends the text where it is drawn."""
        assert len(prompt), "a prompt has at least one token"
        self.tokens = list(prompt)
        self.n_prompt = len(self.tokens)
        self.config, self.drafter, self.end_token = config, drafter, end_token
        self.finish_reason: FinishReason | None = None
        self.slot = -1
        self._generator = torch.Generator().manual_seed(config.seed)
        self._chain = processors(config)
        self._start = 0  # place in `tokens` of the window's first position
        self._draft: list[int] = []
        self._draft_length = DraftLength()

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    def finish(self, reason: FinishReason) -> None:
        """Write nothing after the tokens there are."""
        self.finish_reason = self.finish_reason or reason

    def next_chunk(self, decoder: Decoder, max_draft: int) -> Chunk:
        """What to read before the next token can be drawn: tokens not yet read, and a draft of what follows."""
        n_window, length = decoder.n_window, decoder.length(self.slot)
        n_unread = len(self.tokens) - self._start - length
        if length + n_unread > n_window:  # slide; a prompt that is too long is read from its end
            decoder.rewind(self.slot, 0)
            length, n_unread = 0, min(n_unread, n_window) if length == 0 else max(1, n_window // 2)
            self._start = len(self.tokens) - n_unread
        n_left = self.config.max_tokens - self.n_generated
        room = min(self._draft_length.n_tokens, max_draft, n_window - length - n_unread, n_left - 1)
        self._draft = list(self.drafter(self.tokens, room)[:room]) if self.drafter and room > 0 else []
        return Chunk(self.slot, self.tokens[self._start + length :] + self._draft, 1 + len(self._draft))

    def take(self, logits: Tensor, decoder: Decoder) -> Iterator[Response]:
        """The tokens that these logits of the last chunk give; the decoder is rewound to what holds."""
        drawn = verify(self._draft, logits, self._pick)
        n_accepted = len(drawn) - 1
        self._draft_length.judge(len(self._draft), n_accepted)
        decoder.rewind(self.slot, decoder.length(self.slot) - (len(self._draft) - n_accepted))
        for place, token in enumerate(drawn):
            self.tokens.append(token)
            if token == self.end_token:
                self.finish("stop")
            elif self.n_generated == self.config.max_tokens:
                self.finish("length")
            # An accepted draft may run on past the end: plain decoding would not have drawn the rest.
            yield Response(token, place < n_accepted, self.finish_reason)
            if self.finish_reason:
                return

    def _pick(self, drawn: Sequence[int], logits: Tensor) -> int:
        context = [*self.tokens, *drawn] if self._chain else []
        for process in self._chain:
            logits = process(context, logits)
        return draw(logits, self.config, self._generator)


def decode(
    decoder: Decoder, streams: Iterable[Stream], stats: Stats | None = None
) -> Iterator[tuple[Stream, Response]]:
    """The tokens of all streams as they come; a stream that waits takes a slot as soon as one is free.

    The caller may `finish` a stream at any token of it.
    """
    stats = stats or Stats()
    waiting, live = iter(streams), list[Stream]()
    free = deque(range(decoder.n_slots))
    try:
        while True:
            for stream in itertools.islice(waiting, len(free)):
                stream.slot = free.popleft()
                live.append(stream)
            if not live:
                return
            started = time.perf_counter()
            waited_s = 0.0  # for the caller, between tokens
            fresh = [not decoder.length(stream.slot) for stream in live]
            chunks = [stream.next_chunk(decoder, max(1, MAX_DRAFTED_ROWS // len(live))) for stream in live]
            results = list(zip(live, chunks, decoder.read(chunks), strict=True))
            n_prompt = sum(
                len(chunk.tokens) - chunk.n_outputs + 1 for chunk, new in zip(chunks, fresh, strict=True) if new
            )
            n_tokens = 0
            for stream, chunk, logits in results:
                stats.n_turns += 1
                stats.n_drafted += chunk.n_outputs - 1
                for response in stream.take(logits, decoder):
                    n_tokens += 1
                    stats.n_accepted += response.from_draft
                    paused = time.perf_counter()
                    yield stream, response
                    waited_s += time.perf_counter() - paused
            stats.n_tokens += n_tokens
            seconds = time.perf_counter() - started - waited_s
            stats.n_prompt_tokens += n_prompt
            if n_prompt:
                stats.prompt_s += seconds
            else:
                stats.decode_s += seconds
                stats.n_decoded += n_tokens
            for stream in live:
                if stream.finish_reason:
                    decoder.rewind(stream.slot, 0)
                    free.append(stream.slot)
            live = [stream for stream in live if not stream.finish_reason]
    finally:
        for stream in live:
            decoder.rewind(stream.slot, 0)


def generate(
    decoder: Decoder, prompt: Sequence[int], config: SamplingConfig, drafter: Drafter | None = None
) -> Iterator[int]:
    """Token ids that continue the prompt, as they are drawn."""
    for _, response in decode(decoder, [Stream(prompt, config, drafter)]):
        yield response.token

"""Decoding: many texts at a time, a token or a verified draft of each in every pass.

Invariant: what a stream writes depends on its prompt, settings and seed alone: not on the streams that are
decoded with it (exactly so with `NativeDecoder`, within rounding with `TorchDecoder`), nor on its drafter.

Past the decoder's window the context slides: the last half of it is read anew, so that decoding goes on
with at least half a window of context.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from groundling.generation.decoder import Chunk, Decoder
from groundling.generation.sampling import SamplingConfig, draw, processors, uniform_numbers
from groundling.generation.speculate import Drafter, DraftLength, verify

MAX_DRAFTED_ROWS = 192
"""Drafted tokens of all streams in one pass: with more, everybody waits long for one whose drafts fail."""

FinishReason = Literal["stop", "length"]
"""stop: the end of the text, or a stop string; length: as many tokens as were asked for (OpenAI's words)."""


class Likelihood(NamedTuple):
    """What the model itself, before any sampling setting, thinks of a token."""

    token: int
    logprob: float
    """Nats."""
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest ids in this place and their log-probabilities, the first first."""


class Response(NamedTuple):
    """One generated token."""

    token: int
    from_draft: bool
    finish_reason: FinishReason | None
    """Why this token is the last one, or None."""
    likelihood: Likelihood | None = None
    """If the stream asked for it."""


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
        n_likeliest: int | None = None,
        prompt_likelihoods: bool = False,
    ) -> None:
        """A prompt has at least one token; `end_token` ends the text where it is drawn.

        With `n_likeliest` each response says how likely its token was, and names so many of the likeliest; with
        `prompt_likelihoods` the same is kept for every token of the prompt but the first.
        """
        assert len(prompt), "a prompt has at least one token"
        self.tokens = list(prompt)
        self.n_prompt = len(self.tokens)
        self.config, self.drafter, self.end_token = config, drafter, end_token
        self.n_likeliest = n_likeliest
        self.prompt_likelihoods: list[Likelihood] | None = [] if prompt_likelihoods else None
        self.finish_reason: FinishReason | None = None
        self.slot = -1
        self._numbers = uniform_numbers(config.seed)
        self._chain = processors(config)
        self._start = 0  # place in `tokens` of the window's first position
        self._draft: list[int] = []
        self._wants_prompt = False
        self._draft_length = DraftLength()

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.n_prompt :]

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_drafted(self) -> int:
        """Tokens of the last chunk that are guesses."""
        return len(self._draft)

    def finish(self, reason: FinishReason) -> None:
        """Write nothing after the tokens there are."""
        self.finish_reason = self.finish_reason or reason

    def slide(self, decoder: Decoder) -> int:
        """Slide the window if what is unread does not fit; the tokens to read before the next one can be drawn."""
        n_window, length = decoder.n_window, decoder.length(self.slot)
        n_unread = len(self.tokens) - self._start - length
        if length + n_unread > n_window:  # a prompt that is too long is read from its end
            decoder.rewind(self.slot, 0)
            n_unread = min(n_unread, n_window) if length == 0 else max(1, n_window // 2)
            self._start = len(self.tokens) - n_unread
        return n_unread

    def next_chunk(self, decoder: Decoder, n_unread: int, max_draft: int, max_read: int) -> Chunk:
        """What to read next: at most `max_read` of the unread tokens, and if those are all, a draft of what follows.

        `n_unread` is what `slide` gave.
        """
        n_window, length = decoder.n_window, decoder.length(self.slot)
        first = self._start + length
        self._draft = []
        self._wants_prompt = self.prompt_likelihoods is not None and self.n_generated == 0
        if n_unread > max_read:
            return Chunk(self.slot, self.tokens[first : first + max_read], max_read if self._wants_prompt else 0)
        n_left = self.config.max_tokens - self.n_generated
        room = min(self._draft_length.n_tokens, max_draft, n_window - length - n_unread, n_left - 1)
        if self.drafter and room > 0:
            self._draft = list(self.drafter(self.tokens, room)[:room])
        n_outputs = 1 + len(self._draft) + (n_unread - 1 if self._wants_prompt else 0)
        return Chunk(self.slot, self.tokens[first:] + self._draft, n_outputs)

    def take(self, logits: Tensor, decoder: Decoder) -> Iterator[Response]:
        """The tokens that these logits of the last chunk give, none if it did not end what must be read.

        The decoder is rewound to what holds.
        """
        n_read = self._start + decoder.length(self.slot) - len(self._draft)
        if self._wants_prompt:
            logits = self._keep_prompt_likelihoods(logits, n_read)
        if n_read < len(self.tokens):
            return
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
            likelihood = self._likelihood(token, logits[place]) if self.n_likeliest is not None else None
            yield Response(token, place < n_accepted, self.finish_reason, likelihood)
            if self.finish_reason:
                return

    def _keep_prompt_likelihoods(self, logits: Tensor, n_read: int) -> Tensor:
        """Keep how likely the prompt's tokens were; the rows that are left, after which others are drawn."""
        assert self.prompt_likelihoods is not None
        n_given = len(logits) - 1 - len(self._draft) if n_read == len(self.tokens) else len(logits)
        targets = self.tokens[len(self.prompt_likelihoods) + 1 :]
        self.prompt_likelihoods += [self._likelihood(*pair) for pair in zip(targets, logits[:n_given], strict=False)]
        return logits[n_given:]

    def _pick(self, drawn: Sequence[int], logits: Tensor) -> int:
        context = [*self.tokens, *drawn] if self._chain else []
        if self._chain and not math.isfinite(float(logits.numpy().max())):  # what they keep of it would be anything
            raise FloatingPointError("the largest logit is not finite")
        for process in self._chain:
            logits = process(context, logits)
        return draw(logits, self.config, self._numbers)

    def _likelihood(self, token: int, logits: Tensor) -> Likelihood:
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(self.n_likeliest or 0, len(logprobs)))
        return Likelihood(
            token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        )


class Batch:
    """Streams that are decoded together; others may join and leave between passes.

    With `max_prompt_rows`, no more tokens of prompts than that are read in one pass, so that a long prompt does not
    hold up the streams that are already being written. With `on_error`, a stream whose tokens cannot be drawn leaves,
    and the others go on; without, its error ends the pass.
    """

    def __init__(
        self,
        decoder: Decoder,
        stats: Stats | None = None,
        max_prompt_rows: int | None = None,
        on_error: Callable[[Stream, Exception], None] | None = None,
    ) -> None:
        assert max_prompt_rows is None or max_prompt_rows > 0
        self.decoder, self.stats, self.max_prompt_rows = decoder, stats or Stats(), max_prompt_rows
        self.on_error = on_error
        self.live: list[Stream] = []
        self._free = deque(range(decoder.n_slots))

    @property
    def n_free(self) -> int:
        """Streams that may join."""
        return len(self._free)

    def join(self, stream: Stream) -> None:
        """Take part in the passes from the next one on."""
        stream.slot = self._free.popleft()
        self.live.append(stream)

    def leave(self, stream: Stream) -> None:
        """Take part no more, finished or not."""
        self.live.remove(stream)
        self.decoder.rewind(stream.slot, 0)
        self._free.append(stream.slot)

    def step(self) -> Iterator[tuple[Stream, Response]]:
        """One pass; the tokens that it gives, as they are drawn. Finished streams have left after it.

        The caller may `finish` a stream at any token of it.
        """
        started = time.perf_counter()
        waited_s = 0.0  # for the caller, between tokens
        reading = self._chunks()
        logits = self.decoder.read([chunk for _, chunk in reading]) if reading else []
        n_tokens = n_prompt = 0
        for stream, chunk in reading:
            if not stream.n_generated:
                n_prompt += len(chunk.tokens) - stream.n_drafted
        for (stream, _), rows in zip(reading, logits, strict=True):
            n_before = n_tokens
            self.stats.n_drafted += stream.n_drafted
            for response in self._drawn(stream, rows):
                n_tokens += 1
                self.stats.n_accepted += response.from_draft
                paused = time.perf_counter()
                yield stream, response
                waited_s += time.perf_counter() - paused
            self.stats.n_turns += n_tokens > n_before
        self.stats.n_tokens += n_tokens
        seconds = time.perf_counter() - started - waited_s
        self.stats.n_prompt_tokens += n_prompt
        if n_prompt:
            self.stats.prompt_s += seconds
        else:
            self.stats.decode_s += seconds
            self.stats.n_decoded += n_tokens
        for stream in [stream for stream in self.live if stream.finish_reason]:
            self.leave(stream)

    def _drawn(self, stream: Stream, rows: Tensor) -> Iterator[Response]:
        """What the stream draws; if it cannot, it leaves."""
        try:
            yield from stream.take(rows, self.decoder)
        except Exception as error:
            self._give_up(stream, error)

    def _give_up(self, stream: Stream, error: Exception) -> None:
        if self.on_error is None:
            raise error
        self.leave(stream)
        self.on_error(stream, error)

    def _chunks(self) -> list[tuple[Stream, Chunk]]:
        """What each stream reads in the next pass."""
        max_draft = max(1, MAX_DRAFTED_ROWS // len(self.live))
        unread = [(stream, stream.slide(self.decoder)) for stream in self.live]
        shares = _shares([n_unread for _, n_unread in unread], self.max_prompt_rows)
        chunks = []
        for (stream, n_unread), n_read in zip(unread, shares, strict=True):
            try:
                if n_read:
                    chunks.append((stream, stream.next_chunk(self.decoder, n_unread, max_draft, n_read)))
            except Exception as error:  # a drafter's
                self._give_up(stream, error)
        return chunks

    def close(self) -> None:
        """Let every stream leave."""
        for stream in list(self.live):
            self.leave(stream)


def _shares(n_unread: Sequence[int], max_rows: int | None) -> list[int]:
    """How much of what each stream has to read it may read in a pass, if those that read prompts share so many rows.

    All get as much, and what the shortest prompts leave goes to the longer ones, so that nobody waits for their end.
    """
    if max_rows is None:
        return list(n_unread)
    shares = list(n_unread)
    readers = sorted((place for place, n in enumerate(n_unread) if n > 1), key=lambda place: n_unread[place])
    for n_before, place in enumerate(readers):
        shares[place] = min(n_unread[place], max_rows and max(1, max_rows // (len(readers) - n_before)))
        max_rows -= shares[place]
    return shares


def decode(
    decoder: Decoder, streams: Iterable[Stream], stats: Stats | None = None
) -> Iterator[tuple[Stream, Response]]:
    """The tokens of all streams as they come; a stream that waits takes a slot as soon as one is free.

    The caller may `finish` a stream at any token of it.
    """
    batch = Batch(decoder, stats)
    waiting = iter(streams)
    try:
        while True:
            for stream in itertools.islice(waiting, batch.n_free):
                batch.join(stream)
            if not batch.live:
                return
            yield from batch.step()
    finally:
        batch.close()


def generate(
    decoder: Decoder, prompt: Sequence[int], config: SamplingConfig, drafter: Drafter | None = None
) -> Iterator[int]:
    """Token ids that continue the prompt, as they are drawn."""
    for _, response in decode(decoder, [Stream(prompt, config, drafter)]):
        yield response.token

"""Decoding: prefill, then one token at a time over a cache.

Invariant: cached logits equal those of a fresh pass over the same window. Past `n_ctx` the window
slides: the last half of it is read anew, so that decoding goes on with at least n_ctx / 2 of context.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.sampling import SamplingConfig, draw, processors
from groundling.model.cache import KVCache
from groundling.model.gpt2 import GPT2


class Context:
    """Tokens read so far, and the logits that follow them."""

    def __init__(self, model: GPT2, tokens: Sequence[int], n_window: int | None = None) -> None:
        """Reads the prompt (at least one token), in windows of at most `n_window` (default and limit: n_ctx)."""
        weight = model.head_weight
        self.model = model
        self.tokens = list(tokens)
        self.n_window = min(n_window or model.config.n_ctx, model.config.n_ctx)
        self.cache = KVCache(model.config, 1, self.n_window, weight.device, weight.dtype)
        self.logits = self._read(self.tokens[-self.n_window :])  # prefill

    def append(self, token: int) -> Tensor:
        """The logits (n_vocab,) that follow once this token has been read."""
        self.tokens.append(token)
        if self.cache.length < self.n_window:
            self.logits = self._read([token])
        else:
            self.cache.clear()
            self.logits = self._read(self.tokens[-max(1, self.n_window // 2) :])
        return self.logits

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> Tensor:
        row = torch.tensor([tokens], device=self.model.head_weight.device)  # (1, T)
        hidden = self.model.hidden(row, self.cache)
        return self.model.logits(hidden[0, -1]).float()


def generate(model: GPT2, prompt: Sequence[int], config: SamplingConfig, n_window: int | None = None) -> Iterator[int]:
    """Token ids that continue the prompt, one by one as they are drawn.

    `n_window` bounds the positions used: a model trained on windows of T knows no position past T.
    """
    generator = torch.Generator().manual_seed(config.seed)
    chain = processors(config)
    context = Context(model, prompt, n_window)
    for n_drawn in range(1, config.max_tokens + 1):
        logits = context.logits
        for process in chain:
            logits = process(context.tokens, logits)
        token = draw(logits, config, generator)
        yield token
        if n_drawn < config.max_tokens:
            context.append(token)


def continue_text(
    model: GPT2, tokenizer: Tokenizer, prompt: str, config: SamplingConfig, n_window: int | None = None
) -> Iterator[str]:
    """Pieces of text that continue the prompt, each valid UTF-8, as soon as their bytes are complete.

    An empty prompt starts after `<|endoftext|>`, which also ends the text where the model draws it.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    return as_text(generate(model, tokens, config, n_window), tokenizer)


def as_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of tokens up to `<|endoftext|>`, in pieces of whole characters as soon as their bytes are there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == tokenizer.end_of_text_id:
            break
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest

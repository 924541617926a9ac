"""What reads tokens and says what may follow: the contract of decoding, and its plain PyTorch form.

Invariant: the logits of a token are those of a fresh pass over its sequence's window, whatever was read
with it, before it in pieces, or rewound after it.

A decoder holds a few sequences in numbered slots. Everything is one verb, `read`: a prompt is many tokens
of one sequence of which the last row of logits is wanted, a step of a batch is one token of each of many, a
verification of drafted tokens is several tokens with all their logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from groundling.model.cache import KVCache
from groundling.model.gpt2 import GPT2


class Chunk(NamedTuple):
    """New tokens of one sequence."""

    slot: int
    tokens: Sequence[int]
    n_outputs: int = 1
    """Rows of logits wanted: those that follow the last n_outputs tokens."""


class Decoder(Protocol):
    """A network that reads up to `n_window` positions of each of `n_slots` sequences."""

    n_window: int
    n_slots: int

    def length(self, slot: int) -> int:
        """Positions that the sequence holds."""

    def rewind(self, slot: int, length: int) -> None:
        """Forget all but the sequence's first `length` positions; 0 frees the slot."""

    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Read each chunk after what its sequence holds; fp32 logits (n_outputs, n_vocab) for each, on the CPU.

        A slot may be named once. The tensors are valid until the next `read`. Raises `IndexError` for a token that the
        network does not have, and has read nothing then.
        """

    def close(self) -> None:
        """Give back memory and threads."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def check_tokens(chunks: Sequence[Chunk], n_vocab: int) -> None:
    """Raises `IndexError` for a token that is not one of n_vocab."""
    for token in itertools.chain.from_iterable(chunk.tokens for chunk in chunks):
        if not 0 <= token < n_vocab:
            raise IndexError(f"token {token} is not one of {n_vocab}")


class TorchDecoder:
    """A decoder on any device that PyTorch has."""

    def __init__(self, model: GPT2, n_window: int, n_slots: int = 1) -> None:
        weight = model.head_weight
        self.model, self.n_window, self.n_slots = model, min(n_window, model.config.n_ctx), n_slots
        self.cache = KVCache(model.config, n_slots, self.n_window, weight.device, weight.dtype)

    def length(self, slot: int) -> int:
        return self.cache.lengths[slot]

    def rewind(self, slot: int, length: int) -> None:
        assert length <= self.cache.lengths[slot]
        self.cache.lengths[slot] = length

    @torch.inference_mode()
    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        check_tokens(chunks, self.model.config.n_vocab)
        counts = [len(chunk.tokens) for chunk in chunks]
        rows = torch.zeros(len(chunks), max(counts), dtype=torch.long)
        for row, chunk in zip(rows, chunks, strict=True):
            row[: len(chunk.tokens)] = torch.tensor(chunk.tokens)
        reading = self.cache.reading([chunk.slot for chunk in chunks], counts)
        hidden = self.model.hidden(rows.to(self.cache.keys.device), reading)  # (B, T, C)
        wanted = [row[n - chunk.n_outputs : n] for row, n, chunk in zip(hidden, counts, chunks, strict=True)]
        logits = self.model.logits(torch.cat(wanted)).float().cpu()
        return list(torch.split(logits, [chunk.n_outputs for chunk in chunks]))

    def close(self) -> None:
        """Nothing to do: the cache goes with this object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

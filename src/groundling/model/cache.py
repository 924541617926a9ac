"""Keys and values of the positions already read, so that decoding reads each position once.

Invariant: buffers are allocated once, at full length, with a slot for each of several sequences; each
sequence has a length of its own, and a row never sees a position that its sequence has not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundling.model.gpt2 import GPTConfig


class KVCache:
    """Room for `capacity` positions of `n_slots` sequences, in every layer."""

    def __init__(self, config: GPTConfig, n_slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        # One position more than asked for: the filling of shorter rows is written there, and never seen.
        shape = (config.n_layer, n_slots, config.n_head, capacity + 1, config.n_embd // config.n_head)
        self.keys, self.values = torch.zeros(2, *shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = [0] * n_slots

    def reading(self, slots: Sequence[int], n_tokens: Sequence[int]) -> Reading:
        """A place for the next n_tokens[i] tokens of sequence slots[i], in one pass of rows filled to one length.

        The sequences count as that much longer from now on. A slot may be named once.
        """
        starts = [self.lengths[slot] for slot in slots]
        for slot, start, n in zip(slots, starts, n_tokens, strict=True):
            assert start + n <= self.capacity, f"cache of {self.capacity} positions asked to hold {start + n}"
            self.lengths[slot] = start + n
        return Reading(self, slots, starts, n_tokens)


class Reading:
    """One pass over new tokens: where they stand, and what each of them sees."""

    def __init__(self, cache: KVCache, slots: Sequence[int], starts: Sequence[int], n_tokens: Sequence[int]) -> None:
        device = cache.keys.device
        begins, counts = torch.tensor([starts, n_tokens], device=device)[:, :, None]  # (B, 1) each
        positions = begins + torch.arange(max(n_tokens), device=device)  # (B, T)
        self.positions = positions.clamp(max=cache.capacity - 1)
        """Place (B, T) of each token in its sequence; that of a filling is any."""
        self.layers = [LayerReading(self, keys, values) for keys, values in zip(cache.keys, cache.values, strict=True)]
        self.slots = torch.tensor(slots, device=device)
        self.written = positions.where(positions < begins + counts, cache.capacity)
        """Place (B, T) in the cache at which each token is kept; fillings at its last, which nobody sees."""
        self.n_seen = max(start + n for start, n in zip(starts, n_tokens, strict=True))
        """Positions of the longest sequence after this pass."""
        self.visible: Tensor | None = None
        """Which positions (B, 1, T, S) each token sees; None for a single row, which needs no mask."""
        if len(slots) > 1:
            self.visible = torch.arange(self.n_seen, device=device) <= positions[:, None, :, None]


class LayerReading:
    """One layer's keys and values (n_slots, H, capacity + 1, D), and the pass that adds to them."""

    def __init__(self, reading: Reading, keys: Tensor, values: Tensor) -> None:
        self.reading, self.keys, self.values = reading, keys, values

    @property
    def visible(self) -> Tensor | None:
        return self.reading.visible

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far (B, H, S, D), the given (B, H, T, D) among them."""
        reading = self.reading
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[reading.slots[:, None], :, reading.written] = new.transpose(1, 2)
        seen = (reading.slots, slice(None), slice(reading.n_seen))
        return self.keys[seen], self.values[seen]

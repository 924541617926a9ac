"""Keys and values of the positions already read, so that decoding reads each position once.

Invariant: buffers are allocated once, at full length; `append` writes in place and returns views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundling.model.gpt2 import GPTConfig


class LayerCache:
    """One layer's keys and values (B, H, capacity, D)."""

    def __init__(self, owner: KVCache, keys: Tensor, values: Tensor) -> None:
        self.owner, self.keys, self.values = owner, keys, values

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far (B, H, S, D), the given (B, H, T, D) last."""
        start, end = self.owner.length, self.owner.length + key.size(2)
        assert end <= self.owner.capacity, f"cache of {self.owner.capacity} positions asked to hold {end}"
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Room for `capacity` positions of `batch_size` sequences, in every layer."""

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        keys, values = torch.empty(2, *shape, device=device, dtype=dtype)
        self.layers = [LayerCache(self, k, v) for k, v in zip(keys, values, strict=True)]
        self.capacity = capacity
        self.length = 0

    def advance(self, n_positions: int) -> None:
        """Count positions as held, once every layer has appended them."""
        self.length += n_positions

    def clear(self) -> None:
        """Forget every position; the buffers stay."""
        self.length = 0

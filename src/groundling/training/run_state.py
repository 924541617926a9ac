"""What a run keeps of its past, besides weights, moments and the stop rule's counters.

Invariant: every value has a default that is true of runs whose version did not know it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from groundling.training.loss_scale import LossScale


@dataclass
class RunState:
    """What has happened so far, besides weights and moments; kept in the checkpoint."""

    n_steps: int = 0
    tokens_seen: int = 0
    wall_s: float = 0.0
    looks_s: float | None = 0.0
    """Of these, for losses over whole texts, or samples of them, that decide whether the run ends; None of a run that a
    version began which did not count them."""
    n_bad: int = 0
    """Steps in a row, up to now, that were not finite."""
    n_returns: int = 0
    """Times that the run went back to a checkpoint."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """In fp16."""
    peak_memory_bytes: int = 0
    """The largest of all parts of the run that have saved."""
    block_stride: int = 1
    """Steps go through the first of every so many blocks; with more than 1, the others have not joined yet."""
    first_stride: int = 1
    """What it was in the first step: by this blocks were dealt their turns."""
    n_growing: int = 0
    """Steps that did not go through all blocks."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> RunState:
        """What `asdict` gave, or an older version's, which had no loss scale, and all blocks in every step."""
        looks_s = value.get("looks_s", None if value.get("wall_s") else 0.0)
        return cls(**value | {"loss_scale": LossScale(**value.get("loss_scale", {})), "looks_s": looks_s})

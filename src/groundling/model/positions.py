"""What the position table begins with.

Invariant: the network is GPT-2's in either case. Its table is a parameter, trained and saved as ever; only the values
that training begins with differ.
"""

from __future__ import annotations

from typing import Literal

import torch

from groundling.model.gpt2 import GPT2, INIT_STD

InitialPositions = Literal["random", "waves"]

WAVE_STD = 3 * INIT_STD
"""Of the table's values. Between the two that were best of 1, 2, 4 and 8 times `INIT_STD` (docs/design/0011)."""
LONGEST = 10_000
"""Positions in a radian of the slowest wave; the fastest turns by one a position. As in Vaswani et al. 2017."""


def make_waves(model: GPT2) -> None:
    """Replace the position table by sines and cosines, in which equal distances are equal turns.

    Attention to the token before, or to the place where a phrase stood, is then one rotation for all positions,
    where random rows have to be learned one by one.
    """
    table = model.transformer.wpe.weight
    n_ctx, n_embd = table.shape
    n_waves = (n_embd + 1) // 2
    turns = float(LONGEST) ** -(torch.arange(n_waves) / n_waves)  # radians a position
    angles = torch.arange(n_ctx)[:, None] * turns
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :n_embd]
    table.data.copy_(waves * (WAVE_STD * 2**0.5))

"""Ways in which a writer could get a network wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch

from groundling.interop.trained import Trained


@torch.no_grad()
def transposed(trained: Trained) -> Trained:
    """A square matrix the other way round, which no shape betrays."""
    model = copy.deepcopy(trained.model)
    weight = model.transformer.get_parameter("h.0.attn.c_proj.weight")
    weight.copy_(weight.T.clone())
    return replace(trained, model=model)


@torch.no_grad()
def layers_swapped(trained: Trained) -> Trained:
    """Two blocks in each other's place."""
    model = copy.deepcopy(trained.model)
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]
    return replace(trained, model=model)


@torch.no_grad()
def positions_moved(trained: Trained) -> Trained:
    """The position table moved by one row."""
    model = copy.deepcopy(trained.model)
    table = model.transformer.wpe.weight
    table.copy_(table.roll(1, dims=0).clone())
    return replace(trained, model=model)


WRONGS: list[Callable[[Trained], Trained]] = [transposed, layers_swapped, positions_moved]

"""PyTorch's fused AdamW, with the two verbs that a training step asks of an optimizer.

Invariant: gradients are scaled where they are about to be used, so that clipping, and the division that makes a mean
of a sum, cost one pass over them together.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class FusedAdamW(torch.optim.AdamW):
    """AdamW as PyTorch fuses it for the device on which the parameters are."""

    # PyTorch wraps these, and `step`, to keep them out of compiled graphs, and its wrapper imports the compiler, which
    # takes seconds (LOG.md). No graph of ours has them.
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm () of all gradients together, on their device, for which this does not wait."""
        return torch.nn.utils.get_total_norm(self._gradients())

    @torch.no_grad()
    def step(self, closure: None = None, scale: float = 1.0) -> None:  # type: ignore[override]  # takes no closure
        """Update the parameters with their gradients times `scale`, which `.grad` holds afterwards."""
        if scale != 1:
            torch._foreach_mul_(self._gradients(), scale)
        inspect.unwrap(torch.optim.AdamW.step)(self)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

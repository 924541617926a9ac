"""torch.compile, with a way back.

Invariant: a compiler that is there but does not work costs speed and one warning, never the run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from groundling.evaluation.corpus_loss import LossSum


class CompiledLoss:
    """A loss function, compiled at its first call, or as it was if that fails."""

    def __init__(self, loss_sum: LossSum, warn: Callable[[str], None]) -> None:
        self.eager, self.warn = loss_sum, warn
        self.function: LossSum = torch.compile(loss_sum, dynamic=False)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        try:
            return self.function(inputs, targets)
        except TorchDynamoException as error:
            if self.function is self.eager:
                raise
            first_line = str(error).strip().partition("\n")[0]
            self.warn(f"warning: torch.compile failed ({first_line}): going on without it, more slowly")
            self.function = self.eager
            return self.eager(inputs, targets)

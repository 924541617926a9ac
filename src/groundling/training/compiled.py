"""torch.compile, with a way back, and a count of what it does.

Invariant: a compiler that is there but does not work costs speed and one warning, never the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from groundling.evaluation.corpus_loss import LossSum


class CompiledLoss:
    """A loss function, compiled at its first call, or as it was if that fails.

    Compiled once for each of the shapes (B, T) that it is made for, and each time once to be trained and once to be
    evaluated, which needs no gradient; and anew where another part of the network is computed from then on;
    whatever is compiled beyond that counts as a recompilation.
    """

    def __init__(self, loss_sum: LossSum, shapes: Collection[tuple[int, int]], warn: Callable[[str], None]) -> None:
        if torch.are_deterministic_algorithms_enabled():  # this way of asking for them asks the compiler, too
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.eager, self.shapes, self.warn = loss_sum, shapes, warn
        self.function: LossSum = torch.compile(loss_sum, dynamic=False)
        self.n_recompilations = 0
        self._compiled_for = set[tuple[tuple[int, int], bool]]()

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Imported here because it takes seconds, which a run that is not compiled need not wait.
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters
        from torch._functorch import config

        before = counters["frames"]["total"]  # frames that PyTorch has taken apart in this process
        try:
            # The backward pass is compiled here as well, and not when it is first taken, where nobody could go back.
            with config.patch(force_non_lazy_backward_lowering=True):
                return self.function(inputs, targets)
        except TorchDynamoException as error:
            if self.function is self.eager:
                raise
            first_line = str(error).strip().partition("\n")[0]
            self.warn(f"warning: torch.compile failed ({first_line}): going on without it, more slowly")
            self.function = self.eager
            return self.eager(inputs, targets)
        finally:
            self._count(counters["frames"]["total"] - before, (inputs.size(0), inputs.size(1)))

    @property
    def compiled(self) -> bool:
        """Whether it has not fallen back."""
        return self.function is not self.eager

    def expect_another_network(self) -> None:
        """From here on another part of the network is computed: each shape is compiled once more."""
        self._compiled_for.clear()

    def _count(self, n_frames: int, shape: tuple[int, int]) -> None:
        case = shape, torch.is_grad_enabled()
        if case in self._compiled_for or shape not in self.shapes:
            self.n_recompilations += n_frames
        self._compiled_for.add(case)

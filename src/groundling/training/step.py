"""One training step: forward and backward over micro-batches, clip, update.

Invariant: the loss and gradient of a step do not depend on how it is cut into micro-batches, up to
rounding; a step whose loss or gradient is not finite leaves weights and moments as they were.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from groundling.corpus.windows import Batch
from groundling.evaluation.corpus_loss import LossSum
from groundling.model.gpt2 import GPT2
from groundling.optim.fused import FusedAdamW
from groundling.runtime import Runtime

CLIP_EPS = 1e-6
"""Added to the norm that a gradient is divided by, as in PyTorch's clip_grad_norm_."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured: mean loss before the update, gradient norm before clipping, synchronised seconds."""

    loss: float
    grad_norm: float
    seconds: float
    update_seconds: float = 0.0
    """Those of the update, which do not grow with the batch."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def training_step(
    model: GPT2,
    loss_sum: LossSum,
    optimizer: FusedAdamW,
    batch: Batch,
    learning_rate: float,
    micro_batch_size: int,
    clip: float,
    runtime: Runtime,
    loss_scale: float = 1.0,
) -> StepResult:
    """Train on a batch with this learning rate; `loss_sum` is the model's own, possibly compiled.

    The loss is the mean over the targets that count. A batch without any has none (nan), and changes nothing.
    `loss_scale` multiplies what is differentiated, and is divided out of the gradients again.
    """
    start = time.perf_counter()
    batch = batch.to(runtime.device)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=runtime.device)
    for inputs, targets in batch.split(micro_batch_size):
        with runtime.autocast():
            loss = loss_sum(inputs, targets)
        scaled = loss if loss_scale == 1 else loss_scale * loss
        scaled.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    # Gradients are of the scaled sum; the optimizer divides and clips them where it reads them.
    share = 1 / batch.n_targets if batch.n_targets else math.nan
    gradient_share = share / loss_scale
    norm_of_sum = optimizer.gradient_norm()  # asked for before the device is waited for, once, by the next line
    loss_value, norm = total.item() * share, norm_of_sum.item() * gradient_share
    update_start = time.perf_counter()
    if math.isfinite(loss_value) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step(scale=gradient_share * min(1.0, clip / (norm + CLIP_EPS)) if clip else gradient_share)
    runtime.synchronize()
    end = time.perf_counter()
    return StepResult(loss_value, norm, end - start, end - update_start)

"""The head and its loss on a CPU: logits, cross-entropy and all gradients in one sweep over chunks of positions.

Invariant: agrees with `reference.linear_cross_entropy` forward and backward within rounding; no more logits than those
of a chunk exist at a time. Under autocast the products are bf16, and gradients of the weight are summed in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from groundling.kernels import products, reference
from groundling.kernels.call import call
from groundling.kernels.weight_copies import weight_copy

CHUNK_BYTES = 128 << 20
"""Logits at a time. Each further chunk adds its product to the weight's gradient, 154 MB for GPT-2, once more."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int = 1) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against the targets; see `reference.py`.

    The gradients are computed with the loss, while the logits are at hand. Raises `ValueError` for shapes that do not
    belong together, and `IndexError` for a target that the weight has no row for.
    """
    if hidden.shape != (len(targets), weight.size(1)):
        shapes = f"hidden states of {tuple(hidden.shape)}, a weight of {tuple(weight.shape)} and {len(targets)} targets"
        raise ValueError(f"{shapes} do not belong together")
    if not len(targets) or product_format(hidden.dtype) not in (torch.float32, torch.bfloat16):
        return reference.linear_cross_entropy(hidden, weight, targets, n_last)
    strange = targets[((targets < 0) | (targets >= len(weight))) & (targets != reference.IGNORED_TARGET)]
    if len(strange):
        raise IndexError(f"target {int(strange[0])} is not one of {len(weight)} tokens")
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, n_last, with_gradient)  # type: ignore[no-untyped-call]
    return loss


def product_format(otherwise: torch.dtype) -> torch.dtype:
    """The number format of products: autocast's, or this one without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else otherwise


class LinearCrossEntropy(torch.autograd.Function):
    """Its forward pass leaves the gradients for its backward pass, which scales them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int, with_gradient: bool
    ) -> Tensor:
        kind = product_format(hidden.dtype)
        with torch.autocast("cpu", enabled=False):
            factor = weight_copy(weight) if kind is torch.bfloat16 else weight
            factors = hidden.to(kind).contiguous(), factor, targets.contiguous()
            if kind is torch.bfloat16 and products.available():
                losses, d_hidden, d_weight = products.head(*factors, n_last, with_gradient)
            else:
                sweep = Sweep(*factors, n_last)
                losses, d_hidden, d_weight = sweep.run(with_gradient), sweep.d_hidden, sweep.d_weight
        if d_hidden is not None:
            ctx.gradients = d_hidden.to(hidden.dtype), d_weight  # type: ignore[attr-defined]
        return losses.sum(dtype=torch.float64).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, Tensor] = ctx.gradients  # type: ignore[attr-defined]
        del ctx.gradients  # type: ignore[attr-defined]  # they are given away
        if float(d_loss) != 1:
            for gradient in gradients:
                gradient.mul_(d_loss)
        return *gradients, None, None, None


class Sweep:
    """Hidden states (N, C) and a weight (n_vocab, C), contiguous and both fp32 or both bf16, and targets (N,)."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int) -> None:
        self.hidden, self.weight, self.targets, self.n_last = hidden, weight, targets, n_last
        assert targets.dtype is torch.int64
        self.bf16 = weight.dtype is torch.bfloat16
        self.d_hidden = torch.empty(0)
        """(N, C), made by a run with gradients."""
        self.d_weight = torch.empty(0)
        """(n_vocab, C), fp32, made likewise."""

    def run(self, with_gradient: bool) -> Tensor:
        """The losses (N,) of the positions."""
        n_rows, n_vocab = len(self.hidden), len(self.weight)
        n_chunks = math.ceil(n_rows * n_vocab * self.weight.element_size() / CHUNK_BYTES)
        size = math.ceil(n_rows / n_chunks)
        buffer = self.weight.new_empty(min(size, n_rows), n_vocab)
        losses = torch.empty(n_rows)
        if with_gradient:
            self.d_hidden = torch.empty_like(self.hidden)
            self.d_weight = torch.empty(self.weight.shape)
        for first in range(0, n_rows, size):
            chunk = slice(first, min(first + size, n_rows))
            logits = torch.mm(self.hidden[chunk], self.weight.T, out=buffer[: chunk.stop - first])
            self._cross_entropy(logits, self.targets[chunk], with_gradient, losses[chunk])
            if with_gradient:  # the logits have become their own gradient
                torch.mm(logits, self.weight, out=self.d_hidden[chunk])
                self._add_to_weight(logits, self.hidden[chunk], first == 0)
        return losses

    def _cross_entropy(self, logits: Tensor, targets: Tensor, with_gradient: bool, losses: Tensor) -> None:
        sizes = logits.shape
        call("head", "cross_entropy", self.bf16, logits, *sizes, targets, math.log(self.n_last), with_gradient, losses)

    def _add_to_weight(self, d_logits: Tensor, hidden: Tensor, first: bool) -> None:
        """d_weight += d_logits.T @ hidden; the first chunk finds no sums there yet."""
        if not self.bf16:
            self.d_weight.addmm_(d_logits.T, hidden, beta=0 if first else 1)
            return
        # PyTorch gives products of bf16 in bf16 only, so they are added in a sweep of their own. With the larger matrix
        # on the right, and lying as it is, oneDNN takes half the time (measured with AMX, 512 rows: 25 ms, not 53).
        sums = torch.mm(hidden.T.contiguous(), d_logits)  # (C, n_vocab)
        call("head", "add_transposed", sums, sums.shape[1], sums.shape[0], first, self.d_weight)

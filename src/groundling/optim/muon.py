"""Muon: matrices move by their momentum made orthogonal, so that no direction of the gradient drowns the others.

Invariant: what is not in a group with "momentum" is updated by AdamW as ever; a checkpoint's moments continue a run bit
for bit.

Of a gradient's moment M = U S V.T the update is U V.T, which five steps of a polynomial in M come near (Newton and
Schulz: most singular values end between 0.7 and 1.2), times 0.2 sqrt(the longer side): elements are then as large as
AdamW's, and one learning rate serves both.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", for the method and the
polynomial's coefficients; Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, for the factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from groundling.kernels import products
from groundling.optim.fused import FusedAdamW
from groundling.optim.native import NativeAdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of X, X X.T X and X X.T X X.T X: they raise small singular values fastest, and need not end at 1."""
ITERATIONS = 5
TOGETHER = {torch.float32: (5,), torch.bfloat16: (2, 2, 1)}
"""How many iterations of a long matrix share one X X.T before it is computed again. In bf16, which rounds the square of
a small singular value to -0.002 at worst, two make little of that, and three may make much (LOG.md, 2026-11-30)."""
LONG = 2
"""A matrix so many times as long as wide is cheaper iterated through X X.T."""
STRIP = 192
"""Rows of a symmetric product that a CPU takes from PyTorch at once. A GPU computes all: launching so many products
would take it longer than the half that is saved."""
RMS = 0.2
"""Root of the mean square of an update's elements, as of AdamW's (Liu et al.)."""
TINY = 1e-7
"""Added to the norm that a moment is divided by: of no gradient comes no update."""


SymmetricProduct = Callable[..., Tensor]
"""`symmetric`, or what takes its place."""


class Muon(FusedAdamW):
    """AdamW, but for groups with "momentum": their matrices are Muon's, each in so many "parts" of its rows, at a
    "share" of the rate. They move once in so many "turns", at as many times that rate."""

    own_products = False
    """Whether symmetric products may be our own kernel's."""

    @torch.no_grad()
    def step(self, closure: None = None, scale: float = 1.0) -> None:  # type: ignore[override]  # takes no closure
        """Update the parameters with their gradients times `scale`; gradients of Muon's matrices are dropped."""
        for group in self.param_groups:
            if "momentum" in group:
                for weight in group["params"]:
                    its_turn = _count_turn(self.state[weight], group)
                    if weight.grad is not None:
                        self._move(weight, group, scale, its_turn)
                        weight.grad = None  # AdamW updates what has one
        super().step(scale=scale)

    def _move(self, weight: Tensor, group: dict[str, Any], scale: float, its_turn: bool) -> None:
        gradient, momentum = weight.grad.mul_(scale), group["momentum"]  # type: ignore[union-attr]
        state = self.state[weight]
        if "moment" not in state:
            state["moment"] = torch.zeros_like(weight)
        moment = state["moment"].lerp_(gradient, 1 - momentum)
        if not its_turn:
            return
        ahead = gradient.lerp_(moment, momentum)  # Nesterov's
        rate = group["lr"] * group["share"] * group["turns"]
        if group["weight_decay"]:
            weight.mul_(1 - rate * group["weight_decay"])
        for rows, part in zip(weight.chunk(group["parts"]), ahead.chunk(group["parts"]), strict=True):
            size = RMS * max(part.shape) ** 0.5
            rows.add_(orthogonal(part, group["product_format"], self.own_products), alpha=-rate * size)


def _count_turn(state: dict[str, Tensor], group: dict[str, Any]) -> bool:
    """Whether a matrix with this state moves in this step, which is counted where blocks take turns."""
    if group["turns"] == 1:
        return True
    step = state["step"] = state.get("step", torch.zeros(())).cpu() + 1  # a checkpoint's comes back on the device
    return bool(int(step) % group["turns"] == group["turn"])


class NativeMuon(Muon, NativeAdamW):
    """The same, with our own AdamW for CPUs, and symmetric products in bf16 where the CPU has them."""

    own_products = True


def orthogonal(matrix: Tensor, product_format: torch.dtype, own_products: bool = False) -> Tensor:
    """The matrix (m, n) with all singular values near 1, in its own format; products are taken in another."""
    ours = own_products and product_format is torch.bfloat16 and products.available()
    product = products.symmetric if ours else symmetric
    X = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    X = (X / (X.norm() + TINY)).to(product_format).contiguous()  # no singular value is above 1
    if X.size(1) >= LONG * X.size(0):
        for n in TOGETHER[product_format]:
            X = _polynomials(product(X, X), n, product) @ X
    else:
        a, b, c = COEFFICIENTS
        for _ in range(ITERATIONS):
            A = product(X, X)
            X = torch.addmm(X, product(A, A, c, A, b), X, beta=a)
    return (X if matrix.size(0) <= matrix.size(1) else X.T).to(matrix.dtype)


def _polynomials(A: Tensor, n_iterations: int, product: SymmetricProduct) -> Tensor:
    """What the iterations multiply X by, together (m, m), of A = X X.T: no product in them is as long as X."""
    a, b, c = COEFFICIENTS
    together = None
    for iteration in range(n_iterations):
        polynomial = product(A, A, c, A, b)
        polynomial.diagonal().add_(a)
        together = polynomial if together is None else product(polynomial, together)
        if iteration < n_iterations - 1:
            A = product(product(polynomial, A), polynomial)
    assert together is not None
    return together


def orthogonal_flops(rows: int, columns: int) -> int:
    """FLOP of the products that `orthogonal` takes of such a matrix in fp32 on a CPU; a GPU's are up to twice that.

    In bf16 by our own kernel all matrices of GPT-2 (124M) together take an eighth more.
    """
    m, n = sorted((rows, columns))
    if n >= LONG * m:
        return _symmetric_flops(m, n) + (4 * ITERATIONS - 3) * _symmetric_flops(m, m) + 2 * m * m * n
    return ITERATIONS * (_symmetric_flops(m, n) + _symmetric_flops(m, m) + 2 * m * m * n)


def _symmetric_flops(m: int, length: int) -> int:
    return sum(2 * (end - start) * end * length for start, end in _strips(m, STRIP))


def _strips(m: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """First and last of the rows that a symmetric product computes at once, up to the diagonal."""
    return ((start, min(start + n_rows, m)) for start in range(0, m, n_rows))


def symmetric(left: Tensor, right: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha left @ right.T + beta plus (m, m), known to be symmetric: what lies right of the diagonal is copied."""
    m = left.size(0)
    out = left.new_empty(m, m)
    for start, end in _strips(m, STRIP if left.device.type == "cpu" else m):
        strip = out[start:end, :end]
        added = strip if plus is None else plus[start:end, :end]
        torch.addmm(added, left[start:end], right[:end].T, beta=beta, alpha=alpha, out=strip)
        out[:start, start:end] = strip[:, :start].T
    return out

"""The operations on a CPU: products by PyTorch, and what lies between them in C++ (`blocks.cpp`), a sweep each.

Attention in fp32 is our own as a whole (`attention_fp32.cpp`). Where the CPU has instructions for bf16, products and
attention in that format are taken by `products.py`.

Invariant: agrees with `reference.py` forward and backward within the rounding of the number format, which is fp32, or
bf16 under autocast: then products and what goes into them are bf16; parameters, their gradients, the residual stream,
statistics and sums are fp32. Tensors are on the CPU, parameters and the residual stream fp32.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundling import runtime
from groundling.kernels import products, reference
from groundling.kernels.build import library
from groundling.kernels.call import call
from groundling.kernels.head import linear_cross_entropy, product_format
from groundling.kernels.reference import causal_attention
from groundling.kernels.weight_copies import weight_copy

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "load",
    "self_attention",
    "tied_embedding",
]


def load(with_bf16: bool) -> None:
    """Compile what is not compiled yet, side by side, and what only bf16 needs if that is asked for.

    Raises `BuildError` if that cannot be done here, but not for bf16's, without which it is PyTorch's.
    """
    with ThreadPoolExecutor(runtime.available_cores()) as pool:
        needed = [pool.submit(library, name) for name in ("adamw", "attention_fp32", "blocks", "head")]
        for name in products.libraries() if with_bf16 else ():
            pool.submit(library, name)
    for each in needed:
        each.result()
    if with_bf16:
        products.available()


def tied_embedding(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the weight, and the weight for its other use; see `reference.py`."""
    return TiedEmbedding.apply(tokens, weight)  # type: ignore[no-untyped-call, no-any-return]


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`x + update`, and its LayerNorm; see `reference.py`."""
    return AddLayerNorm.apply(x, update.expand_as(x), weight, bias)  # type: ignore[no-untyped-call, no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`; see `reference.py`."""
    return Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `linear`; see `reference.py`."""
    return LinearGelu.apply(x, weight, bias, torch.is_grad_enabled())  # type: ignore[no-untyped-call, no-any-return]


def self_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention of whole windows to themselves; see `reference.py`."""
    if qkv.size(2) % (3 * n_head):
        raise ValueError(f"{qkv.size(2)} columns are not queries, keys and values of {n_head} equal heads")
    if not qkv.numel() or (_bf16(qkv) and not products.available()):
        return reference.self_attention(qkv, n_head)
    return SelfAttention.apply(qkv, n_head)  # type: ignore[no-untyped-call, no-any-return]


class TiedEmbedding(torch.autograd.Function):
    """Adds the rows' gradients to the head's where it lies; PyTorch would make, fill and add a matrix for them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor | None, d_weight: Tensor | None) -> tuple[None, Tensor | None]:
        (tokens,) = ctx.saved_tensors
        if d_rows is None:
            return None, d_weight
        if d_weight is None:
            d_weight = d_rows.new_zeros(ctx.shape)
        return None, d_weight.contiguous().index_add_(0, tokens.flatten(), d_rows.reshape(tokens.numel(), ctx.shape[1]))


class AddLayerNorm(torch.autograd.Function):
    """Keeps each row's mean and scale, and adds both gradients of the residual stream in one sweep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x, update, weight, bias = x.contiguous(), update.contiguous(), weight.contiguous(), bias.contiguous()
        assert x.dtype is weight.dtype is bias.dtype is torch.float32
        assert weight.shape == bias.shape == x.shape[-1:]
        sums = torch.empty_like(x)
        normed = torch.empty_like(x, dtype=product_format(torch.float32))
        statistics = torch.empty(x.numel() // len(weight), 2)
        _sweep(
            "add_layer_norm", *_rows(x), x, _bf16(update), update, weight, bias, sums, _bf16(normed), normed, statistics
        )
        ctx.save_for_backward(sums, statistics, weight)
        ctx.update_format = update.dtype
        ctx.set_materialize_grads(False)
        return sums, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, statistics, weight = ctx.saved_tensors
        if d_normed is None:
            return d_sums, None if d_sums is None else d_sums.to(ctx.update_format), None, None
        d_normed = d_normed.contiguous()
        d_sums = None if d_sums is None else d_sums.contiguous()
        d_x = torch.empty_like(sums)
        d_update = d_x if ctx.update_format is d_x.dtype else torch.empty_like(d_x, dtype=ctx.update_format)
        d_parameters = torch.empty(2, len(weight))
        _sweep(
            "add_layer_norm_backward",
            *_rows(sums),
            sums,
            statistics,
            weight,
            d_sums,
            _bf16(d_normed),
            d_normed,
            d_x,
            _bf16(d_update),
            None if d_update is d_x else d_update,
            d_parameters,
        )
        return d_x, d_update, *d_parameters


class Linear(torch.autograd.Function):
    """Three products, and a sweep for the gradient of the bias, if `products.py` does not give it with the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, matrix = _factors(x, weight)
        ctx.save_for_backward(rows, matrix)
        ctx.x_format = x.dtype
        return _product(rows, matrix, bias).view(*x.shape[:-1], len(matrix))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        d_rows = d.reshape(d.numel() // len(matrix), len(matrix)).contiguous()
        d_x = _input_gradient(d_rows, matrix).to(ctx.x_format).view(*d.shape[:-1], matrix.size(1))
        if _bf16(d_rows) and products.available():
            return d_x, *products.weight_gradient(d_rows, rows.contiguous())
        d_bias = rows.new_empty(len(matrix), dtype=torch.float32)
        _sweep("sum_rows", *_rows(d_rows), _bf16(d_rows), d_rows, d_bias)
        return d_x, d_rows.T.mm(rows).float(), d_bias


class LinearGelu(torch.autograd.Function):
    """Keeps GELU's slopes, which cost little beside its values, in the place of the products that it was taken of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, with_slopes: bool) -> Tensor:
        rows, matrix, bias = *_factors(x, weight), bias.contiguous()
        assert bias.dtype is torch.float32
        assert len(bias) == len(matrix)
        sums = _product(rows, matrix, None)
        activated = torch.empty_like(sums)
        _sweep("bias_gelu", *_rows(sums), _bf16(sums), sums, bias, activated, with_slopes)
        ctx.save_for_backward(rows, matrix)
        ctx.x_format, ctx.slopes = x.dtype, sums
        return activated.view(*x.shape[:-1], len(matrix))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        d_rows = ctx.slopes
        del ctx.slopes  # overwritten here, so a second backward pass must fail
        d_bias = rows.new_empty(len(matrix), dtype=torch.float32)
        _sweep("bias_gelu_backward", *_rows(d_rows), _bf16(d_rows), d_rows, d.contiguous(), d_bias)
        d_x = _input_gradient(d_rows, matrix).to(ctx.x_format).view(*d.shape[:-1], matrix.size(1))
        if _bf16(d_rows) and products.available():
            return d_x, products.weight_gradient(d_rows, rows.contiguous(), with_bias=False)[0], d_bias, None
        return d_x, d_rows.T.mm(rows).float(), d_bias, None


class SelfAttention(torch.autograd.Function):
    """Keeps the logarithms of the softmax's denominators, and makes probabilities again."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        qkv = qkv.contiguous()
        if _bf16(qkv):
            mixed, log_sums = products.attention(qkv, n_head)
        else:
            B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
            mixed, log_sums = qkv.new_empty(B, T, C), qkv.new_empty(B, n_head, T)
            call("attention_fp32", "attention_fp32", B, T, n_head, C // n_head, qkv, mixed, log_sums)
        ctx.save_for_backward(qkv, log_sums)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        qkv, log_sums = ctx.saved_tensors
        d = d.contiguous()
        if _bf16(qkv):
            return products.attention_backward(qkv, log_sums, d), None
        (B, T, C), n_head, d_qkv = d.shape, log_sums.size(1), torch.empty_like(qkv)
        shape = B, T, n_head, C // n_head
        call("attention_fp32", "attention_fp32_backward", *shape, qkv, log_sums, d, d_qkv)
        return d_qkv, None


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`rows @ matrix.T`, and the bias in each row."""
    if _bf16(rows) and products.available():
        fitting = None if bias is None else bias.expand(len(matrix)).contiguous()
        return products.linear(rows.contiguous(), matrix.contiguous(), fitting)
    return rows.mm(matrix.T) if bias is None else torch.addmm(bias.to(rows.dtype), rows, matrix.T)


def _input_gradient(d_rows: Tensor, matrix: Tensor) -> Tensor:
    """The gradient of rows, from that (N, n_out) of their product with a weight (n_out, n_in)."""
    if _bf16(d_rows) and products.available():
        return products.input_gradient(d_rows, matrix)
    return d_rows.mm(matrix)


def _factors(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x and the weight, as a product takes them. Raises `ValueError` for shapes that do not belong together."""
    if weight.shape[1:] != x.shape[-1:]:
        raise ValueError(f"rows of {x.size(-1)} and a weight of {tuple(weight.shape)} do not belong together")
    rows = x.reshape(x.numel() // x.size(-1), x.size(-1))
    if product_format(torch.float32) is torch.float32:
        return rows, weight
    return rows.to(torch.bfloat16), weight_copy(weight)


def _rows(matrix: Tensor) -> tuple[int, int]:
    """Rows, and their width, of a tensor (..., width)."""
    width = matrix.size(-1)
    return matrix.numel() // width, width


def _bf16(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16


def _sweep(name: str, *arguments: Tensor | int | None) -> None:
    """Calls `groundling_NAME` of blocks.cpp."""
    call("blocks", name, *arguments)

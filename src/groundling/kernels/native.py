"""The operations on a CPU: products by PyTorch, and what lies between them in C++ (`blocks.cpp`), a sweep each.

Where there is a matrix unit, some products and all of attention are taken by `products.py`.

Invariant: agrees with `reference.py` forward and backward within the rounding of the number format, which is fp32, or
bf16 under autocast: then products and what goes into them are bf16; parameters, their gradients, the residual stream,
statistics and sums are fp32. Tensors are on the CPU, parameters and the residual stream fp32.
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundling import runtime
from groundling.kernels import products, reference
from groundling.kernels.build import library
from groundling.kernels.head import linear_cross_entropy
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

TILE_QUERIES = 128
"""Queries whose scores are made again together: the keys after the last of them are left out."""
TILE_SCORES = 1 << 20
"""Scores made again together, so that they stay in the caches from one product through the sweep to the next."""
TILED_FP32 = 256
"""Shortest windows in fp32 for which tiles are faster than PyTorch's own backward pass (LOG.md, "Blocks")."""


def load() -> None:
    """Compile what is not compiled yet, side by side. Raises `BuildError` if that cannot be done here."""
    with ThreadPoolExecutor(runtime.available_cores()) as pool:
        needed = [pool.submit(library, name) for name in ("adamw", "blocks", "head")]
        for name in products.libraries():
            pool.submit(library, name)
    for each in needed:
        each.result()
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
    tiled = products.available() if _bf16(qkv) else qkv.size(1) >= TILED_FP32
    if not tiled or not qkv.numel():
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
        sums = torch.empty_like(x)
        normed = torch.empty_like(x, dtype=_product_format())
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
    """Three products, and a sweep for the gradient of the bias, if no matrix unit gives it with the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows, matrix = _factors(x, weight)
        ctx.save_for_backward(rows, matrix)
        ctx.x_format = x.dtype
        return torch.addmm(bias.to(rows.dtype), rows, matrix.T).view(*x.shape[:-1], len(matrix))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        d_rows = d.reshape(d.numel() // len(matrix), len(matrix)).contiguous()
        d_x = d_rows.mm(matrix).to(ctx.x_format).view(*d.shape[:-1], matrix.size(1))
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
        sums = torch.mm(rows, matrix.T)
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
        d_x = d_rows.mm(matrix).to(ctx.x_format).view(*d.shape[:-1], matrix.size(1))
        if _bf16(d_rows) and products.available():
            return d_x, products.weight_gradient(d_rows, rows.contiguous())[0], d_bias, None
        return d_x, d_rows.T.mm(rows).float(), d_bias, None


class SelfAttention(torch.autograd.Function):
    """Without a matrix unit: forward by PyTorch, whose kernel is as fast, and probabilities made again tile by tile."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        qkv = qkv.contiguous()
        if _bf16(qkv):
            mixed, log_sums = products.attention(qkv, n_head)
            ctx.save_for_backward(qkv, log_sums)
            return mixed
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        query, key, value = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # What scaled_dot_product_attention calls on a CPU; it also gives the logarithms of the softmax's denominators.
        mixed, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True)
        ctx.save_for_backward(qkv, log_sums)
        return mixed.transpose(1, 2).reshape(B, T, C)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        qkv, log_sums = ctx.saved_tensors
        if _bf16(qkv):
            return products.attention_backward(qkv, log_sums, d.contiguous()), None
        (B, T, C), n_head = d.shape, log_sums.size(1)
        heads = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, -1)
        d_mixed = d.reshape(B, T, n_head, -1).transpose(1, 2).reshape(B * n_head, T, -1)
        log_sums, d_heads = log_sums.reshape(B * n_head, T), torch.empty_like(heads)
        n_queries = min(T, TILE_QUERIES)
        n_heads = min(B * n_head, max(1, TILE_SCORES // (n_queries * T)))
        tile = heads.new_empty(2, n_heads * n_queries * T)
        for first in range(0, B * n_head, n_heads):
            some = slice(first, first + n_heads)
            for end in range(T, 0, -n_queries):  # the last queries see all keys, whose gradients they begin
                queries = slice(max(0, end - n_queries), end)
                _attention_backward(heads[:, some], d_heads[:, some], d_mixed[some], log_sums[some], queries, tile)
        return d_heads.view(3, B, n_head, T, -1).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * C), None


def _attention_backward(
    heads: Tensor, d_heads: Tensor, d_mixed: Tensor, log_sums: Tensor, queries: slice, tile: Tensor
) -> None:
    """What the gradient of these queries' outputs, of d_mixed (N, T, D), adds to d_heads (3, N, T, D)."""
    seen = slice(queries.stop)
    query, key, value = (part[:, at].contiguous() for part, at in zip(heads, (queries, seen, seen), strict=True))
    d_query, d_key, d_value = d_heads
    d_mixed = d_mixed[:, queries].contiguous()
    shape = len(query), query.size(1), key.size(1)
    scores, d_scores = tile[:, : math.prod(shape)].view(2, *shape)
    torch.bmm(query, key.mT, out=scores)
    torch.bmm(d_mixed, value.mT, out=d_scores)  # the gradient of the probabilities, so far
    scale = ctypes.c_float(1 / math.sqrt(query.size(2)))
    logarithms = log_sums[:, queries].contiguous()
    _sweep("causal_softmax_backward", *shape, scale, scores, logarithms, d_scores)
    d_query[:, queries] = d_scores.bmm(key)
    for total, gradient in ((d_key, d_scores.mT.bmm(query)), (d_value, scores.mT.bmm(d_mixed))):
        if seen.stop == total.size(1):
            total.copy_(gradient)
        else:
            total[:, seen] += gradient


def _factors(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x and the weight, as a product takes them."""
    rows = x.reshape(x.numel() // x.size(-1), x.size(-1))
    if _product_format() is torch.float32:
        return rows, weight
    return rows.to(torch.bfloat16), weight_copy(weight)


def _product_format() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _rows(matrix: Tensor) -> tuple[int, int]:
    """Rows, and their width, of a tensor (..., width)."""
    width = matrix.size(-1)
    return matrix.numel() // width, width


def _bf16(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16


def _sweep(name: str, *arguments: Tensor | int | ctypes.c_float | None) -> None:
    """Calls `groundling_NAME` of blocks.cpp: tensors are pointers there, flags int and sizes int64_t."""
    function = getattr(library("blocks"), f"groundling_{name}")
    function(ctypes.c_int(torch.get_num_threads()), *map(_as_c, arguments))


def _as_c(argument: Tensor | int | ctypes.c_float | None) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        assert argument.device.type == "cpu"
        assert argument.dtype in (torch.float32, torch.bfloat16)
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_int(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument

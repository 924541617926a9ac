"""Products of bf16 in a CPU's matrix unit (AMX), or by its vectors, and what belongs to them: our own C++.

Invariant: used only where `available()` says so: the CPU has the instructions, the compiler knows them, the system
allows them. All products of forward and backward passes in bf16 are ours then, and Muon's symmetric ones;
docs/design/0009-the-matrix-unit.md says what speaks for it.
"""

from __future__ import annotations

import functools
import logging
import math

import torch
from torch import Tensor

from groundling import machine
from groundling.kernels.build import BuildError, library
from groundling.kernels.call import call

UNITS = {"amx_bf16": 2, "avx512_bf16": 1}
"""Flags of CPUs, the best first, and what `panel_products.h` calls that which multiplies."""
CHUNK_BYTES = 512 << 20
"""Exponentials at a time, in bf16: 5,341 positions of GPT-2's vocabulary. A choice: the 4,096 tokens of a large step
are one chunk, and the peak stays below 6 GiB."""
ROW_ELEMENTS = 64
"""Rows of exponentials are padded to an odd number of cache lines (half of this each): 4 KiB apart, rows would share
the same few sets of a cache."""


def libraries() -> tuple[str, ...]:
    """What this module is compiled from, if the CPU has instructions for it."""
    return ("products", "head_products", "attention") if _unit() else ()


@functools.cache
def available() -> bool:
    """Whether the functions of this module can be called here; says so once if the CPU could and they cannot."""
    if not libraries():
        return False
    why = "the compiler does not know the CPU's fastest instructions for bf16, or the system withholds them"
    try:
        if all(getattr(library(name), f"groundling_unit_of_{name}")() == _unit() for name in libraries()):
            return True
    except BuildError as error:
        why = str(error)
    logging.getLogger(__name__).warning("products stay with PyTorch, which is slower: %s", why)
    return False


def _unit() -> int:
    """The fastest in this CPU that multiplies bf16, by its number in `panel_products.h`; 0 if it has none."""
    flags = machine.cpu_flags()
    return next((number for flag, number in UNITS.items() if flag in flags), 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` (N, n_out) of x (N, n_in) and weight (n_out, n_in), all bf16, and bias (n_out,), fp32."""
    (n_rows, n_in), n_out = x.shape, len(weight)
    y = x.new_empty(n_rows, n_out)
    call("products", "linear", n_rows, n_out, n_in, _bf16(x), _bf16(weight), bias if bias is None else _fp32(bias), y)
    return y


def input_gradient(d_y: Tensor, weight: Tensor) -> Tensor:
    """`d_y @ weight` (N, n_in) from d_y (N, n_out) and weight (n_out, n_in), all bf16."""
    n_rows, (n_out, n_in) = len(d_y), weight.shape
    d_x = d_y.new_empty(n_rows, n_in)
    call("products", "input_gradient", n_rows, n_out, n_in, _bf16(d_y), _bf16(weight), d_x)
    return d_x


def weight_gradient(d_y: Tensor, x: Tensor, with_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """`d_y.T @ x` (n_out, n_in) and the sum of d_y's rows (n_out,), fp32, from d_y (N, n_out) and x (N, n_in), bf16."""
    (n_rows, n_out), n_in = d_y.shape, x.size(1)
    d_weight, d_bias = torch.empty(n_out, n_in), torch.empty(n_out) if with_bias else None
    call("products", "weight_gradient", n_rows, n_out, n_in, _bf16(d_y), _bf16(x), d_weight, d_bias)
    return d_weight, d_bias


def symmetric(left: Tensor, right: Tensor, alpha: float = 1.0, plus: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """`alpha left @ right.T + beta plus` (m, m) of left and right (m, k), where that is symmetric; all bf16."""
    (m, n_terms), out = left.shape, left.new_empty(len(left), len(left))
    added = plus if plus is None else _bf16(plus)
    call("products", "symmetric", m, n_terms, _bf16(left), _bf16(right), float(alpha), added, float(beta), out)
    return out


def head(
    hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,) and the gradients of their sum: over hidden (N, C), bf16 as it is, and over weight (V, C), in fp32.

    The weight is bf16; targets (N,) as in `reference.linear_cross_entropy`, which also says what `n_last` is.
    """
    n_rows, (n_vocab, n_in) = len(hidden), weight.shape
    losses = torch.empty(n_rows)
    d_hidden = torch.empty_like(hidden) if with_gradient else None
    d_weight = torch.empty(n_vocab, n_in) if with_gradient else None
    n_chunks = math.ceil(n_rows * n_vocab * 2 / CHUNK_BYTES)
    size = math.ceil(n_rows / n_chunks)
    stride = math.ceil(size / ROW_ELEMENTS) * ROW_ELEMENTS + ROW_ELEMENTS // 2
    exponentials = weight.new_empty(n_vocab, stride) if with_gradient else None
    assert exponentials is None or exponentials.data_ptr() % 64 == stride % (ROW_ELEMENTS // 2) == 0
    for first in range(0, n_rows, size):
        chunk = slice(first, min(first + size, n_rows))
        call(
            "head_products",
            "head",
            *(chunk.stop - first, n_vocab, n_in),
            *(_bf16(hidden[chunk]), _bf16(weight), _of_format(targets[chunk], torch.int64)),
            *(math.log(n_last), first > 0, exponentials, stride, losses[chunk]),
            *(None if d_hidden is None else d_hidden[chunk], d_weight),
        )
    return losses, d_hidden, d_weight


def attention(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """Causal attention (B, T, C) of queries, keys and values side by side (B, T, 3C), bf16.

    Also the logarithms (B, H, T) of the softmax's denominators, fp32, from which the backward pass begins.
    """
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    mixed, log_sums = qkv.new_empty(B, T, C), torch.empty(B, n_head, T)
    call("attention", "attention", B, T, n_head, C // n_head, _bf16(qkv), mixed, log_sums)
    return mixed, log_sums


def attention_backward(qkv: Tensor, log_sums: Tensor, d_mixed: Tensor) -> Tensor:
    """The gradient of what `attention` was given, from what it returned and the gradient (B, T, C) of its output."""
    (B, T, C), n_head, d_qkv = d_mixed.shape, log_sums.size(1), torch.empty_like(qkv)
    sizes = B, T, n_head, C // n_head
    call("attention", "attention_backward", *sizes, _bf16(qkv), _fp32(log_sums), _bf16(d_mixed), d_qkv)
    return d_qkv


def _bf16(tensor: Tensor) -> Tensor:
    return _of_format(tensor, torch.bfloat16)


def _fp32(tensor: Tensor) -> Tensor:
    return _of_format(tensor, torch.float32)


def _of_format(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    assert tensor.dtype is dtype
    return tensor

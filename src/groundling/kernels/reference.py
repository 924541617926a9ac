"""What each operation means, in plain PyTorch.

Invariant: short enough to be checked by reading; a faster backend is right when it agrees with this one.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100
"""Target that no loss counts (PyTorch's own default): the filling after the end of a short window."""


def tied_embedding(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `weight` (n_vocab, C) at tokens (...), (..., C), and the weight for its other use, as the head's.

    Use `weight` only here and in the head: a backend may add the embedding's gradient in place into the head's.
    """
    return F.embedding(tokens, weight), weight


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`x + update`, and its LayerNorm over the last dimension, scaled by `weight` and shifted by `bias`.

    x (..., C), in fp32 also where products are bf16; update (..., C) or what spreads to it; weight and bias (C,).
    Source: Ba et al. 2016, section 3; epsilon 1e-5 as in GPT-2's released code.
    """
    x = x + update
    return x, F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`: x (..., C), weight (n_out, C), bias (n_out,). Returns (..., n_out)."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `linear`, in its form with tanh. Source: Hendrycks and Gimpel 2016, section 2."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def self_attention(qkv: Tensor, n_head: int) -> Tensor:
    """`causal_attention` of whole windows: queries, keys and values (B, T, 3C) side by side. Returns (B, T, C)."""
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    query, key, value = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    return causal_attention(query, key, value).transpose(1, 2).reshape(B, T, C)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(D), in which a query sees the keys up to its own position.

    query (B, H, T, D); key and value (B, H, S, D) with S >= T: the queries are the last T of the S
    positions, as they are when earlier keys come from a cache. Where the windows of a batch differ in length,
    `visible` (B, 1, T, S) says what each query sees instead. Returns (B, H, T, D).
    Source: Vaswani et al. 2017, section 3.2.1.
    """
    T, S = query.size(2), key.size(2)
    if visible is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    if T == S:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if T == 1:  # one new position sees everything
        return F.scaled_dot_product_attention(query, key, value)
    visible = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int = 1) -> Tensor:
    """Sum over all targets of -log softmax(hidden @ weight.T)[target], in nats, as an fp32 scalar (fp64 of fp64).

    hidden (N, C), weight (n_vocab, C), targets (N,) of ids or `IGNORED_TARGET`. A sum, not a mean, so
    that micro-batches and windows of different lengths add up to the loss of the whole.

    The last row of `weight` stands for `n_last` equal rows: the softmax is over n_vocab - 1 + n_last logits, and a
    target that is the last id means any one of them. The gradient of that row is the sum of theirs.
    """
    logits = _logits(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if n_last == 1:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    # n equal terms of the sum under the logarithm are n exp(z) = exp(z + ln n); one of them as a target is z alone.
    logits[:, -1] += math.log(n_last)
    n_targets_last = (targets == len(weight) - 1).sum(dtype=logits.dtype)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")
    return loss + math.log(n_last) * n_targets_last


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, C) @ weight.T, (N, n_vocab); in parts of the vocabulary where the gradient needs it."""
    n_parts = math.ceil(len(weight) / _longest_sum(hidden.device))
    if n_parts == 1:
        return F.linear(hidden, weight)
    return torch.cat([F.linear(hidden, part) for part in weight.tensor_split(n_parts)], dim=1)


def _longest_sum(device: torch.device) -> int:
    """Terms that a product may sum up for each element; the gradient for `hidden` sums over the vocabulary.

    On M1 and M2, PyTorch 2.13 reads beyond the operands of longer sums (pytorch#183535, pytorch#195012).
    """
    return 32_766 if device.type == "mps" else sys.maxsize

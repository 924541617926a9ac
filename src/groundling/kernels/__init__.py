"""The one seam between the network and the code that computes it.

Invariant: the network calls only the functions named here, and which backend answers is decided once,
by `select`, never at import. `reference.py` defines what each operation means; a faster backend is a
module with the same functions, tested against it forward and backward.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from groundling.errors import ConfigError
from groundling.kernels import native, reference
from groundling.kernels.build import BuildError
from groundling.runtime import Runtime

BACKENDS: dict[str, ModuleType] = {"reference": reference, "native": native}

_backend: ModuleType = reference


def select(name: str, with_bf16: bool = False) -> None:
    """Let the backend of this name answer from now on, prepared for products in bf16 or not.

    Raises `ConfigError` for a name that is not in `BACKENDS`, and `BuildError` if it cannot be compiled here.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"there is no kernel backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "native":
        native.load(with_bf16)
    _backend = BACKENDS[name]


def select_for(runtime: Runtime) -> Runtime:
    """Let the backend that this runtime names answer; where it cannot be compiled, the reference, and say so.

    Returns the runtime as it is then.
    """
    try:
        select(runtime.kernels, runtime.dtype is torch.bfloat16)
    except BuildError as error:
        select("reference")
        return runtime.without_native(str(error))
    return runtime


def tied_embedding(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `weight` at the tokens, and the weight for its other use, as the head's; see `reference.py`."""
    return _backend.tied_embedding(tokens, weight)  # type: ignore[no-any-return]


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`x + update`, and the LayerNorm of that; see `reference.py`."""
    return _backend.add_layer_norm(x, update, weight, bias)  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`; see `reference.py`."""
    return _backend.linear(x, weight, bias)  # type: ignore[no-any-return]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `x @ weight.T + bias`; see `reference.py`."""
    return _backend.linear_gelu(x, weight, bias)  # type: ignore[no-any-return]


def self_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention of whole windows to themselves, heads split and merged; see `reference.py`."""
    return _backend.self_attention(qkv, n_head)  # type: ignore[no-any-return]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention in which a query sees the keys up to its own position; see `reference.py`."""
    return _backend.causal_attention(query, key, value, visible)  # type: ignore[no-any-return]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int = 1) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against the targets; see `reference.py`."""
    return _backend.linear_cross_entropy(hidden, weight, targets, n_last)  # type: ignore[no-any-return]

"""The one seam between the network and the code that computes it.

Invariant: the network calls only the functions named here, and which backend answers is decided once,
by `select`, never at import. `reference.py` defines what each operation means; a faster backend is a
module with the same functions, tested against it forward and backward.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from groundling.errors import ConfigError
from groundling.kernels import reference

BACKENDS: dict[str, ModuleType] = {"reference": reference}

_backend: ModuleType = reference


def select(name: str) -> None:
    """Let the backend of this name answer from now on.

    Raises `ConfigError` for a name that is not in `BACKENDS`.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"there is no kernel backend {name!r}: choose one of {', '.join(BACKENDS)}")
    _backend = BACKENDS[name]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Softmax attention in which a query sees the keys up to its own position; see `reference.py`."""
    return _backend.causal_attention(query, key, value, visible)  # type: ignore[no-any-return]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, n_last: int = 1) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against the targets; see `reference.py`."""
    return _backend.linear_cross_entropy(hidden, weight, targets, n_last)  # type: ignore[no-any-return]

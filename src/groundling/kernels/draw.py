"""Draws from logits on a CPU: `draw.cpp`, and the same in NumPy where that cannot be compiled.

Invariant: which token a share falls on is the same for both, but for shares within rounding of the border between two.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

from groundling.kernels.build import BuildError, library

BLOCK = 256
"""Probabilities summed at once: about the square root of how many there are, so that few sums are left to search."""


def place(logits: Tensor, share: float) -> int:
    """Where the sum of the probabilities passes `share`, in [0, 1), of their total.

    Logits are (n,), fp32 on the CPU; those that are -inf are never drawn. Raises `FloatingPointError` if one is neither
    that nor finite, or none is.
    """
    assert logits.dtype is torch.float32
    logits = logits.contiguous()
    native = _native()
    if native is None:
        return place_in_numpy(logits, share)
    sums = (ctypes.c_double * -(-len(logits) // BLOCK))()
    found = native(ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(len(logits)), ctypes.c_double(share), sums)
    return _checked(int(found))


def place_in_numpy(logits: Tensor, share: float) -> int:
    """The same, without a compiler: only the probabilities of one block are summed one by one, which takes longest."""
    probabilities = logits.softmax(-1).numpy()
    starts = np.arange(0, len(probabilities), BLOCK)
    passed = np.add.reduceat(probabilities, starts, dtype=np.float64).cumsum()
    if not np.isfinite(passed[-1]):
        return _checked(-1)
    wanted = share * passed[-1]
    block = int(passed[:-1].searchsorted(wanted, side="right"))
    within = probabilities[starts[block] :][:BLOCK].cumsum(dtype=np.float64)
    before = passed[block - 1] if block else 0.0
    found = int(within.searchsorted(wanted - before, side="right"))
    last = int(within.searchsorted(within[-1]))  # that can be drawn: rounding may leave the block's sum short
    return int(starts[block]) + min(found, last)


def _checked(found: int) -> int:
    if found < 0:
        raise FloatingPointError("no token can be drawn from logits that are not finite")
    return found


@functools.cache
def _native() -> ctypes._NamedFuncPointer | None:
    try:
        function = library("draw").groundling_place
    except BuildError:
        return None
    function.restype = ctypes.c_int64
    return function

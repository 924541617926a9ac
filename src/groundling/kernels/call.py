"""How Python calls the C++ of this room.

Invariant: what C++ gets a pointer to is contiguous, in the CPU's memory, and of one of three formats; which of them a
function expects, its caller checks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from groundling.kernels.build import library

FORMATS = (torch.float32, torch.bfloat16, torch.int64)


def call(source: str, name: str, *arguments: Tensor | float | None) -> None:
    """Call `groundling_NAME` of SOURCE.cpp with PyTorch's number of threads, and then these arguments.

    There a tensor is a pointer (None a null one), a flag int, a size int64_t and a number float.
    """
    function = getattr(library(source), f"groundling_{name}")
    function(ctypes.c_int(torch.get_num_threads()), *map(_as_c, arguments))


def _as_c(argument: Tensor | float | None) -> Any:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        assert argument.device.type == "cpu"
        assert argument.dtype in FORMATS
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return None if argument is None else ctypes.c_int64(argument)

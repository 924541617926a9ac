"""AdamW on a CPU in C++: `kernels/adamw.cpp`, which reads and writes everything once.

Invariant: what it computes is PyTorch's AdamW within rounding, whatever the number of threads; its groups and state are
PyTorch's, so either goes on from a checkpoint of the other.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from groundling.kernels.build import library
from groundling.kernels.weight_copies import memory_of_copy, written_with_copies
from groundling.optim.fused import FusedAdamW


class _Parameter(ctypes.Structure):
    """What the kernel takes of a parameter, in its order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "exp_avg", "exp_avg_sq", "step", "copy")),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay")),
    ]


class NativeAdamW(FusedAdamW):
    """AdamW over contiguous fp32 parameters on the CPU, whose step also refreshes the weights' copies in bf16.

    Raises `BuildError` if the kernel cannot be compiled.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._library = library("adamw")
        self._library.groundling_sum_of_squares.restype = ctypes.c_double

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm () of all gradients together, summed in double, in an order that is always the same."""
        gradients = [gradient.contiguous() for gradient in self._gradients()]
        n = len(gradients)
        addresses = (ctypes.c_void_p * n)(*map(_address, gradients))
        sizes = (ctypes.c_int64 * n)(*(gradient.numel() for gradient in gradients))
        sum_of_squares = self._library.groundling_sum_of_squares(_threads(), ctypes.c_int64(n), addresses, sizes)
        return torch.tensor(math.sqrt(sum_of_squares), dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure: None = None, scale: float = 1.0) -> None:  # type: ignore[override]  # takes no closure
        """Update the parameters with their gradients times `scale`; `.grad` holds them as they were."""
        parameters, weights, moments = list[_Parameter](), list[Tensor](), list[Tensor]()
        gradients = list[Tensor]()  # alive until they are read
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            constants = [float(x) for x in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self._state_of(weight)
                copy = memory_of_copy(weight)
                weights.append(weight)
                gradients.append(weight.grad.contiguous())
                tensors = (weight, gradients[-1], *state)
                copy_address = None if copy is None else copy.data_ptr()
                parameters.append(_Parameter(*map(_address, tensors), copy_address, weight.numel(), *constants))
                moments += state
        n = len(parameters)
        self._library.groundling_adamw(
            _threads(), ctypes.c_int64(n), (_Parameter * n)(*parameters), ctypes.c_double(scale)
        )
        increment_version(moments)
        written_with_copies(weights)

    def _state_of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _address(tensor: Tensor) -> int:
    assert tensor.dtype is torch.float32
    assert tensor.device.type == "cpu"
    assert tensor.is_contiguous()
    return tensor.data_ptr()

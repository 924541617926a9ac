"""Copies in bf16 of weights that are kept in fp32, for products that read bf16.

Invariant: a copy holds the present values of its weight, rounded to the nearest, whenever `weight_copy` returns it.
It is made when first asked for and dies with its weight. Changes are noticed by PyTorch's count of them (`_version`)
and by the weight's address; edits of `weight.data` in place count nowhere, so they are for weights without a copy.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Copy:
    values: Tensor
    of: Tensor
    """The memory that was copied, held so that no other can come to lie at its address."""
    version: int

    def holds(self, weight: Tensor) -> bool:
        same = self.of.data_ptr() == weight.data_ptr() and self.of.stride() == weight.stride()
        return same and self.version == weight._version


_copies: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()


def weight_copy(weight: Tensor) -> Tensor:
    """The bf16 copy of a weight, of its shape and contiguous, rounded anew only if the weight has changed.

    Give the parameter itself, or autograd's view of the whole of it: other views and its `detach()` would have copies
    of their own. A copy is overwritten when its weight changes, so it is no copy to keep.
    """
    weight = _parameter(weight)
    if weight.is_inference():  # PyTorch counts no changes of these
        return weight.to(torch.bfloat16)
    copy = _fitting(weight)
    if copy is not None and copy.holds(weight):
        return copy.values
    with torch.inference_mode(False), torch.no_grad():  # so that training may use it, whoever asked first
        values = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device) if copy is None else copy.values
        values.copy_(weight)
        _copies[weight] = _Copy(values, weight.detach(), weight._version)
    return values


def _parameter(weight: Tensor) -> Tensor:
    """The parameter that a weight is a view of, if it is one of the whole, as functions of autograd return it."""
    base = weight._base
    if base is None or base.shape != weight.shape or base.stride() != weight.stride():
        return weight
    return base if base.data_ptr() == weight.data_ptr() else weight


def memory_of_copy(weight: Tensor) -> Tensor | None:
    """Where a kernel that writes this weight is to write its copy as well, or None if nobody has asked for one."""
    copy = _fitting(weight)
    return None if copy is None else copy.values


def written_with_copies(weights: Sequence[Tensor]) -> None:
    """Note that a kernel has written these weights, each with the copy that `memory_of_copy` gave."""
    copies = [(weight, copy) for weight in weights if (copy := _fitting(weight)) is not None]
    increment_version([*weights, *(copy.values for _, copy in copies)])
    for weight, copy in copies:
        copy.of, copy.version = weight.detach(), weight._version


def _fitting(weight: Tensor) -> _Copy | None:
    copy = _copies.get(weight)
    return copy if copy is not None and copy.values.shape == weight.shape else None

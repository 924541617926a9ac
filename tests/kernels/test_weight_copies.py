"""A weight's bf16 copy is its present value, however the weight has changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from groundling.kernels import native
from groundling.kernels.weight_copies import memory_of_copy, weight_copy
from groundling.optim.native import NativeAdamW

SHAPE = (33, 65)


def new_weight() -> nn.Parameter:
    """Values of all magnitudes, ties between two bf16 numbers among them."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=generator) * 10 ** torch.empty(SHAPE).uniform_(-30, 30, generator=generator)
    values[0] = (torch.randint(2**14, 2**15, SHAPE[1:], generator=generator) * 2**16 + 2**15).int().view(torch.float32)
    return nn.Parameter(values)


def is_rounded(copy: Tensor, weight: Tensor) -> bool:
    return copy.is_contiguous() and torch.equal(copy, weight.detach().to(torch.bfloat16))


def load(weight: nn.Parameter) -> None:
    module = nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": torch.randn(SHAPE)})


def edit(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.neg_()


def edit_a_view(weight: nn.Parameter) -> None:
    weight.detach()[3].neg_()


def give_other_memory(weight: nn.Parameter) -> None:
    weight.data = torch.randn(SHAPE)


def give_other_memory_twice(weight: nn.Parameter) -> None:
    """The second may come to lie where the first memory was."""
    weight.data = torch.randn(SHAPE)
    gc.collect()
    weight.data = torch.randn(SHAPE)


def give_another_shape(weight: nn.Parameter) -> None:
    weight.data = torch.randn(5, 7)


def step_by(kind: type[torch.optim.Optimizer]) -> Callable[[nn.Parameter], None]:
    def step(weight: nn.Parameter) -> None:
        weight.grad = torch.randn_like(weight)
        kind([weight], lr=0.5).step()  # type: ignore[call-arg]

    return step


@pytest.mark.parametrize(
    "change",
    [
        load,
        edit,
        edit_a_view,
        give_other_memory,
        give_other_memory_twice,
        give_another_shape,
        step_by(torch.optim.AdamW),
        step_by(torch.optim.SGD),
        step_by(NativeAdamW),
    ],
)
def test_a_copy_follows_its_weight(change: Callable[[nn.Parameter], None]) -> None:
    weight = new_weight()
    for _ in range(3):
        before = weight_copy(weight).clone()
        assert is_rounded(before, weight)
        change(weight)
        assert not torch.equal(weight.detach().to(torch.bfloat16), before)
    assert is_rounded(weight_copy(weight), weight)


def test_a_weight_that_is_turned_has_another_copy() -> None:
    """In the same memory, of the same shape."""
    weight = nn.Parameter(torch.randn(7, 7))
    weight_copy(weight)
    weight.data = weight.data.t()
    assert is_rounded(weight_copy(weight), weight)


def test_an_unchanged_weight_is_not_rounded_again() -> None:
    weight = new_weight()
    copy = weight_copy(weight)
    version = copy._version
    assert weight_copy(weight) is copy
    assert copy._version == version


def test_our_optimizer_refreshes_the_copy_itself() -> None:
    """To the last bit as PyTorch rounds, and in the same memory."""
    weight = new_weight()
    copy = weight_copy(weight)
    optimizer = NativeAdamW([weight], lr=0.5)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert is_rounded(copy, weight)
    version = copy._version
    assert weight_copy(weight) is copy
    assert copy._version == version


def test_autograd_notices_that_a_copy_was_overwritten() -> None:
    weight = new_weight()
    copy = weight_copy(weight)
    hidden = torch.ones(3, SHAPE[1], dtype=torch.bfloat16, requires_grad=True)
    outputs = hidden @ copy.t()
    weight.grad = torch.randn_like(weight)
    NativeAdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()  # type: ignore[no-untyped-call]


def test_there_is_no_copy_that_nobody_asked_for() -> None:
    weight = new_weight()
    weight.grad = torch.randn_like(weight)
    NativeAdamW([weight]).step()
    assert memory_of_copy(weight) is None


def test_a_copy_dies_with_its_weight() -> None:
    weight = new_weight()
    memory = weakref.ref(weight_copy(weight))
    del weight
    gc.collect()
    assert memory() is None


def test_a_copy_made_in_inference_mode_can_be_trained_with() -> None:
    weight = new_weight()
    with torch.inference_mode():
        weight_copy(weight)
    hidden = torch.ones(3, SHAPE[1], dtype=torch.bfloat16, requires_grad=True)
    (hidden @ weight_copy(weight).t()).sum().backward()  # type: ignore[no-untyped-call]


def test_a_weight_whose_changes_are_not_counted_is_rounded_each_time() -> None:
    with torch.inference_mode():
        weight = torch.randn(SHAPE)
        assert is_rounded(weight_copy(weight), weight)
        weight.mul_(3)
        assert is_rounded(weight_copy(weight), weight)


def test_autograds_view_of_a_parameter_shares_its_copy() -> None:
    weight = new_weight()
    tied = native.tied_embedding(torch.tensor([1, 2]), weight)[1]
    assert tied is not weight
    assert weight_copy(tied) is weight_copy(weight)
    edit(weight)
    assert is_rounded(weight_copy(tied), weight)
    square = nn.Parameter(torch.randn(16, 16))
    weight_copy(square)
    for view in (weight[:5], weight.T, square.T, square[:, 3:]):
        assert is_rounded(weight_copy(view).contiguous(), view)
    give_other_memory(weight)
    assert torch.equal(weight_copy(tied), tied.detach().to(torch.bfloat16))
    assert is_rounded(weight_copy(weight), weight)

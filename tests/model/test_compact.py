"""The compact network is the full one: in float64, to the last few digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundling import kernels
from groundling.errors import ConfigError
from groundling.kernels.reference import IGNORED_TARGET
from groundling.model.compact import CompactGPT2, expanded
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.optim.optimizer import OptimConfig, make_optimizer

SIZE = GPTConfig(n_layer=2, n_head=2, n_embd=8, n_ctx=12)
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def make(n_vocab: int, n_seen: int, seed: int, std: float = 0.5) -> tuple[CompactGPT2, torch.Tensor]:
    """A compact network in float64, with logits that are far from even, and its seen ids."""
    torch.manual_seed(seed)
    full = GPT2(replace(SIZE, n_vocab=n_vocab)).double()
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=std)
    seen = torch.randperm(n_vocab)[:n_seen].sort().values
    return CompactGPT2(full, seen), seen


def gradients(model: GPT2) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(compact: CompactGPT2, full: GPT2, seen: torch.Tensor) -> None:
    unseen = torch.ones(full.config.n_vocab, dtype=torch.bool).index_fill(0, seen, False)
    own, theirs = gradients(compact), gradients(full)
    table = theirs.pop("transformer.wte.weight")
    theirs["transformer.wte.weight"] = torch.cat([table[seen], table[unseen].mean(0, keepdim=True)])
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, theirs[name], **EXACT, msg=name)


@settings(max_examples=40, deadline=None)
@given(n_vocab=st.integers(2, 60), share=st.floats(0, 0.99), seed=st.integers(0, 2**20))
def test_loss_logits_and_gradients_are_those_of_the_full_network(n_vocab: int, share: float, seed: int) -> None:
    """Also where inputs and targets are ids that share the row, and where targets are ignored."""
    compact, seen = make(n_vocab, max(1, int(share * n_vocab)), seed)
    full = compact.expanded()
    tokens = torch.randint(n_vocab, (3, 13))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[torch.rand(targets.shape) < 0.2] = IGNORED_TARGET
    losses = [network.loss_sum(inputs, targets) for network in (compact, full)]
    torch.testing.assert_close(losses[0], losses[1], **EXACT)
    for loss in losses:
        loss.backward()
    assert_same_gradients(compact, full, seen)
    with torch.no_grad():
        logits = [network.logits(network.hidden(inputs)) for network in (compact, full)]
    torch.testing.assert_close(logits[0], logits[1], **EXACT)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_in_bf16_it_is_the_full_network_within_rounding(backend: str) -> None:
    """Many of the targets share the row, which counts 200 times."""
    compact, seen = make(300, 100, 3)
    full = compact.expanded()
    compact = CompactGPT2(full.float(), seen)
    full = full.double()
    tokens = torch.randint(300, (4, 13))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    targets[:2] = seen[torch.randint(100, (2, 12))]
    kernels.select("reference")
    expected = full.loss_sum(inputs, targets)
    expected.backward()
    kernels.select(backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = compact.loss_sum(inputs, targets)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    table = gradients(full)["transformer.wte.weight"]
    shared = torch.ones(300, dtype=torch.bool).index_fill(0, seen, False)
    exact = torch.cat([table[seen], table[shared].mean(0, keepdim=True)])
    ours = compact.head_weight.grad
    assert ours is not None
    assert ours.dtype is torch.float32
    assert float((ours - exact).norm() / exact.norm()) < 0.05
    assert float((ours[-1] - exact[-1]).norm() / exact[-1].norm()) < 0.2


def test_a_row_that_counts_once_is_noticed() -> None:
    """What the test above would miss if it compared nothing: without ln n the loss is another."""
    compact, seen = make(40, 10, 0)
    inputs, targets = seen[torch.randint(10, (2, 3, 12))]
    with torch.no_grad():
        expected = float(compact.expanded().loss_sum(inputs, targets))
        assert float(compact.loss_sum(inputs, targets)) == pytest.approx(expected, rel=1e-12)
        hidden = compact.hidden(inputs).flatten(0, 1)
        once = float(kernels.linear_cross_entropy(hidden, compact.head_weight, compact.places[targets.flatten()]))
    assert once < 0.99 * expected


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_training_takes_the_steps_of_the_full_network(clip: float) -> None:
    """Ten steps of AdamW with weight decay and a large eps, text of seen ids; clipped by the full network's norm."""
    compact, seen = make(40, 10, 1, std=0.1)
    full = compact.expanded()
    full.load_state_dict({name: tensor.clone() for name, tensor in full.state_dict().items()}, assign=True)
    full.lm_head.weight = full.transformer.wte.weight
    begin = compact.head_weight.detach().clone()
    optimizers = [make_optimizer(network, OptimConfig(weight_decay=0.1, eps=1e-3)) for network in (compact, full)]
    for _ in range(10):
        inputs, targets = seen[torch.randint(10, (2, 3, 12))]
        for network, optimizer in zip((compact, full), optimizers, strict=True):
            optimizer.zero_grad()
            (network.loss_sum(inputs, targets) / 36).backward()
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05
        assert_same_gradients(compact, full, seen)
        if clip:
            norms = [torch.stack([g.norm() for g in gradients(n).values()]).norm() for n in (compact, full)]
            (last,) = gradients(compact)["transformer.wte.weight"][-1:]
            missing = (compact.n_unseen - 1) * float(last.square().sum())
            assert float(norms[1]) == pytest.approx(float(norms[0].square() + missing) ** 0.5, rel=1e-9)
            for gradient in (*gradients(compact).values(), *gradients(full).values()):
                gradient.mul_(clip / norms[1])
        for optimizer in optimizers:
            optimizer.step()
    moved = (compact.head_weight.detach() - begin).abs().amin(dim=1)
    assert float(moved.min()) > 1e-3
    for name, tensor in compact.expanded().state_dict().items():
        torch.testing.assert_close(tensor, full.state_dict()[name], **EXACT, msg=name)


@pytest.mark.parametrize("n_unseen", [1, 2, 7, 1000, 38551])
def test_expanding_and_compacting_again_changes_no_bit(n_unseen: int) -> None:
    torch.manual_seed(n_unseen)
    seen = torch.randperm(n_unseen + 100)[:100].sort().values
    compact = CompactGPT2(GPT2(replace(SIZE, n_vocab=n_unseen + 100)), seen)
    torch.nn.init.normal_(compact.head_weight)
    full = expanded(compact)
    assert full.config.n_vocab == n_unseen + 100
    assert full.head_weight is full.transformer.wte.weight
    assert torch.equal(full.head_weight[seen], compact.head_weight[:-1])
    again = CompactGPT2(full, seen)
    taken = CompactGPT2(GPT2(full.config), seen)
    taken.take(full)
    for name, tensor in compact.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(taken.state_dict()[name], tensor), name


def test_it_begins_with_the_full_network_s_seen_rows_and_the_mean_of_the_others(model: GPT2) -> None:
    table = model.head_weight.detach().clone()
    compact = CompactGPT2(model, torch.tensor([3, 4, 30]))
    assert compact.head_weight is compact.transformer.wte.weight
    assert compact.config.n_vocab == len(compact.head_weight) == 4
    assert torch.equal(compact.head_weight[:-1], table[[3, 4, 30]])
    others = torch.cat([table[:3], table[5:30]])
    torch.testing.assert_close(compact.head_weight[-1], others.mean(0))


def test_a_full_network_is_its_own_expansion(model: GPT2) -> None:
    assert expanded(model) is model


def test_a_text_with_all_ids_is_refused(model: GPT2) -> None:
    with pytest.raises(ConfigError, match="all 31 ids"):
        CompactGPT2(model, torch.arange(31))


@pytest.mark.parametrize("target", [-1, -99])
def test_a_target_that_is_no_token_is_refused(target: int) -> None:
    compact, _ = make(20, 9, 0)
    inputs = torch.tensor([[1, 2]])
    for network in (compact, expanded(compact)):
        with pytest.raises(IndexError):
            network.loss_sum(inputs, torch.tensor([[IGNORED_TARGET, target]]))

from __future__ import annotations

import torch

from groundling.model.gpt2 import GPT2
from groundling.optim.optimizer import OptimConfig, make_optimizer


def test_an_update_is_the_formula(model: GPT2) -> None:
    """Loshchilov and Hutter's algorithm 2 in float64, two steps, decay on matrices only."""
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in (1, 2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            decay = 0.01 * 0.5 if parameter.ndim >= 2 else 0.0
            update = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] = expected[name] * (1 - decay) - 0.01 * update
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_every_parameter_is_in_one_group(model: GPT2) -> None:
    for kind, decayed, n_groups in (("adamw", "matrices", 2), ("adamw", "all", 1), ("muon", "matrices", 6)):
        groups = make_optimizer(model, OptimConfig(kind, weight_decay=0.1, decayed=decayed)).param_groups
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
        assert len(groups) == n_groups

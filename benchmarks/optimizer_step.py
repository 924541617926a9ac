"""Clip and update, PyTorch's and ours, beside what the memory allows, in one run.

    python benchmarks/optimizer_step.py

The parameters of the 124M model in fp32, with gradients of one seed. Contestants take turns, round by round, so that
a slow minute of the machine falls on all. The bytes are those that a contestant must read and write for each parameter:
4 for a gradient that is read, 8 for one that is scaled in place, 28 for an update (weight, gradient and both
moments read, all but the gradient written), 2 for a bf16 copy of a matrix. A copy of as many floats in the same
rounds says what the memory gives. Prints a JSON line for each contestant: the fastest and the median round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from groundling import machine
from groundling.kernels.weight_copies import weight_copy
from groundling.model.gpt2 import GPT2, SIZES
from groundling.optim.fused import FusedAdamW
from groundling.optim.optimizer import OptimConfig, make_optimizer

CLIP = 1.0


def pytorchs(optimizer: FusedAdamW) -> None:
    """Clipping and update as PyTorch's documentation has them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()


def ours(optimizer: FusedAdamW) -> None:
    """Clipping and update as `training/step.py` has them."""
    optimizer.step(scale=min(1.0, CLIP / optimizer.gradient_norm().item()))


def main() -> None:
    parser = argparse.ArgumentParser(description="clip and update: PyTorch's and ours")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    n = SIZES["124M"].n_parameters()
    models = {name: GPT2(SIZES["124M"]) for name in ("pytorch", "ours", "copying")}
    optimizers = {name: make_optimizer(model, OptimConfig(), name != "pytorch") for name, model in models.items()}
    drawn = [torch.randn_like(parameter) for parameter in models["ours"].parameters()]
    gradients = [torch.empty_like(gradient) for gradient in drawn]
    for model in models.values():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    for parameter in models["copying"].parameters():
        if parameter.ndim >= 2:
            weight_copy(parameter)
    source = torch.randn(n)
    target = torch.empty_like(source)
    contestants: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (8, lambda: target.copy_(source)),
        "pytorch": (40, lambda: pytorchs(optimizers["pytorch"])),
        "ours": (32, lambda: ours(optimizers["ours"])),
        "ours, with bf16 copies": (34, lambda: ours(optimizers["copying"])),
        "ours, norm alone": (4, optimizers["ours"].gradient_norm),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(arguments.rounds + 1):
        for name, (_, call) in contestants.items():
            for gradient, values in zip(gradients, drawn, strict=True):
                gradient.copy_(values)
            start = time.perf_counter()
            call()
            if round_number:  # the first makes the moments, and meets new memory
                seconds[name].append(time.perf_counter() - start)
    facts = machine.describe(arguments.threads, torch.device("cpu"))
    for name, (n_bytes, _) in contestants.items():
        fastest = min(seconds[name])
        line = {
            "contestant": name,
            "fastest_s": round(fastest, 4),
            "median_s": round(statistics.median(seconds[name]), 4),
            "bytes": n_bytes * n,
            "gb_per_s": round(n_bytes * n / fastest / 1e9, 1),
            "threads": arguments.threads,
            "cpu": facts["cpu"],
            "flags": facts["flags"],
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()

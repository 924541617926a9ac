"""Where the time of our own training step goes: every operation, of our kernels and of PyTorch.

    python benchmarks/profile_step.py > benchmarks/results/profile_step.jsonl

The step is that of `train_step.py`. PyTorch's profiler, which knows its own operations, is told of every call into our
libraries too. A moment counts once, for the operation that spends it and not for those that called that one. The first
line is the step, without the profiler and with it; then comes a line for each operation that takes a thousandth of
the time, with the part of the step that called it. Times are medians of the steps, each profiled alone: the profiler's
memory of several steps made large buffers move to new pages, which took as long as the head.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from steps import CPU, Task, our_trainer
from torch.profiler import ProfilerActivity, profile, record_function

from groundling import allocator, machine, runtime
from groundling.kernels import build, products
from groundling.model.gpt2 import SIZES
from groundling.training.flops import flops_per_token
from groundling.training.trainer import Trainer

PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    *("groundling_linear", "groundling_input_gradient", "groundling_weight_gradient", "groundling_symmetric"),
)
"""What multiplies matrices and does nothing else."""
WITH_PRODUCTS = (
    *("groundling_head", "groundling_attention", "groundling_attention_backward"),
    *("groundling_attention_fp32", "groundling_attention_fp32_backward"),
)
"""What takes products and what follows them in one go (products.py and native.py of kernels)."""
STEP = "everything else"
LEAST_SHARE = 0.001


def tell_profiler(name: str) -> None:
    """Show the profiler the calls of this library's functions, under their names."""
    library: Any = build.library(name)

    class Recorded(library._FuncPtr):  # type: ignore[misc]  # of which ctypes makes every function of the library
        _flags_, _restype_ = library._FuncPtr._flags_, library._FuncPtr._restype_

        def __call__(self, *arguments: Any) -> Any:
            with record_function(self.__name__):
                return super().__call__(*arguments)

    library._FuncPtr = Recorded


def seconds_of(trainer: Trainer, n_steps: int) -> list[float]:
    """Of each of so many steps."""
    found = []
    for _ in range(n_steps):
        start = time.perf_counter()
        with record_function(STEP):
            trainer._take_step()
        found.append(time.perf_counter() - start)
    return found


def part_of(event: Any) -> str:
    """The outermost operation that led to this one, below the step."""
    path = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        path.append(event.name)
    below = [name for name in path if name != STEP and not name.startswith("autograd::")]
    return below[-1] if below else STEP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--layers", type=int, default=0, help="blocks, to try this script; 0 for the size's own")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--threads", type=int, default=runtime.available_cores())
    parser.add_argument("--steps", type=int, default=3, help="steps to time, and to profile")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--ours", default="", metavar="OPTIONS", help="further options of `groundling train`")
    options = parser.parse_args()
    if allocator.in_use() is None:  # as `groundling train` begins
        settings = {allocator.VARIABLE: allocator.SETTINGS, "OMP_NUM_THREADS": str(options.threads)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)
    task = Task(
        options.size, options.layers, options.window, options.tokens, options.threads, options.steps, options.warmup
    )
    torch.set_num_threads(task.threads)
    for name in ("adamw", "attention_fp32", "blocks", "head", *products.libraries()):
        tell_profiler(name)
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * task.steps)
    calls: Counter[tuple[str, str]] = Counter()
    profiled_s = []
    with our_trainer(task, options.ours) as (trainer, _):
        used, config = trainer.runtime, trainer.model.config
        ceiling = machine.matrix_ceiling_flops(used.device, used.dtype, used.synchronize)
        seconds_of(trainer, task.warmup)
        step_s = statistics.median(seconds_of(trainer, task.steps))
        for step_number in range(task.steps):
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                profiled_s += seconds_of(trainer, 1)
            for event in profiled.events():
                key = part_of(event), event.name
                spent[key][step_number] += event.self_cpu_time_total / 1e6
                calls[key] += 1
    profiled_step_s = statistics.median(profiled_s)
    shares = {key: statistics.median(seconds) / profiled_step_s for key, seconds in spent.items()}

    def share_of(names: tuple[str, ...]) -> float:
        return round(sum(share for (_, name), share in shares.items() if name in names), 4)

    facts = machine.describe(task.threads, CPU)
    step = {
        "operation": "a step",
        "step_s": round(step_s, 4),
        "profiled_step_s": round(profiled_step_s, 4),
        "products_share": share_of(PRODUCTS),
        "fused_with_products_share": share_of(WITH_PRODUCTS),
        "mfu": round(task.tokens / step_s * flops_per_token(config, task.window) / ceiling, 4),
        "ceiling_tflops": round(ceiling / 1e12, 4),
        "dtype": used.dtype_name,
        **{name: getattr(task, name) for name in ("size", "layers", "window", "tokens", "threads", "steps")},
        "ours": options.ours,
        **{name: facts[name] for name in ("cpu", "flags", "memory_bytes", "system")},
        "versions": machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(step))
    for (part, name), share in sorted(shares.items(), key=lambda item: -item[1]):
        if share >= LEAST_SHARE:
            line = {"operation": name, "part": part, "share": round(share, 4)}
            seconds, n_calls = statistics.median(spent[part, name]), calls[part, name] / task.steps
            print(json.dumps(line | {"step_s": round(seconds, 5), "calls": round(n_calls, 2)}))


if __name__ == "__main__":
    main()

"""What a training step would take with a matrix unit (AMX), measured on a CPU that has none.

    python benchmarks/timed_unit.py > benchmarks/results/timed_unit.jsonl

`timed_tiles.h` takes the place of the unit's registers: the same loads and stores, 16 cycles for a product, and no
sensible result. All else in the kernels is as it is with the unit, and Xeons with and without it have the same cores
and caches otherwise (Golden Cove). What was measured on one with the unit on 2026-11-25 was found again like this with
the kernels of 2026-11-29, a function at a time: 6.2 TFLOP/s of the unit alone on two threads (here 6.1), 1.8 to 2.0 for
weight gradients (1.8 to 2.0), 255 ms for the head of 2,048 positions (252), a loss by larger blocks of the left matrix.

Two things it does not know: `tileloaddt1`, which goes past the L1 cache, and that the unit's own loads come more slowly
from the L2 cache than vectors do. So it cannot be asked how many steps of a panel belong in which cache, and for
attention's backward pass of then, whose products are short, it said 4.8 ms, not 3.6.

Prints a JSON line for each number of tokens: milliseconds of a step, and of each kernel in it, medians of the steps.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from steps import CPU, Task, our_trainer

from groundling import allocator, machine, runtime
from groundling.kernels import build, call, products

UNIT = ("products", "head_products", "attention")
"""Libraries of kernels that use it."""
RESERVED = tuple(f"-ffixed-xmm{number}" for number in range(16, 29))
"""Registers that are the header's; only GNU's compiler can be told so."""


@functools.cache
def timed_library(name: str) -> ctypes.CDLL:
    """`kernels/NAME.cpp` with the stand-in, compiled anew."""
    compiler = runtime.cpp_compiler()
    assert compiler is not None, "there is no C++ compiler"
    tiles = f'-DGROUNDLING_TILES="{Path(__file__).with_name("timed_tiles.h")}"'
    source = Path(build.__file__).with_name(f"{name}.cpp")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, f"{name}.so")
        flags = [*build.FLAGS, "-march=native", "-fopenmp", *RESERVED, tiles]
        subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True)
        return ctypes.CDLL(str(made))


def time_calls(library: Any, seconds: defaultdict[str, float]) -> None:
    """Add the time of each call of this library's functions to that of its name."""

    class Timed(library._FuncPtr):  # type: ignore[misc]  # of which ctypes makes every function of the library
        _flags_, _restype_ = library._FuncPtr._flags_, library._FuncPtr._restype_

        def __call__(self, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = super().__call__(*arguments)
            seconds[self.__name__] += time.perf_counter() - start
            return result

    library._FuncPtr = Timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="tokens in a step")
    parser.add_argument("--threads", type=int, default=runtime.available_cores())
    parser.add_argument("--steps", type=int, default=5, help="steps to time")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those; in the first two memory is new")
    options = parser.parse_args()
    if "avx512f" not in machine.cpu_flags():
        raise SystemExit("the stand-in for the matrix unit needs a CPU with AVX-512")
    if allocator.in_use() is None:  # as `groundling train` begins
        settings = {allocator.VARIABLE: allocator.SETTINGS, "OMP_NUM_THREADS": str(options.threads)}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)
    torch.set_num_threads(options.threads)
    vars(products)["available"] = lambda: True
    vars(call)["library"] = lambda name: timed_library(name) if name in UNIT else build.library(name)
    seconds: defaultdict[str, float] = defaultdict(float)
    for library in (*map(build.library, ("adamw", "blocks")), *map(timed_library, UNIT)):
        time_calls(library, seconds)
    facts = machine.describe(options.threads, CPU)
    for tokens in options.tokens:
        steps = []
        task = Task("124M", 0, 256, tokens, options.threads, options.steps, options.warmup)
        with our_trainer(task, "--runtime.dtype bf16") as (trainer, _):
            for _ in range(task.n_steps):
                seconds.clear()
                start = time.perf_counter()
                trainer._take_step()
                steps.append(dict(seconds) | {"step": time.perf_counter() - start})
        timed = steps[task.warmup :]
        ms = {name: round(1e3 * statistics.median(step[name] for step in timed), 1) for name in sorted(timed[0])}
        line = {"tokens": tokens, "step_ms": ms.pop("step"), "kernels_ms": ms}
        line |= {name: getattr(task, name) for name in ("size", "window", "threads", "steps")}
        line |= {name: facts[name] for name in ("cpu", "flags", "memory_bytes", "system")}
        print(json.dumps(line | {"versions": machine.versions(), "date": time.strftime("%Y-%m-%d")}), flush=True)


if __name__ == "__main__":
    main()

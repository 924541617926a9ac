"""Our C++, compiled where it runs.

Invariant: a library is used only if it was made from this very source, by this compiler, for this CPU; it
appears under its final name whole or not at all, so processes may compile side by side; and it is loaded only while its
bytes have the sum that was written when it was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import secrets
import subprocess
from pathlib import Path

from groundling import machine, runtime
from groundling.files import sha256_of, sync_file, write_text

FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
"""Products and sums are fused where the source says so and nowhere else: else equal sums could differ in last bits."""
OPENMP = ("adamw", "attention", "attention_fp32", "blocks", "head", "head_products", "products")
"""Libraries that share PyTorch's threads, with -fopenmp: GNU's libgomp is loaded once. Where the compiler has no OpenMP
they have one thread."""
TIMEOUT_S = 300


class BuildError(Exception):
    """A library that cannot be had here, in one sentence; everything works without it, more slowly."""


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The library made of `kernels/NAME.cpp`, compiled at its first use on this machine and then cached.

    Raises `BuildError` if there is no C++ compiler, or it fails.
    """
    compiler = runtime.cpp_compiler()
    if compiler is None:
        raise BuildError("there is no C++ compiler (g++ or clang++)")
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    source = Path(__file__).with_name(f"{name}.cpp")
    if name in OPENMP:
        try:
            return _load(compiler, [*flags, "-fopenmp"], source)
        except BuildError as error:
            made = _load(compiler, flags, source)  # or nothing can be made here, of which the caller says so
            _say_one_thread(str(error))
            return made
    return _load(compiler, flags, source)


@functools.cache
def _say_one_thread(why: str) -> None:
    """Once for each reason: a compiler without OpenMP has the same for every kernel."""
    logging.getLogger(__name__).warning("kernels have one thread, which is slower: %s", why)


def _load(compiler: str, flags: list[str], source: Path) -> ctypes.CDLL:
    made_of = [
        *(path.read_text(encoding="utf-8") for path in [source, *sorted(source.parent.glob("*.h"))]),
        *flags,
        _version(compiler),
        _understood(compiler, *flags),
        *sorted(machine.cpu_flags()),
    ]
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
    path = runtime.cache_dir() / "kernels" / f"{source.stem}-{key[:24]}.so"
    command = [compiler, *flags, str(source)]
    try:
        if _intact(path):
            with contextlib.suppress(OSError):  # of another system that shares the cache: made anew
                return ctypes.CDLL(str(path))
        _compile(command, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the kernel {path} cannot be made or loaded ({error})") from None


def _sum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    """Whether the library is what was compiled: one that was cut short would end the process when it is used."""
    try:
        return _sum_file(path).read_text(encoding="utf-8") == sha256_of(path)
    except (OSError, ValueError):
        return False


@functools.cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


@functools.cache
def _understood(compiler: str, *flags: str) -> str:
    """The macros that the flags stand for here: which instructions "native" means, too."""
    return _run([compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])


def _compile(command: list[str], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _run([*command, "-o", str(temporary)])
        made = sha256_of(temporary)
        sync_file(temporary)  # else its name may reach the disk before its content does
        temporary.replace(path)
        write_text(_sum_file(path), made)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        first_line = (error.stderr.strip() or "no message").partition("\n")[0]
        raise BuildError(f"{Path(command[0]).name} failed: {first_line}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run ({error})") from None

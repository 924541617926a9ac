"""`groundling doctor`: what this machine offers, and what will be used."""

from __future__ import annotations

from pathlib import Path

import torch

from groundling import allocator, machine, runtime
from groundling.commands.arguments import Parser
from groundling.errors import ConfigError
from groundling.model.formats import read_bytes
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import DTYPES, RuntimeConfig

EXAMPLES = """examples:
  groundling doctor
"""


def main(arguments: list[str]) -> int:
    """Print the machine's facts, what a run would use and why, and its measured matrix ceilings."""
    Parser(
        prog="groundling doctor",
        description=__doc__,
        epilog=EXAMPLES,
    ).parse_args(arguments)
    try:
        resolved = runtime.resolve(RuntimeConfig())
    except ConfigError as error:  # of a GPU that is full
        print(f"warning: {error}\n")
        resolved = runtime.resolve(RuntimeConfig(device="cpu"))
    facts = machine.describe(resolved.threads, resolved.device)
    memory, flags = facts["memory_bytes"], facts["flags"]
    amx = "yes" if "amx_bf16" in flags else "no"
    print(f"system      {facts['system']}")
    print(f"CPU         {facts['cpu']}, {runtime.available_cores()} cores")
    print(f"flags       {' '.join(flags) or 'unknown'} (AMX: {amx})")
    print(f"memory      {'unknown' if memory is None else f'{memory / 2**30:.1f} GiB'}")
    print(f"disk here   {machine.free_disk_bytes(Path.cwd()) / 2**30:.1f} GiB free")
    print(f"GPU         {facts['gpu'] or 'none'}")
    print(f"compiler    {runtime.cpp_compiler() or 'none: install g++ or clang++ for a faster run'}")
    print(f"allocator   {allocator_line()}")
    print(f"token cache {runtime.cache_dir()}")
    print(f"versions    {', '.join(f'{name} {version}' for name, version in machine.versions().items())}")
    print("\nwhat a run uses:")
    for what, choice, why in resolved.reasons:
        print(f"  {what:8} {choice:9} {why}")
    print("\nmatrix ceiling, measured:")
    for name, dtype in DTYPES.items():
        if not runtime.supports_dtype(name, resolved.device):
            continue
        used = "  <- used" if dtype is resolved.dtype else ""
        ceiling = machine.matrix_ceiling_flops(resolved.device, dtype, resolved.synchronize, SHAPES)
        print(f"  {name}  {ceiling / 1e12:7.3f} TFLOP/s{used}")
    if resolved.device.type == "cpu":  # where decoding is bounded by it
        bandwidth = machine.read_bandwidth_bytes_per_s(resolved.threads)
        with torch.device("meta"):
            weight_bytes = read_bytes(GPT2(GPTConfig()), "bf16")
        print(f"\nreading memory, measured:\n  {bandwidth / 1e9:.1f} GB/s on {resolved.threads} threads,", end="")
        most = bandwidth / weight_bytes
        print(f" so on this CPU the 124M model writes at most {most:.0f} tokens/s (bf16, no drafts)")
    if resolved.device.type == "cuda":
        print(f"\nGPU memory  {torch.cuda.get_device_properties(resolved.device).total_memory / 2**30:.1f} GiB")
    return 0


def allocator_line() -> str:
    """Which settings of the allocator the commands that compute for long begin with."""
    if settings := allocator.in_use():
        return f"{allocator.VARIABLE}={settings} (as set)"
    if why := allocator.why_not():
        return f"the system's own settings ({why})"
    return f"{', '.join(allocator.COMMANDS)} start again with {allocator.VARIABLE}={allocator.SETTINGS}"


SHAPES = machine.CEILING_SHAPES[:1]
"""One shape tells the formats apart, also where bf16 is emulated and slow."""

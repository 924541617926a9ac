"""What the commands that use a trained model share: which run, on which device."""

from __future__ import annotations

import argparse
from typing import Literal

from groundling import runtime
from groundling.commands.arguments import Parser
from groundling.commands.session import say
from groundling.runtime import Runtime, RuntimeConfig


def model_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser with RUN, --device and --threads."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=examples,
    )
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 means one per core")
    return parser


def resolve_runtime(options: argparse.Namespace, dtype: Literal["auto", "fp32", "bf16"]) -> Runtime:
    """The runtime these options mean, uncompiled: a single use does not repay compilation."""
    resolved = runtime.resolve(
        RuntimeConfig(device=options.device, dtype=dtype, threads=options.threads, compile="off")
    )
    for warning in resolved.warnings:
        say(f"warning: {warning}")
    return resolved

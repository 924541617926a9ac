"""A small text, settings that make a small network of it, and what the tests ask of a run."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = "".join(f"{n} green bottles, hanging on the wall;\nand if one should fall, {n - 1}.\n" for n in range(40, 0, -1))

SMALL = [
    *("--tokenizer", "train:300", "--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32"),
    *("--model.n_ctx", "32", "--windows.length", "32", "--runtime.compile", "off", "--sampling.max_tokens", "5"),
]


def train(*arguments: str) -> list[str]:
    return ["train", "--corpus", "bottles.txt", *SMALL, *arguments]


def files_but_cache(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if "cache" not in found.parts)


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def start(*arguments: str) -> subprocess.Popen[str]:
    """`groundling train` on the bottles, in a process of its own."""
    command = [sys.executable, "-m", "groundling", *train(*arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, content: str, times: int, process: subprocess.Popen[str]) -> None:
    """Wait until a file that the process writes holds so many of this; fails if it ends before, or takes too long."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count(content) < times:
        assert time.monotonic() < deadline, f"{path} does not hold {times} of {content}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
        assert process.poll() is None, process.communicate()

"""One training step of GPT-2, ours and others', in one run on one machine: same weights, same batches, same shapes.

    python benchmarks/train_step.py --nanogpt nanoGPT --llmc llm.c/train_gpt2 > benchmarks/results/train_step.jsonl
    python benchmarks/train_step.py --sweep --rounds 1 > benchmarks/results/train_step_sweep.jsonl
    python benchmarks/train_step.py --cold > benchmarks/results/train_step_cold.jsonl

The contestants take turns, round by round, so that a slow minute of the machine falls on all. A turn is a process of
its own, so that its peak memory is its own and nobody's idle threads disturb another's; it takes some steps to warm up
and times the next ones. The matrix ceiling is measured before each round, by what `groundling train` measures it with,
and the highest counts. Prints a JSON line for each contestant: the median step with all steps of all rounds, MFU by
`groundling`'s own count of operations, peak memory, the first loss, the first step of the first turn (which compiles,
if no cache has it) and of the last one (which finds it compiled). A contestant that is not given, or fails, is left out
with a line that says so.

Peers are fetched by whoever runs this: `git clone https://github.com/karpathy/nanoGPT`; llm.c's program `train_gpt2`
built as its README says, from a source whose main() has the B and T that are asked for here (it comes with 4 and 64);
`pip install 'transformers>=5.3' accelerate` for Hugging Face's Trainer. bf16 is measured where the CPU has instructions
for it; those who choose a format take the one that `groundling train` would take there.

`--sweep` measures ours alone, over windows, tokens in a step and sizes, on one thread and on all; `plot_train_step.py`
draws it. `--cold` measures the time from the command to the first finished step, with empty caches and with full ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steps import CONTESTANTS, CPU, Task, Turn

from groundling import allocator, machine, runtime
from groundling.model.gpt2 import SIZES
from groundling.runtime import RuntimeConfig
from groundling.training.flops import flops_per_token

SWEEP_WINDOWS = (128, 256, 512, 1024)
SWEEP_TOKENS = (1024, 2048, 4096, 8192, 16384)
SWEEP_SIZES = (("124M", 3), ("124M", 6), ("124M", 0), ("355M", 12), ("355M", 0))
"""Released sizes, and some of their blocks."""
SWEEP_BASE = 4096
"""Tokens in a step where something else is varied, and of which `--steps` are timed: as many tokens at every place."""

SAME_LOSS = 0.02
"""First losses lie within this of ours: bf16 moves them by some thousandths, nanoGPT's 47 unused ids by one."""


@dataclass
class Contestant:
    """A name in the results, and the function of `steps.py` that takes its turns."""

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    keeps_memory: bool = False
    """Whether it begins with the allocator's settings that `groundling train` begins with."""
    turns: list[Turn] = field(default_factory=list)
    failure: str = ""

    def take_turn(self, task: Task) -> None:
        """One turn in a process of its own; what fails once takes no further turns."""
        if self.failure:
            return
        request = json.dumps({"task": asdict(task), "function": self.function, "arguments": self.arguments})
        environment = {name: value for name, value in os.environ.items() if name != allocator.VARIABLE}
        environment["OMP_NUM_THREADS"] = str(task.threads)
        if self.keeps_memory:
            environment[allocator.VARIABLE] = allocator.SETTINGS
        done = subprocess.run(
            [sys.executable, __file__, "--turn", request], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            self.failure = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            say(f"{self.name} is left out: {self.failure}")
        else:
            self.turns.append(Turn(**json.loads(done.stdout.splitlines()[-1])))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def turn(request: str) -> None:
    """A contestant's process."""
    import torch

    asked = json.loads(request)
    task = Task(**asked["task"])
    torch.set_num_threads(task.threads)
    print("\n" + json.dumps(asdict(CONTESTANTS[asked["function"]](task, **asked["arguments"]))))


def contestants(options: argparse.Namespace) -> Iterator[Contestant]:
    """All that can run here, ours first."""
    for variant in ("", *options.ours):
        yield Contestant(f"groundling {variant}".strip(), "ours", {"words": variant}, keeps_memory=True)
    has_bf16 = not machine.cpu_flags().isdisjoint(runtime.CPU_BF16_FLAGS)
    formats = ("fp32", "bf16") if has_bf16 else ("fp32",)
    for dtype, compiled in itertools.product(formats, (False, True)):
        name, settings = f"PyTorch {dtype}{' compiled' if compiled else ''}", {"dtype": dtype, "compiled": compiled}
        yield Contestant(name, "plain", settings)
        yield Contestant(f"{name}, our allocator settings", "plain", settings, keeps_memory=True)
    yield Contestant("reference recipe fp32", "reference_recipe")
    for dtype in formats:
        yield Contestant(f"Hugging Face Trainer {dtype}", "huggingface", {"dtype": dtype})
    if options.nanogpt:
        yield Contestant("nanoGPT fp32", "nanogpt", {"folder": str(options.nanogpt.resolve())})
    if options.llmc:
        yield Contestant("llm.c fp32", "llm_c", {"program": str(options.llmc.resolve())})
    for name, given in (("nanoGPT", options.nanogpt), ("llm.c", options.llmc)):
        if not given:
            say(f"{name} is left out: it was not given")
    if not has_bf16:
        say(f"bf16 is left out: the CPU has neither {' nor '.join(runtime.CPU_BF16_FLAGS)}")


def measure(task: Task, entered: list[Contestant], rounds: int) -> list[float]:
    """Let all take their turns; returns the matrix ceilings measured before each round, in FLOP/s."""
    ceilings = []
    for number in range(rounds):
        ceilings.append(ceiling_flops(task.threads))
        for contestant in entered:
            say(f"round {number + 1} of {rounds}: {contestant.name}")
            contestant.take_turn(task)
            if not contestant.failure:
                say(f"its last step took {contestant.turns[-1].seconds[-1]:.2f} s")
        check_losses(entered)
    return ceilings


def ceiling_flops(threads: int) -> float:
    """Measured in a process of its own, as a turn is."""
    code = (
        "from groundling import machine, runtime; from groundling.runtime import RuntimeConfig;"
        f"r = runtime.resolve(RuntimeConfig(device='cpu', compile='off', threads={threads}));"
        "print(machine.matrix_ceiling_flops(r.device, r.dtype, r.synchronize))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def line(task: Task, contestant: Contestant, ceilings: list[float], dtype: str, warmup: int) -> dict[str, Any]:
    """What is kept of a contestant's turns."""
    rounds = [one.seconds[warmup:] for one in contestant.turns]
    step_s = statistics.median(seconds for one in rounds for seconds in one)
    tokens_per_s = task.tokens / step_s
    reached = tokens_per_s * (contestant.turns[0].token_flops or flops_per_token(task.config, task.window))
    peaks = [one.peak_memory_bytes for one in contestant.turns if one.peak_memory_bytes is not None]
    facts = machine.describe(task.threads, CPU)
    return {
        "contestant": contestant.name,
        "tokens_per_s": round(tokens_per_s, 1),
        "step_s": round(step_s, 4),
        "rounds": [[round(seconds, 4) for seconds in one] for one in rounds],
        "mfu": round(reached / max(ceilings), 4),
        "ceilings_tflops": [round(value / 1e12, 4) for value in ceilings],
        "ceiling_dtype": dtype,
        "peak_memory_bytes": max(peaks, default=None),
        "first_loss": contestant.turns[0].losses[0],
        "first_step_s": [round(contestant.turns[which].seconds[0], 2) for which in (0, -1)],
        "allocator": allocator.SETTINGS if contestant.keeps_memory else None,
        "version": contestant.turns[0].version,
        **{name: value for name, value in asdict(task).items() if name not in ("steps", "warmup")},
        "parameters": task.config.n_parameters(),
        **{name: facts[name] for name in ("cpu", "flags", "memory_bytes", "system")},
        "load": round(os.getloadavg()[0], 2),
        "versions": machine.versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def check_losses(entered: list[Contestant]) -> None:
    """Raises `SystemExit` if somebody computes something else: then no time of theirs means anything."""
    ran = [contestant for contestant in entered if contestant.turns]
    for contestant in ran:
        if "--head-vocabulary seen" in contestant.name:  # begins elsewhere: ids that the text lacks share a row
            continue
        difference = contestant.turns[0].losses[0] - ran[0].turns[0].losses[0]
        if abs(difference) > SAME_LOSS:
            raise SystemExit(f"{contestant.name}: the first loss is {difference:+.4f} beside that of {ran[0].name}")


def sweep(options: argparse.Namespace, base: Task, dtype: str) -> None:
    """Ours alone, one thing varied at a time, on one thread and on all."""
    base = replace(base, tokens=SWEEP_BASE)
    tasks = [
        *(("window", replace(base, window=window)) for window in SWEEP_WINDOWS),
        *(("tokens", replace(base, tokens=tokens)) for tokens in SWEEP_TOKENS),
        *(("size", replace(base, size=size, layers=layers)) for size, layers in SWEEP_SIZES),
    ]
    for threads in sorted({1, base.threads}, reverse=True):
        bandwidth = machine.read_bandwidth_bytes_per_s(threads)
        found: dict[Task, dict[str, Any]] = {}  # a step that lies on several of the lines is measured once
        for what, task in tasks:
            task = replace(task, threads=threads, steps=max(1, options.steps * SWEEP_BASE // task.tokens))
            if task not in found:
                contestant = Contestant("groundling", "ours", {"words": " ".join(options.ours)}, keeps_memory=True)
                ceilings = measure(task, [contestant], options.rounds)
                if not contestant.turns:
                    continue
                found[task] = line(task, contestant, ceilings, dtype, options.warmup)
            print(json.dumps({"sweep": what, "read_bandwidth_bytes_per_s": bandwidth, **found[task]}), flush=True)


def cold(options: argparse.Namespace) -> None:
    """Seconds from the command to the first finished step: with empty caches first, then with what they got."""
    facts = machine.describe(runtime.available_cores(), CPU)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        caches = {"GROUNDLING_CACHE": str(root / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
        for which in ("cold", *["warm"] * options.rounds):
            out = root / f"run-{time.monotonic_ns()}"
            words = ["train", "--out", str(out), "--max-steps", "1", "--evaluation.final", "none", "--save-every", "0"]
            words += ["--growth.every", "1"]  # a first step through all blocks
            command = [
                sys.executable,
                "-m",
                "groundling",
                *words,
                *(word for words in options.ours for word in words.split()),
            ]
            start, first_step_s = time.perf_counter(), None
            with subprocess.Popen(command, env=os.environ | caches, stderr=subprocess.PIPE, text=True) as process:
                assert process.stderr
                said = []
                for text in process.stderr:
                    said.append((round(time.perf_counter() - start, 2), text.rstrip()))
                    if "/1 loss" in text:
                        first_step_s = said[-1][0]
                        break
                process.kill()
            for seconds, text in said:
                say(f"{seconds:7.2f} s  {text}")
            found = {
                "caches": which,
                "first_step_s": first_step_s,
                "ours": options.ours,
                **{name: facts[name] for name in ("cpu", "flags", "threads", "memory_bytes", "system")},
                "versions": machine.versions(),
                "date": time.strftime("%Y-%m-%d"),
            }
            print(json.dumps(found), flush=True)


def main() -> None:
    """Run what was asked for and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=list(SIZES), default="124M")
    parser.add_argument("--layers", type=int, default=0, help="blocks, to try this script; 0 for the size's own")
    parser.add_argument("--window", type=int, default=256, help="tokens in a window")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--threads", type=int, default=runtime.available_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps to time in a turn; as many tokens, in a sweep")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--only", nargs="*", help="contestants with one of these words in their names")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--llmc", type=Path, help="llm.c's program train_gpt2, built for these shapes")
    parser.add_argument(
        "--ours",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="further options of `groundling train`: another contestant of ours each, as '--runtime.kernels reference'",
    )
    parser.add_argument("--sweep", action="store_true", help="how the cost of our own step grows")
    parser.add_argument("--cold", action="store_true", help="the time to the first finished step")
    options = parser.parse_args()
    if options.turn:
        return turn(options.turn)
    if options.cold:
        return cold(options)
    task = Task(
        options.size, options.layers, options.window, options.tokens, options.threads, options.steps, options.warmup
    )
    if options.tokens % options.window:
        parser.error(f"--tokens {options.tokens} is no multiple of --window {options.window}")
    resolved = runtime.resolve(RuntimeConfig(device="cpu", compile="off", threads=options.threads))
    if options.sweep:
        return sweep(options, task, resolved.dtype_name)
    entered = list(contestants(options))
    if options.only:
        entered = [contestant for contestant in entered if any(word in contestant.name for word in options.only)]
    ceilings = measure(task, entered, options.rounds)
    for contestant in entered:
        if contestant.turns:
            print(json.dumps(line(task, contestant, ceilings, resolved.dtype_name, options.warmup)))


if __name__ == "__main__":
    main()

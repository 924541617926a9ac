"""Many clients at once, ours and llama.cpp's server, in one run: same weights, same prompts, two threads.

    python benchmarks/serve.py --run runs/gpt2

Each server is a process of its own, asked over HTTP on this machine by streaming clients in this one. A round asks
each server in turn: one text after another (the speed of one stream), 16 texts at once (the speed of all together),
and three times as many texts as it writes at a time, all at the same moment (how long their first tokens take). Texts
are drawn at temperature 1 without top-k, with a seed each, after prompts of 16 tokens from places of the training text
spread evenly; servers draw different texts, of the same length where none ends early (the tokens that came are
counted). Ours runs without drafts, but for the contestant that says so. Prints a JSON line for each contestant;
figures are medians of rounds.

Needs `pip install 'groundling[export,serve]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundling import machine, runtime
from groundling.interop import gguf
from groundling.interop.trained import Trained, open_trained
from groundling.runtime import RuntimeConfig

N_THREADS = 2
N_STREAMS = 16
N_QUEUED = 3 * N_STREAMS

LLAMA_SERVER = """
import sys, xllamacpp
path, n_ctx, n_parallel, threads = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = int(n_ctx) * int(n_parallel), int(n_parallel)
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
params.cache_prompt = False
params.verbosity = 0
params.port = 0
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass
class Answer:
    """A streamed answer as it came: looked at when all have come, since clients and server share the cores."""

    server: str
    started: float
    read: list[tuple[float, bytes]] = field(default_factory=list)
    """Bytes, and when they were there."""

    def n_tokens(self) -> int:
        """As the server counts them, at its end."""
        whole = b"".join(content for _, content in self.read)
        assert whole.startswith(b"HTTP/1.1 200 "), (self.server, whole[:500])
        return int(re.findall(rb'"completion_tokens":\s*(\d+)', whole)[-1])

    def first_text_s(self) -> float:
        """Seconds to the first text that is not empty."""
        so_far = b""
        for seconds, content in self.read:
            so_far += content
            if re.search(rb'"text":\s*"[^"]', so_far):
                return seconds - self.started
        return math.nan


class Contestant:
    """A server in a process of its own, and what was measured of it."""

    def __init__(self, name: str, command: list[str], model: str) -> None:
        self.name, self.model = name, model
        self.one: list[float] = []
        self.many: list[float] = []
        self.first_token_s: list[list[float]] = []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT)
        self.host, self.port = self._address()

    def _address(self) -> tuple[str, int]:
        while self.process.poll() is None:
            self.log.seek(0)
            if found := re.search(r"(?:address |weights\): )http://([\d.]+):(\d+)", self.log.read()):
                return found[1], int(found[2])
            time.sleep(0.1)
        self.log.seek(0)
        raise RuntimeError(f"{self.name} did not start: {self.log.read()}")

    def round(self, prompts: list[list[int]], n_tokens: int) -> None:
        """Ask for one text at a time, for many, and for more than are written at a time."""
        self.one.append(asyncio.run(self._ask(prompts[:2], n_tokens, 1))[0])
        self.many.append(asyncio.run(self._ask(prompts[:N_STREAMS], n_tokens, N_STREAMS))[0])
        self.first_token_s.append(asyncio.run(self._ask(prompts, n_tokens, len(prompts)))[1])

    async def _ask(self, prompts: list[list[int]], n_tokens: int, at_once: int) -> tuple[float, list[float]]:
        """Tokens a second of all texts together, and the seconds to each one's first text."""
        turn = asyncio.Semaphore(at_once)

        async def one(seed: int, prompt: list[int]) -> Answer:
            async with turn:
                return await self._stream(prompt, seed, n_tokens)

        started = time.perf_counter()
        answers = await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(prompts)))
        seconds = time.perf_counter() - started
        return sum(answer.n_tokens() for answer in answers) / seconds, [answer.first_text_s() for answer in answers]

    async def _stream(self, prompt: list[int], seed: int, n: int) -> Answer:
        settings = {"model": self.model, "prompt": prompt, "max_tokens": n, "seed": seed}
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        settings |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(settings).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        answer = Answer(self.name, time.perf_counter())
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(head.encode() + body)
        while content := await reader.read(1 << 16):
            answer.read.append((time.perf_counter(), content))
        writer.close()
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def line(self) -> dict[str, Any]:
        """What was measured."""
        waits = sorted(wait for each in self.first_token_s for wait in each if not math.isnan(wait))
        one, many = statistics.median(self.one), statistics.median(self.many)
        return {
            "contestant": self.name,
            "tokens_per_s_one_stream": round(one, 1),
            f"tokens_per_s_{N_STREAMS}_streams": round(many, 1),
            "gain": round(statistics.median(b / a for a, b in zip(self.one, self.many, strict=True)), 2),
            "first_token_s_under_load": {
                "p50": round(statistics.median(waits), 3),
                "p95": round(waits[math.ceil(0.95 * len(waits)) - 1], 3),
            },
            "rounds_one": [round(value, 1) for value in self.one],
            "rounds_many": [round(value, 1) for value in self.many],
        }


def contestants(options: argparse.Namespace, trained: Trained, root: Path) -> list[Contestant]:
    """All servers, started."""
    groundling = [sys.executable, "-m", "groundling", "serve", str(options.run), "--port", "0", "--name", "model"]
    groundling += ["--threads", str(N_THREADS), "--max-concurrency", str(N_STREAMS), "--timeout", "600"]
    n_ctx = str(min(trained.window, trained.model.config.n_ctx))
    plans = [
        (
            f"groundling {form}{' drafts' if drafts == 'auto' else ''}",
            [*groundling, "--weights", form, "--drafts", drafts],
        )
        for form, drafts in (("fp32", "none"), ("bf16", "none"), ("int8", "none"), ("int8", "auto"))
    ]
    for kind in ("f16", "q8_0"):
        gguf.write(trained, root / f"{kind}.gguf", kind)
        command = [
            sys.executable,
            "-c",
            LLAMA_SERVER,
            str(root / f"{kind}.gguf"),
            n_ctx,
            str(N_STREAMS),
            str(N_THREADS),
        ]
        plans.append((f"llama.cpp {kind}", command))
    chosen = [plan for plan in plans if not options.only or any(word in plan[0] for word in options.only)]
    return [Contestant(name, command, "model") for name, command in chosen]


def main() -> None:
    """Run all contestants and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder of a trained model")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each text")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="run contestants with one of these words in their names")
    options = parser.parse_args()
    trained = open_trained(options.run)
    tokens = trained.train_tokens()
    assert tokens is not None, "the run has no text"
    starts = [i * (tokens.n_tokens - options.prompt_tokens) // N_QUEUED for i in range(N_QUEUED)]
    prompts = [tokens.tokens[start : start + options.prompt_tokens].tolist() for start in starts]
    with tempfile.TemporaryDirectory() as directory:
        servers = contestants(options, trained, Path(directory))
        try:
            for server in servers:  # compile, fill caches
                asyncio.run(server._ask(prompts[:2], 4, 2))
            for _ in range(options.rounds):
                for server in servers:
                    server.round(prompts, options.tokens)
        finally:
            for server in servers:
                server.close()
    facts = machine.describe(N_THREADS, runtime.resolve(RuntimeConfig(device="cpu", compile="off")).device)
    for server in servers:
        print(json.dumps(server.line() | {"threads": N_THREADS, "cpu": facts["cpu"], "flags": facts["flags"]}))


if __name__ == "__main__":
    main()

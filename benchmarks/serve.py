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
from pathlib import Path
from typing import Any

import httpx

from groundling import machine, runtime
from groundling.interop import gguf
from groundling.interop.trained import Trained, open_trained
from groundling.runtime import RuntimeConfig

N_THREADS = 2
ONCE = httpx.Limits(max_keepalive_connections=0)
"""llama.cpp closes connections that a client might use again."""
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


class Contestant:
    """A server in a process of its own, and what was measured of it."""

    def __init__(self, name: str, command: list[str], model: str) -> None:
        self.name, self.model = name, model
        self.one: list[float] = []
        self.many: list[float] = []
        self.first_token_s: list[list[float]] = []
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT)
        self.address = self._address()

    def _address(self) -> str:
        while self.process.poll() is None:
            self.log.seek(0)
            if found := re.search(r"(?:address |weights\): )(http://[\d.:]+)", self.log.read()):
                return found[1]
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
        async with httpx.AsyncClient(base_url=self.address, timeout=600, limits=ONCE) as client:
            turn = asyncio.Semaphore(at_once)

            async def one(seed: int, prompt: list[int]) -> tuple[int, float]:
                async with turn:
                    return await self._stream(client, prompt, seed, n_tokens)

            started = time.perf_counter()
            answers = await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(prompts)))
            seconds = time.perf_counter() - started
        return sum(n for n, _ in answers) / seconds, [first for _, first in answers]

    async def _stream(self, client: httpx.AsyncClient, prompt: list[int], seed: int, n: int) -> tuple[int, float]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": n, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        body |= {"min_p": 0.0, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
        started, first, n_tokens = time.perf_counter(), math.nan, 0
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, (self.name, (await answer.aread())[:500])
            async for line in answer.aiter_lines():
                content = line.removeprefix("data: ")
                if not content or content == "[DONE]":
                    continue
                piece = json.loads(content)
                if math.isnan(first) and any(choice["text"] for choice in piece["choices"]):
                    first = time.perf_counter() - started
                n_tokens = (piece.get("usage") or {}).get("completion_tokens", n_tokens)
        return n_tokens, first

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
    tokens = trained.folder and trained.folder.tokens("train")
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

"""llama.cpp reading a GGUF file, in a process of its own: what is wrong with a file may abort that process.

Invariant: importing this module loads nothing heavy, because `python -m groundling.interop.llama_server` is that
process; it ends when its standard input does, and so not later than the one who started it.

The program is the server inside the wheel of `xllamacpp`, spoken to over HTTP on this machine's own address. It runs
in embedding mode without pooling, which gives the final hidden states of every position of a prompt at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from groundling.errors import RunFailed

ADDRESS = "groundling: listening on http://"
"""Begins the line by which the process says where it listens."""


class LlamaCpp:
    """llama.cpp with one model loaded."""

    def __init__(self, address: str, log: IO[bytes]) -> None:
        self._address = address
        self._log = log

    @classmethod
    @contextlib.contextmanager
    def reading(cls, path: Path, n_ctx: int, threads: int, exact: bool) -> Iterator[LlamaCpp]:
        """llama.cpp while the block runs. `exact` keeps keys and values in fp32, which by default are fp16.

        Raises `RunFailed` if it cannot load the file, or ends before the block does.
        """
        command = [sys.executable, "-m", __name__, str(path), str(n_ctx), str(threads), str(int(exact))]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.decode(errors="replace").startswith(ADDRESS):
                        yield cls(line.decode().removeprefix(ADDRESS).strip(), log)
                        return
                raise RunFailed(f"llama.cpp cannot load what was written ({_cause(log)})")
            finally:
                process.stdin.close()
                process.stdout.close()
                process.wait()

    def tokenize(self, text: str) -> list[int]:
        """The ids that a prompt of this text becomes."""
        return cast("list[int]", self._post("/tokenize", {"content": text, "add_special": True})["tokens"])

    def greedy(self, prompt: Sequence[int] | str, n_tokens: int) -> list[int]:
        """The likeliest tokens after a prompt, up to the first `<|endoftext|>`, which is left out."""
        request = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0.0, "return_tokens": True}
        return cast("list[int]", self._post("/completion", request)["tokens"]) if n_tokens else []

    def log_probs(self, prompt: Sequence[int], drawn: int) -> dict[int, float]:
        """The log-probability of every id after a prompt, which is shorter than the context.

        llama.cpp gives none with an answer that is `<|endoftext|>` or a part of a character, so `drawn`, any token
        that is neither, is made its answer; that changes nothing in them.
        """
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 1 << 30, "logit_bias": [[drawn, 1e9]]}
        first = self._post("/completion", request)["completion_probabilities"][0]
        return {entry["id"]: _number(entry["logprob"]) for entry in first["top_logprobs"]}

    def hidden(self, tokens: Sequence[int]) -> list[list[float]]:
        """The final hidden states (T, n_embd) of some ids, after the last LayerNorm."""
        answer = self._post("/embeddings", {"content": tokens, "embd_normalize": -1})
        return [[_number(element) for element in state] for state in answer[0]["embedding"]]

    def _post(self, path: str, request: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self._address)
        try:
            connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            raise RunFailed(f"llama.cpp ended while it read what was written ({_cause(self._log)})") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RunFailed(f"llama.cpp refuses what was written ({answer['error']['message']})")
        return answer


def _number(element: float | None) -> float:
    """Of JSON, which has none for what is no number."""
    return math.nan if element is None else element


def _cause(log: IO[bytes]) -> str:
    """The line in which llama.cpp says what went wrong: a broken assertion, else its first error, else its last."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    asserted = [line for line in lines if "GGML_ASSERT" in line]
    errors = [line.partition(" E ")[2] for line in lines if " E " in line]
    return " ".join([*asserted, *errors, *lines[-1:], "it said nothing"][0].split())


def main(path: str, n_ctx: str, threads: str, exact: str) -> None:
    """Serve a file until the standard input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = params.n_batch = params.n_ubatch = int(n_ctx)  # a window is one batch
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.n_gpu_layers = 0
    params.warmup = False
    params.port = 0  # any that is free
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    if exact == "1":
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(ADDRESS + server.listening_address.removeprefix("http://"), flush=True)
    sys.stdin.read()
    os._exit(0)  # the server's own end sometimes waits for ever for one of its threads


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A real server after a storm of clients: the next honest one is answered, and nothing of the others stays."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

SLOTS, QUEUE = 8, 24
N_STREAMS = 200
GROWTH_BYTES = 2 << 20
"""Of resident memory, by which each of the later storms would have to end higher before it counts as a leak.

Between two storms it was seen to fall by 1.3 MB and to rise by 3.7 MB without one: which of the allocator's arenas hold
what was freed is chance, so that a single difference proves nothing.
"""

COUNTED = """
import collections, gc, json, os, signal, sys

def count(*_):
    gc.collect()
    kinds = collections.Counter(f"{type(each).__module__}.{type(each).__name__}" for each in gc.get_objects())
    with open(os.environ["COUNTS"] + ".part", "w") as file:
        json.dump(kinds, file)
    os.replace(file.name, os.environ["COUNTS"])

signal.signal(signal.SIGUSR1, count)
from groundling.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""`groundling`, which at a signal writes down how many objects of each type there are."""


class Served:
    """A server's process, looked at from outside."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], counts: Path) -> None:
        self.address, self.process, self._counts = address, process, counts
        host, port = address.removeprefix("http://").split(":")
        self.place = host, int(port)

    def ask(self, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.address}/v1/completions", json=body(seed=1, **more), timeout=60)

    def idle(self) -> bool:
        health = httpx.get(f"{self.address}/health").json()
        return (health["running"], health["waiting"]) == (0, 0)

    def n_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        n_pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return n_pages * os.sysconf("SC_PAGE_SIZE")

    def objects(self) -> Counter[str]:
        """Of what a request is made of, how many there are, by type."""
        self._counts.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        eventually(self._counts.exists)
        kinds = Counter[str](json.loads(self._counts.read_text()))
        ours = re.compile(r"groundling\.(serving|generation)\.|_asyncio\.(Task|Future)$|uvicorn\.")
        return Counter({kind: n for kind, n in kinds.items() if ours.match(kind)})


def body(**more: Any) -> dict[str, Any]:
    return {"model": "bottles", "prompt": "9 green", "max_tokens": 8, **more}


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for the server to come to something; fails after twenty seconds."""
    due = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.01)


@contextmanager
def served(run: Path, folder: Path) -> Iterator[Served]:
    flags = ["--port", "0", "--max-concurrency", str(SLOTS), "--max-queue", str(QUEUE), "--no-page"]
    said, counts = folder / "said", folder / "counts"
    with said.open("wb") as errors, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", COUNTED, "serve", str(run), *flags],
            stdout=log,
            stderr=errors,
            env=os.environ | {"COUNTS": str(counts)},
        )
    try:
        address = re.compile(r"http://[\d.:]+(?=/v1)")
        eventually(lambda: process.poll() is not None or address.search(said.read_text()) is not None)
        found = address.search(said.read_text())
        assert found, said.read_text()
        yield Served(found[0], process, counts)
    finally:
        process.kill()
        process.wait()


def post(**more: Any) -> bytes:
    content = json.dumps(body(**more)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


MALFORMED = [
    (b"\x16\x03\x01\x00\xa5\r\n\r\n", 400),
    (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{", 413),
    (post(prompt="9 green " * 10_000), 400),
    (post(prompt="9" * (2 << 20)), 413),
    (post(logprobs=20, n=16, max_tokens=4096), 400),
    (post(temperature="hot"), 400),
    (post().replace(b"{", b"[", 1), 400),
]


@asynccontextmanager
async def connected(
    place: tuple[str, int], request: bytes, receive_bytes: int | None = None
) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that has sent a request; it is cut when it is left. `receive_bytes` makes its buffers small."""
    with socket.socket() as connection:
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, place)
        reader, writer = await asyncio.open_connection(sock=connection, limit=receive_bytes or 1 << 16)
        writer.write(request)
        try:
            yield reader
        finally:
            writer.transport.abort()


async def storm(place: tuple[str, int]) -> Counter[int]:
    """Everybody at once; how many were answered with which status."""
    statuses = Counter[int]()
    over = asyncio.Event()

    async def status(reader: asyncio.StreamReader) -> int:
        said = int((await reader.readline()).split()[1])
        statuses[said] += 1
        return said

    async def read(number: int) -> None:
        async with connected(place, post(max_tokens=60, stream=True, seed=number)) as reader:
            said, rest = await status(reader), await reader.read()
            assert (said == 200) == (b"data: [DONE]" in rest)

    async def read_slowly(number: int) -> None:
        request = post(max_tokens=200, stream=True, logprobs=5, seed=number)
        async with connected(place, request, receive_bytes=2048) as reader:
            await status(reader)
            while await reader.read(512):
                await asyncio.sleep(0)

    async def vanish(number: int) -> None:
        request = post(max_tokens=4000, n=1 + number % 2, stream=number % 3 > 0, logprobs=2)
        async with connected(place, request) as reader:
            if number % 3:
                await status(reader)

    async def never_read(number: int) -> None:
        async with connected(place, post(max_tokens=400, stream=True, logprobs=20, n=2), receive_bytes=2048):
            await over.wait()

    async def ask_for_much(number: int) -> None:
        async with connected(place, post(max_tokens=200, n=8, logprobs=20, echo=True, seed=number)) as reader:
            await status(reader)
            await reader.read()

    async def err(number: int) -> None:
        request, expected = MALFORMED[number // 8 % len(MALFORMED)]
        async with connected(place, request) as reader:
            with suppress(ConnectionError):  # a body that is not read to its end may cost its sender the answer
                assert await status(reader) == expected

    kinds = [read, read_slowly, vanish, never_read, ask_for_much, err, read, read]
    async with asyncio.TaskGroup() as silent:
        async with asyncio.TaskGroup() as others:
            for number in range(N_STREAMS):
                kind = kinds[number % len(kinds)]
                (silent if kind is never_read else others).create_task(kind(number))
        over.set()
    return statuses


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells of another process's memory so")
def test_after_a_storm_nothing_of_it_stays(run: Path, tmp_path: Path) -> None:
    with served(run, tmp_path) as server:
        expected = server.ask().json()["choices"]
        eventually(lambda: "groundling.serving.engine.Ticket" not in server.objects())
        n_files, objects = server.n_files(), server.objects()
        resident: list[int] = []
        for _ in range(4):
            statuses = asyncio.run(storm(server.place))
            assert statuses[429] > N_STREAMS // 4
            assert statuses[200] > SLOTS
            assert not statuses[500]
            answer = server.ask()
            assert (answer.status_code, answer.json()["choices"]) == (200, expected)
            eventually(server.idle)
            eventually(lambda: server.n_files() == n_files)
            eventually(lambda: server.objects() == objects)
            resident.append(server.resident_bytes())
        # The first storm is the warm-up: it makes the system back the keys and values of all slots with memory.
        assert min(after - before for before, after in pairwise(resident[1:])) < GROWTH_BYTES, resident
    assert "Traceback" not in (tmp_path / "said").read_text()

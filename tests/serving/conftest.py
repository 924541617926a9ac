"""A server on a free port of this machine, with a network of a few thousand parameters behind it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from torch import Tensor

from groundling.corpus.documents import Document
from groundling.corpus.tokenizer import Tokenizer, train_tokenizer
from groundling.generation.decoder import Chunk, TorchDecoder
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.serving.access_log import AccessLog
from groundling.serving.demo import Subject, add_page
from groundling.serving.engine import Engine
from groundling.serving.openai_api import Served
from groundling.serving.server import ServerConfig, make_app, make_server

N_CTX = 32
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@dataclass
class Running:
    """A server and what is known of it."""

    url: str
    engine: Engine
    client: httpx.Client
    log: list[str] = field(default_factory=list)

    def complete(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": "bottles", "prompt": "ten green", **body})

    def last_logged(self) -> dict[str, Any]:
        return json.loads(self.log[-1])  # type: ignore[no-any-return]


def connect(server: Running, source: str = "127.0.0.1", timeout: float = 10) -> socket.socket:
    """A connection to a server, from an address of this machine."""
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout, (source, 0))


def heard(connection: socket.socket) -> bytes:
    """What a server says until it closes the connection."""
    said = b""
    with suppress(ConnectionResetError):  # it does not wait for what is still on the way to it
        while block := connection.recv(1 << 16):
            said += block
    return said


def raw(server: Running, *parts: bytes, **settings: Any) -> bytes:
    """What a server says to these bytes, which it may refuse before their end."""
    with connect(server, **settings) as connection:
        with suppress(ConnectionResetError, BrokenPipeError):
            for part in parts:
                connection.sendall(part)
        return heard(connection)


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for another thread to come to something; fails after ten seconds."""
    due = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.005)


def idle(server: Running) -> bool:
    return server.engine.n_running == 0 and server.engine.n_waiting == 0


@contextmanager
def held_up(server: Running) -> Iterator[None]:
    """No pass of the engine comes to its end before this does."""
    go_on, read = threading.Event(), server.engine.decoder.read

    def wait(chunks: Sequence[Chunk]) -> list[Tensor]:
        assert go_on.wait(30)
        return read(chunks)

    server.engine.decoder.read = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        go_on.set()


@contextmanager
def streaming(server: Running, user: str, source: str = "127.0.0.1") -> Iterator[None]:
    """A text that is being written, or waits."""
    n_before = server.engine.n_running + server.engine.n_waiting
    body = json.dumps({"model": "bottles", "max_tokens": 4000, "stream": True, "user": user}).encode()
    with connect(server, source) as connection:
        connection.sendall(HEAD % len(body) + body)
        eventually(lambda: server.engine.n_running + server.engine.n_waiting > n_before)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Document.from_text("b", lambda: "ten green bottles, hanging on the wall " * 9)], 270)


@pytest.fixture(scope="session")
def network(tokenizer: Tokenizer) -> GPT2:
    """A random one that never ends a text by itself."""
    torch.manual_seed(0)
    model = GPT2(GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=N_CTX, n_vocab=tokenizer.n_vocab)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 5
        model.head_weight[:, 0] = 0
        model.head_weight[tokenizer.end_of_text_id] = torch.eye(16)[0] * -20
    return model


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def serve(network: GPT2, tokenizer: Tokenizer) -> Serve:
    """Starts a server; for a `with` statement."""

    @contextmanager
    def start(
        n_slots: int = 4,
        max_queue: int = 20,
        timeout_s: float = 60,
        subject: Subject | None = None,
        model: GPT2 = network,
        **settings: Any,
    ) -> Iterator[Running]:
        engine = Engine(TorchDecoder(model, N_CTX, n_slots), tokenizer, max_queue)
        listener = socket.create_server(("127.0.0.1", 0))
        config = ServerConfig(drain_s=settings.pop("drain_s", 1), **settings)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        key = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        running = Running(url, engine, httpx.Client(base_url=url, timeout=30, headers=key))
        served = Served(engine, tokenizer, "bottles", N_CTX, int(time.time()), timeout_s)

        def page(app: FastAPI, access_log: AccessLog) -> Callable[[], None]:
            return add_page(app, access_log, served, subject, config.api_key) if subject else lambda: None

        server = make_server(make_app(served, config, running.log.append, page), config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield running
        finally:
            running.client.close()
            server.should_exit = True
            thread.join(timeout=30)
            listener.close()
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="session")
def running(serve: Serve) -> Iterator[Running]:
    """One server for the tests that leave it as it was."""
    with serve() as server:
        yield server

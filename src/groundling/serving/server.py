"""The one process: API, health, metrics and page before one engine.

Invariant: SIGTERM and SIGINT let answers that have begun come to their end, for `drain_s` at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from groundling import __version__
from groundling.serving.access_log import AccessLog
from groundling.serving.api_errors import ApiError, dead, wrong
from groundling.serving.connections import MAX_CONNECTIONS, Protocol
from groundling.serving.engine import Engine
from groundling.serving.guard import Guard, Limits
from groundling.serving.openai_api import Served, make_api

KEEP_ALIVE_S = 15
LAST_WORDS_S = 5
"""For telling those whose texts were cut off, after the time for ending them."""
MAX_UNPRINTED = 10_000
"""Lines of the log that wait for their reader; later ones are lost."""
BACKLOG = 256
"""Connections taken at a time: with `MAX_CONNECTIONS`, fewer than the files that a process may have open."""


@dataclass(frozen=True)
class ServerConfig:
    """What one server allows."""

    api_key: str | None = None
    drain_s: int = 30
    log_prompts: bool = False
    hosts: frozenset[str] | None = None
    """Names that it answers to, beside this machine's own for itself; None for any."""
    max_connections: int = MAX_CONNECTIONS
    max_connections_per_address: int = 0
    """0 for any number."""
    limits: Limits = field(default_factory=Limits)


AddPage = Callable[[FastAPI, AccessLog], Callable[[], None]]
"""Puts a page behind an application's routes, which notes its visitors' texts in the log; returns what ends the page's
own streams."""


def no_page(app: FastAPI, access_log: AccessLog) -> Callable[[], None]:
    """The API alone."""
    return lambda: None


def make_app(
    served: Served,
    config: ServerConfig,
    log: Callable[[str], None],
    add_page: AddPage = no_page,
) -> FastAPI:
    """The application; the engine is closed when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.engine.close)

    app = FastAPI(
        title="Groundling",
        version=__version__,
        summary=f"Continues texts with {served.name}; the routes under /v1 are OpenAI's.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the client's Host header
    )
    access_log = AccessLog(log, config.log_prompts)
    registry = access_log.metrics.registry
    registry.register(EngineCollector(served.engine))
    app.add_middleware(Guard, limits=config.limits, api_key=config.api_key, hosts=config.hosts, access_log=access_log)
    app.include_router(make_api(served))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "Decoding has failed."}})
    async def health() -> dict[str, Any]:
        """Whether texts can be written."""
        if served.engine.failure:
            raise dead(served.engine.failure)
        return {"status": "ok", "running": served.engine.n_running, "waiting": served.engine.n_waiting}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Counters in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return _validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        answer = wrong(str(error.detail), status=error.status_code).response()
        answer.headers.update(error.headers or {})
        return answer

    app.state.cut_off, app.state.stop_page = served.engine.cut_off, add_page(app, access_log)  # for `Server`
    return app


def _validation_error(error: RequestValidationError) -> ApiError:
    """One sentence for the first thing that is wrong with a body."""
    first = max(error.errors(), key=_says_much)
    if first["type"] == "json_invalid":
        return wrong(f"the body is not JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})")
    if first["type"] == "model_attributes_type" and isinstance(first.get("input"), (str, bytes)):
        return wrong("the body is not said to be JSON: send it with Content-Type: application/json")
    where = [str(part) for part in first["loc"][1:]]  # after "body"
    name = where[0] if where else None
    if first["type"] == "extra_forbidden":
        where.append(str(first["ctx"]["name"]))
        return wrong(f"there is no setting {'.'.join(where)[:100]!r} here: leave it out", where[0])
    return wrong(f"{name or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}", name)


def _says_much(error: Mapping[str, Any]) -> tuple[object, ...]:
    """How well this one, of all that pydantic finds, says what is wrong: where a value may be of several kinds it finds
    something with each. A list of the wrong length is also no text, and no list of ids; otherwise the kind is meant
    that fits the furthest."""
    return (
        error["type"] in ("too_long", "too_short"),
        tuple(part for part in error["loc"] if isinstance(part, int)),
        error["type"] not in ("string_type", "list_type"),
    )


class EngineCollector:
    """The engine's numbers, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        counts, n_prompt_tokens = self.engine.counts, self.engine.stats.n_prompt_tokens
        endings = CounterMetricFamily("groundling_texts", "Texts that have ended, by why.", labels=["ending"])
        for ending, n in dict(counts.endings).items():
            endings.add_metric([ending], n)
        return [
            GaugeMetricFamily("groundling_running", "Texts being written.", value=self.engine.n_running),
            GaugeMetricFamily("groundling_waiting", "Texts in the queue.", value=self.engine.n_waiting),
            CounterMetricFamily("groundling_prompt_tokens", "Tokens of prompts.", value=n_prompt_tokens),
            CounterMetricFamily("groundling_tokens", "Tokens written.", value=counts.n_tokens),
            endings,
        ]


class Server(uvicorn.Server):
    """Ends what would never end by itself before it waits for what will, and cuts off what takes too long."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_s: int) -> None:
        super().__init__(config)
        self._state, self._drain_s = app.state, drain_s
        self.last: Callable[[], None] = lambda: None
        """What is done when all answers have ended. uvicorn then ends the process by the signal that it has caught."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.stop_page()
        # Not left to uvicorn, which breaks off answers without a word.
        cutting = asyncio.get_running_loop().call_later(self._drain_s, self._state.cut_off)
        await super().shutdown(sockets)
        cutting.cancel()
        self.last()


def serve(served: Served, config: ServerConfig, listener: socket.socket, add_page: AddPage = no_page) -> None:
    """Answer on a bound socket until SIGINT or SIGTERM; the access log goes to standard output, a line at a time."""
    printer = Printer()
    server = make_server(make_app(served, config, printer, add_page), config)
    server.last = printer.close
    server.run([listener])


class Printer:
    """Prints lines in a thread of its own: who reads them slowly, or not at all, holds nobody else up."""

    def __init__(self) -> None:
        self._lines = queue.Queue[str | None](MAX_UNPRINTED)
        self._thread = threading.Thread(target=self._print, name="log", daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        """Print a line, unless too many wait."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Print what waits, unless that takes too long."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=LAST_WORDS_S)
        self._thread.join(LAST_WORDS_S)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # a full disk is no reason to serve no more
                print(line, flush=True)


def make_server(app: FastAPI, config: ServerConfig) -> Server:
    """A server for the application, not yet running."""
    protocol: Any = partial(
        Protocol, max_connections=config.max_connections, max_per_address=config.max_connections_per_address
    )
    return Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anyone can write X-Forwarded-For, and clients take turns by address
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=config.drain_s + LAST_WORDS_S,
            h11_max_incomplete_event_size=config.limits.max_header_bytes,
        ),
        app,
        config.drain_s,
    )

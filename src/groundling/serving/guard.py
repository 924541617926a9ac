"""What stands before every route: limits, hosts, the key, request ids, the access log and the metrics.

Invariant: no body longer than `max_body_bytes` is read and none for longer than `body_timeout_s`; keys are written
nowhere, and prompts only if that was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundling.serving.hosts import check_host
from groundling.serving.openai_api import Account, ApiError, wrong

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A client's own id is kept if it is this plain."""

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Limits:
    """What one request may cost before it is understood."""

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    max_header_bytes: int = 1 << 14


class Metrics:
    """Counters of requests; those of tokens and texts are the engine's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "groundling_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "groundling_completion_seconds", "Whole completions.", buckets=BUCKETS_S, registry=self.registry
        )
        self.first_token = Histogram(
            "groundling_first_token_seconds", "From request to first token.", buckets=BUCKETS_S, registry=self.registry
        )


class Guard:
    """An ASGI application around another."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        api_key: str | None,
        hosts: Collection[str] | None,
        metrics: Metrics,
        log: Callable[[str], None],
        log_prompts: bool,
    ) -> None:
        self.app, self.limits, self.hosts, self.metrics = app, limits, hosts, metrics
        self.log, self.log_prompts = log, log_prompts
        self._key = None if api_key is None else digest(encoded(api_key))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["client"] = (scope.get("client") or ("",))[0]
        status = 499  # no answer was begun

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = MutableHeaders(scope=message)
                more["X-Request-Id"] = request_id
                more["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            try:
                if sum(len(name) + len(value) for name, value in scope["headers"]) > self.limits.max_header_bytes:
                    raise wrong("the headers are too large: send less", status=431, code="too_large")
                if "transfer-encoding" in headers and "content-length" in headers:  # two lengths (RFC 9112, 6.1)
                    raise wrong("the request has two lengths: send one", status=400, code="two_lengths")
                if self.hosts is not None:
                    check_host(headers.get("host", ""), self.hosts)
                self._authorise(scope["path"], headers)
                receive = await self._body(scope["method"], headers, receive)
            except ApiError as error:
                await error.response()(scope, receive, answer)
                return
            await self.app(scope, receive, answer)
        except Exception:
            status = 500
            raise
        finally:
            self._note(scope, request_id, status, time.monotonic() - started, state.get("account"))

    def _authorise(self, path: str, headers: Headers) -> None:
        """Raises `ApiError` if the API is locked and the key is not the one."""
        if self._key is None or not path.startswith("/v1"):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest(encoded(key.strip())), self._key):
            raise wrong(
                "the key is missing or not this server's: send it as a bearer token", None, 401, "invalid_api_key"
            )

    async def _body(self, method: str, headers: Headers, receive: Receive) -> Receive:
        """A `receive` that gives the body, read whole, and then what comes after it. Raises `ApiError` past a limit."""
        if method in ("GET", "HEAD"):
            return receive
        limit = self.limits.max_body_bytes
        too_large = wrong(f"the body is larger than {limit:,} bytes: send less", None, 413, "too_large")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > limit:
            raise too_large
        content = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    content += message.get("body", b"")
                    if len(content) > limit:
                        raise too_large
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "the body did not come in time", "timeout_error", "timeout") from None
        whole: list[Message] = [{"type": "http.request", "body": bytes(content), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float, account: Account | None) -> None:
        """One line of JSON, and the metrics."""
        route = scope.get("route")
        self.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": request_id,
            "client": scope["state"]["client"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if account is not None:
            facts |= {"prompt_tokens": account.n_prompt_tokens, "tokens": account.n_tokens}
            if account.first_token_s is not None:
                facts["first_token_s"] = round(account.first_token_s, 4)
                self.metrics.first_token.observe(account.first_token_s)
            if account.ending is not None:
                self.metrics.latency.observe(seconds)
            if self.log_prompts:
                facts["prompts"] = account.prompts
        self.log(json.dumps(facts, ensure_ascii=True))


def digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing takes the same time for all."""
    return hashlib.sha256(key).digest()


def encoded(key: str) -> bytes:
    """A key as it stands in a header, whatever bytes it was given in."""
    return key.encode("utf-8", "surrogateescape")

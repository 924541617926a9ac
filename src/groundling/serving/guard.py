"""What stands before every route: limits, hosts, the key, request ids, the access log and the metrics.

Invariant: no body longer than `max_body_bytes` is read and none for longer than `body_timeout_s`; keys are written
nowhere, and prompts only if that was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundling.serving.access_log import AccessLog
from groundling.serving.api_errors import ApiError, defect, wrong
from groundling.serving.hosts import check_host, client_of

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A client's own id is kept if it is this plain."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost before it is understood."""

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    max_header_bytes: int = 1 << 14


class Guard:
    """An ASGI application around another."""

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, hosts: Collection[str] | None, access_log: AccessLog
    ) -> None:
        self.app, self.limits, self.hosts, self.access_log = app, limits, hosts, access_log
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
        address = (scope.get("client") or ("",))[0]
        state |= {"address": address, "client": client_of(address), "request_id": request_id}
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
            if status == 499:
                await defect().response()(scope, receive, answer)
            status = 500
            raise  # whoever runs the server sees where
        finally:
            self._note(scope, status, time.monotonic() - started)

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

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """One line of JSON, and the metrics."""
        path = getattr(scope.get("route"), "path", "other")
        self.access_log.metrics.requests.labels(path, str(status)).inc()
        facts = {"method": scope["method"], "path": scope["path"][:200], "status": status}
        state = scope["state"]
        self.access_log.note(state, facts, seconds, state.get("account"))


def digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing takes the same time for all."""
    return hashlib.sha256(key).digest()


def encoded(key: str) -> bytes:
    """A key as it stands in a header, whatever bytes it was given in."""
    return key.encode("utf-8", "surrogateescape")

"""Which of Gradio's routes a visitor reaches: those that the page needs, and no other.

Invariant: no route that reads a file by its path, fetches an address, takes an upload or calls a function past the
queue is reachable; what is not listed here is answered as if there were no page.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundling.serving.guard import digest, encoded
from groundling.serving.hosts import host_of

READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
    r"|/(?:assets|static)/(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
    r"|/gradio_api/(?:info|startup-events|theme\.css|queue/data|heartbeat/[a-z0-9]{1,32})"
)
SESSION = re.compile(r"[a-z0-9]{1,32}")
WRITE = re.compile(r"/gradio_api/(?:queue/join|cancel|reset)/?")


def is_of_the_page(method: str, path: str) -> bool:
    """Whether the page needs this."""
    pattern = READ if method in ("GET", "HEAD") else WRITE if method == "POST" else None
    return pattern is not None and pattern.fullmatch(path) is not None


class PageMount(Mount):
    """Gradio's application, of which only the page's own routes are there."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or not is_of_the_page(scope["method"], scope["path"]):
            return Match.NONE, {}
        return super().matches(scope)


class OwnOrigin:
    """An application for its own pages: others' may not send to it, and get no CORS header, which Gradio would give.

    Others are those of sister sites, too, and of other ports of this host, where browsers say so (Sec-Fetch-Site).

    Over plain HTTP browsers do not say where a request comes from but by its Origin (Fetch Metadata, section 2), whose
    host must then be the one that was asked. Without its port: a proxy may have another than this server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        own = host_of(f"//{headers.get('host', '')}")
        same_host = origin is None or (own is not None and host_of(origin) == own)
        own_page = same_host if site is None else site in ("same-origin", "none")
        if scope["method"] == "POST" and not own_page:
            await PlainTextResponse("Pages of other sites may not use this one.", 403)(scope, receive, send)
            return
        kept = [(name, value) for name, value in scope["headers"] if name != b"origin"]
        await self.app({**scope, "headers": kept}, receive, send)


class KnownSessions:
    """An application that hears of sessions by names as short as the page gives: Gradio keeps them for a while.

    Of one that it does not know it says so in its stream of events, and then raises: that is no failure.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            try:
                await self.app(scope, receive, send)
            except RuntimeError as error:  # Starlette's, of what was raised when the status was sent
                if not (isinstance(error.__cause__, HTTPException) and scope["path"].endswith("/queue/data")):
                    raise
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        body = await Request(scope, receive).body()
        if not _names_a_session(body):
            await PlainTextResponse("This is no session of the page.", 422)(scope, receive, send)
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()

        await self.app(scope, again, send)


def _names_a_session(body: bytes) -> bool:
    try:
        name = json.loads(body)["session_hash"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(name, str) and SESSION.fullmatch(name) is not None


class Locked:
    """An application that asks for the key as a browser does: as the password, with any name (RFC 7617)."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app, self._key = app, digest(encoded(api_key))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if hmac.compare_digest(digest(_password(scope)), self._key):
            await self.app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": 'Basic realm="Groundling: any name, and the key as password", charset="UTF-8"'}
        await PlainTextResponse("This page asks for the server's key.", 401, headers)(scope, receive, send)


def _password(scope: Scope) -> bytes:
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, credentials = given.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""

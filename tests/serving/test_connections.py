"""Connections that are too many, or say nothing, by real sockets: all of 127.0.0.0/8 is this machine's to come from."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import Mock

import h11
import pytest
from torch import Tensor

from groundling.generation.decoder import Chunk, TorchDecoder
from groundling.serving import connections
from groundling.serving import server as server_module
from groundling.serving.guard import Limits

from .conftest import HEAD, Serve, connect, eventually, heard, idle, raw


def test_a_connection_that_says_nothing_is_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.2)
    with serve() as server:
        assert raw(server) == b""
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: a\r\nX: ") == b""


def test_a_later_request_has_no_more_time_than_the_first(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.2)
    with serve() as server, connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        assert connection.recv(1) == b""


def test_a_slow_answer_is_not_taken_for_silence(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.5)
    read, started = TorchDecoder.read, time.monotonic()

    def slowly(self: TorchDecoder, chunks: Sequence[Chunk]) -> list[Tensor]:
        if time.monotonic() - started < 10:  # else who waits for it would wait for ever, too
            time.sleep(0.1)
        return read(self, chunks)

    monkeypatch.setattr(TorchDecoder, "read", slowly)
    with serve() as server:
        begun = time.monotonic()
        assert server.complete(max_tokens=12).status_code == 200
        assert time.monotonic() - begun > 2 * connections.HEADER_TIMEOUT_S


HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
OTHER = "127.0.0.2"


def refusal(said: bytes, status: int) -> dict[str, Any]:
    """The error of an answer that is refused and closed."""
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 %d " % status)
    assert {b"retry-after: 1", b"connection: close", b"content-type: application/json"} <= set(lines)
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture
def held() -> Iterator[ExitStack]:
    """Keeps connections until the test is over."""
    with ExitStack() as stack:
        yield stack


def test_a_full_server_says_so_and_how_it_is(serve: Serve, held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "N_SPARE", 1)
    monkeypatch.setattr(connections, "SPARE_TIMEOUT_S", 0.2)
    with serve(max_connections=3) as server:
        kept = [held.enter_context(connect(server)) for _ in range(3)]
        assert refusal(raw(server, MODELS), 503)["code"] == "full"
        assert b'"status":"ok"' in raw(server, HEALTH.replace(b"Connection: close\r\n", b""))
        assert b"groundling_running" in raw(server, HEALTH.replace(b"/health", b"/metrics"))
        spare = held.enter_context(connect(server))
        assert refusal(raw(server), 503)["code"] == "full"  # who says nothing hears it too
        assert heard(spare) == b""  # before the time that others have
        kept[0].sendall(HEALTH)
        assert b'"status":"ok"' in heard(kept[0])  # who was there before is not harmed
        assert raw(server, MODELS[:-2] + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_one_address_cannot_take_what_is_for_others(serve: Serve, held: ExitStack) -> None:
    with serve(max_connections_per_address=2) as server:
        for _ in range(2):
            held.enter_context(connect(server, OTHER))
        assert refusal(raw(server, source=OTHER), 429)["code"] == "too_many_connections"
        assert refusal(raw(server, HEALTH, source=OTHER), 429)["type"] == "rate_limit_error"
        assert server.complete().status_code == 200


def test_without_a_bound_one_address_may_have_many(serve: Serve, held: ExitStack) -> None:
    with serve() as server:
        for _ in range(connections.MAX_PER_ADDRESS + 1):
            held.enter_context(connect(server))
        assert b"HTTP/1.1 200 " in raw(server, HEALTH)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    heard(connection)
    connection.close()


def fall_silent(connection: socket.socket) -> None:
    heard(connection)
    connection.close()


BODY = json.dumps({"model": "bottles", "max_tokens": 4000, "stream": True}).encode()
STREAM = HEAD % len(BODY) + BODY


@pytest.mark.parametrize("die", [socket.socket.close, reset, half_close, fall_silent])
def test_however_a_connection_dies_its_place_is_free(
    die: Callable[[socket.socket], None], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(server_module, "KEEP_ALIVE_S", 0.1)
    with serve(max_connections_per_address=1, timeout_s=0.2, limits=Limits(body_timeout_s=0.1)) as server:
        for said in 3 * [b"", b"GET /hea", HEALTH, STREAM[:-10], STREAM, b"nonsense\r\n\r\n"]:
            connection = connect(server, OTHER)
            connection.sendall(said)
            die(connection)
            eventually(lambda: raw(server, HEALTH, source=OTHER).startswith(b"HTTP/1.1 200 "))
        eventually(lambda: idle(server))


def test_who_reads_nothing_is_gone_too(serve: Serve, held: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what is written for it can be neither sent nor, by closing, forgotten."""
    monkeypatch.setattr(connections, "UNREAD_TIMEOUT_S", 0.2)
    with serve(max_connections_per_address=1) as server:
        connection = held.enter_context(connect(server, OTHER))
        # The answers are more than the system's buffers hold.
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 2000)
        eventually(lambda: raw(server, HEALTH, source=OTHER).startswith(b"HTTP/1.1 200 "))


def test_who_reads_slowly_is_waited_for() -> None:
    """As long as some of what is unread was read each time; asyncio itself tells only of what was read to its end."""
    loop, transport = Mock(), Mock()
    protocol = object.__new__(connections.Protocol)
    protocol.loop, protocol.transport, protocol.flow = loop, transport, Mock()
    transport.get_write_buffer_size.return_value = 1000
    protocol.pause_writing()
    for n_unread in (900, 10):
        (seconds, then, *arguments), _ = loop.call_later.call_args
        assert seconds == connections.UNREAD_TIMEOUT_S
        transport.get_write_buffer_size.return_value = n_unread
        then(*arguments)
        assert not transport.abort.called
    assert loop.call_later.call_count == 3
    (_, then, *arguments), _ = loop.call_later.call_args
    then(*arguments)
    assert transport.abort.called


def test_an_answer_to_what_is_no_request_is_whole() -> None:
    """h11 would refuse to close after half of one, and a server that ends closes what is still unread."""
    protocol = object.__new__(connections.Protocol)
    protocol.conn, protocol.transport, protocol.cycle = h11.Connection(h11.SERVER), Mock(), None
    protocol.send_400_response("")
    protocol.conn.send(h11.ConnectionClosed())
    assert b"no valid HTTP request" in b"".join(call.args[0] for call in protocol.transport.write.call_args_list)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_a_body_that_cannot_be_read_is_answered_once(
    serve: Serve, method: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The application has the request by then; an answer to HEAD has no body."""
    request = method + b" /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n"
    with serve() as server:
        said = raw(server, request)
        assert server.complete(max_tokens=1).status_code == 200
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1") == 1
    assert (b"valid HTTP" in said) == (method == b"GET")
    assert "Traceback" not in capfd.readouterr().err
    assert "asyncio" not in {record.name for record in caplog.records}  # which tells of errors of the connection's own


def test_a_flood_is_told_and_leaves_nothing(serve: Serve, held: ExitStack) -> None:
    with serve(max_connections=20, max_connections_per_address=10) as server:
        many = [held.enter_context(connect(server, OTHER)) for _ in range(200)]
        codes = [refusal(heard(connection), 429)["code"] for connection in many[10:]]
        assert codes == ["too_many_connections"] * 190
        assert server.complete().status_code == 200
        for connection in many:
            connection.close()
        eventually(lambda: raw(server, HEALTH, source=OTHER).startswith(b"HTTP/1.1 200 "))

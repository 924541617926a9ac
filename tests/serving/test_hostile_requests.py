"""Requests made to harm: refused, and the next honest one is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Running, connect, raw


@pytest.fixture(autouse=True)
def honest_afterwards(running: Running) -> Iterator[None]:
    yield
    assert running.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize("settings", [{"top_p": 5e-324}, {"top_p": 1e-46, "top_k": 2}, {"min_p": 1}, {"seed": 1.0}])
def test_numbers_at_the_edges_are_carried_out(settings: dict[str, Any], running: Running) -> None:
    assert running.complete(max_tokens=2, **settings).status_code == 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40"),
        ({"logprobs": 20, "max_tokens": 4096, "n": 4}, "ask for fewer"),
        ({"n": 16, "prompt": ["ten"] * 16}, "a client may have 14"),
    ],
)
def test_what_would_take_too_much_is_refused(settings: dict[str, Any], words: str, running: Running) -> None:
    answer = running.complete(**settings)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_two_lengths_are_refused_and_the_connection_closed(running: Running) -> None:
    """A proxy that believed the other one would take the rest for the next client's request."""
    body = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = raw(running, head % len(body) + body)
    assert said.startswith(b"HTTP/1.1 400")
    assert said.count(b"HTTP/1.1") == 1
    assert b"two lengths" in said


@pytest.mark.parametrize("request_line", [b"GET /health", b"GET / HTTP/1.1\r\nHost : a", b"\x16\x03\x01\x00\xa5"])
def test_what_is_no_http_is_refused_in_the_same_shape(request_line: bytes, running: Running) -> None:
    head, _, body = raw(running, request_line + b"\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_breaks_off_its_form_after_the_answer_is_no_defect(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")  # it does not wait for the body
        connection.sendall(b"no chunk\r\n")
        while connection.recv(1 << 16):
            pass
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_no_answer_leads_to_the_host_that_a_client_names(running: Running) -> None:
    answer = running.client.post("/v1/completions/", headers={"Host": "elsewhere.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers

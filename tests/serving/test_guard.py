"""Clients that mean ill, leave, read slowly or come in numbers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest

from groundling.serving.guard import Limits

from .conftest import HEAD, Running, Serve, connect, eventually, heard, held_up, idle, raw, streaming

KEY = "sk-secret-of-this-test"


def test_a_long_body_is_refused_whether_or_not_it_says_so(serve: Serve) -> None:
    with serve(limits=Limits(max_body_bytes=1000)) as server:
        assert server.complete(prompt="x" * 1000).status_code == 413

        def chunks():  # type: ignore[no-untyped-def]
            for _ in range(20):
                yield b" " * 100

        answer = server.client.post("/v1/completions", content=chunks())
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "too_large"
        assert server.complete().status_code == 200


@pytest.mark.parametrize("length", ["-1", "1e9", "9" * 400, "0x10", "\u0661"])
def test_a_length_that_is_none_is_refused(running: Running, length: str) -> None:
    request = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()
    assert raw(running, request).split(b" ")[1] in (b"400", b"413")


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    with serve(limits=Limits(body_timeout_s=0.2)) as server:
        request = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{"
        assert b" 408 " in raw(server, request).split(b"\r\n")[0]


def test_no_header_says_who_a_client_is(serve: Serve) -> None:
    with serve() as server:
        server.client.get("/health", headers={"X-Forwarded-For": "203.0.113.9"})
        eventually(lambda: bool(server.log))
        assert server.last_logged()["client"] == "127.0.0.1"


def test_only_whole_completions_have_a_latency(serve: Serve) -> None:
    with serve(n_slots=1, max_queue=1, timeout_s=0.2) as server:
        assert server.complete(max_tokens=4000).status_code == 408
        assert server.complete(max_tokens=1).status_code == 200
        eventually(lambda: len(server.log) == 2)
        assert "groundling_completion_seconds_count 1.0" in server.client.get("/metrics").text


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
def test_long_headers_are_refused(running: Running, end: bytes) -> None:
    said = raw(running, b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + end)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["code"] == "too_large"


def test_the_key_locks_the_api_and_is_logged_nowhere(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(api_key=KEY) as server:
        assert server.complete().status_code == 200
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}):
            answer = httpx.post(f"{server.url}/v1/completions", json={"model": "bottles"}, headers=wrong)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for nearly in (KEY[:-1], KEY + "x", KEY.upper(), KEY.encode().hex()):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {nearly}"})
            assert answer.status_code == 401
            assert nearly not in answer.text
        assert httpx.get(f"{server.url}//v1/models").status_code in (401, 404)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert KEY not in "".join(server.log)
    assert KEY not in "".join(capfd.readouterr())


def test_the_log_has_no_prompts_unless_they_are_asked_for(serve: Serve) -> None:
    for asked in (False, True):
        with serve(log_prompts=asked) as server:
            server.client.headers["X-Request-Id"] = "mine-1"
            answer = server.complete(prompt="hanging wall", max_tokens=3)
            assert answer.headers["x-request-id"] == "mine-1"
            eventually(lambda: bool(server.log))  # a line is written after its answer
            facts = server.last_logged()
            assert ("hanging" in server.log[-1]) == asked
            assert (facts["request_id"], facts["status"], facts["tokens"]) == ("mine-1", 200, 3)
            assert facts["path"] == "/v1/completions"
            assert facts["prompt_tokens"] > 0 < facts["first_token_s"] <= facts["seconds"]
            server.client.headers["X-Request-Id"] = "evil\\u001b[31m id"
            assert server.complete().headers["x-request-id"] != server.client.headers["X-Request-Id"]


def test_a_full_queue_says_so_at_once(serve: Serve) -> None:
    with serve(n_slots=1, max_queue=1) as server, held_up(server), streaming(server, "a"), streaming(server, "b"):
        answer = server.complete()
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_no_name_gives_a_client_more_room(serve: Serve) -> None:
    with serve(n_slots=1, max_queue=2) as server, held_up(server), streaming(server, "a"), streaming(server, "b"):
        answer = server.complete(user="c")
        assert answer.status_code == 429
        assert "of this client" in answer.json()["error"]["message"]
        with streaming(server, "a", "127.0.0.2"):
            assert server.engine.n_waiting == 2


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_bounded(serve: Serve, stream: bool) -> None:
    with serve(timeout_s=0.2) as server:
        answer = server.complete(max_tokens=4000, stream=stream)
        eventually(lambda: idle(server))
        if stream:
            *_, error, done = [line for line in answer.text.splitlines() if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
            assert done == "data: [DONE]"
        else:
            assert answer.status_code == 408
            eventually(lambda: len(server.log) == 1)
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            with pytest.raises(openai.APIStatusError, match="ask for fewer tokens"):  # and it does not ask again
                client.completions.create(model="bottles", prompt="ten", max_tokens=4000)
            eventually(lambda: len(server.log) > 1)
            assert len(server.log) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_says_nothing_is_not_waited_for(
    serve: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundling.serving.openai_api.READING_S", 0.1)
    with serve(timeout_s=0.1) as server, held_up(server):
        if stream:
            with pytest.raises(httpx.RemoteProtocolError):
                server.complete(stream=True)
        else:
            assert server.complete().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve: Serve, stream: bool) -> None:
    body = json.dumps({"model": "bottles", "max_tokens": 4000, "n": 3, "stream": stream}).encode()
    head = HEAD % len(body)
    with serve(n_slots=2) as server:
        connection = connect(server)
        connection.sendall(head + body)
        eventually(lambda: server.engine.n_running == 2)
        connection.close()
        eventually(lambda: idle(server))
        assert server.engine.counts.endings == {"cancelled": 3}
        assert server.complete().status_code == 200


@pytest.mark.parametrize("more", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_client_that_sends_more_and_then_leaves_frees_its_slot_too(serve: Serve, more: bytes) -> None:
    """Uvicorn stops reading where more comes than one request, and with it would see no end."""
    body = json.dumps({"model": "bottles", "max_tokens": 4000, "n": 3}).encode()
    with serve(n_slots=2) as server:
        connection = connect(server)
        connection.sendall(HEAD % len(body) + body)
        eventually(lambda: server.engine.n_running == 2)
        connection.sendall(more)
        time.sleep(0.05)  # so that it comes by itself
        connection.close()
        eventually(lambda: idle(server))
        assert server.engine.counts.endings == {"cancelled": 3}


def test_requests_that_were_sent_ahead_are_answered_in_turn(serve: Serve) -> None:
    body = json.dumps({"model": "bottles", "max_tokens": 3}).encode()
    with serve() as server, connect(server) as connection:
        with held_up(server):
            connection.sendall(HEAD % len(body) + body)
            eventually(lambda: server.engine.n_running == 1)
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\nGET /health")
            time.sleep(0.05)
        connection.sendall(b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        said = heard(connection)
    places = [said.index(words) for words in (b"text_completion", b"max_model_len", b'"status":"ok"')]
    assert said.count(b"HTTP/1.1 200 ") == 3
    assert places == sorted(places)


def test_who_does_not_read_is_left(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundling.serving.openai_api.READING_S", 0.1)
    body = json.dumps({"model": "bottles", "max_tokens": 4000, "n": 3, "stream": True, "logprobs": 20}).encode()
    head = HEAD % len(body)
    with serve(timeout_s=0.5) as server:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            host, port = server.url.removeprefix("http://").split(":")
            connection.connect((host, int(port)))
            connection.sendall(head + body)
            eventually(lambda: server.engine.n_running > 0)
            eventually(lambda: idle(server))
            eventually(lambda: bool(server.log))
        assert server.complete().status_code == 200


def test_two_hundred_streams_at_once(serve: Serve) -> None:
    """Some are read to their end, some slowly, some are left; the next honest request is answered."""

    async def one(client: httpx.AsyncClient, number: int) -> int:
        body = {"model": "bottles", "prompt": "wall", "max_tokens": 20, "stream": True, "seed": number}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            n_lines = 0
            async for line in answer.aiter_lines():
                n_lines += bool(line)
                if number % 3 == 1 and n_lines == 3:
                    break
                if number % 3 == 2:
                    await asyncio.sleep(0.001)
            return answer.status_code

    async def all_of_them(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    with serve(n_slots=8, max_queue=400) as server:
        before = server.complete(seed=1).json()["choices"]
        assert asyncio.run(all_of_them(server.url)) == [200] * 200
        eventually(lambda: idle(server))
        assert server.complete(seed=1).json()["choices"] == before


def test_ending_lets_answers_come_to_their_end(serve: Serve) -> None:
    answers: list[httpx.Response] = []
    with serve(n_slots=2, drain_s=20) as server:
        client = httpx.Client(base_url=server.url, timeout=30)
        body = {"model": "bottles", "max_tokens": 300, "seed": 1}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
        thread.start()
        eventually(lambda: server.engine.n_running == 1)
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 300
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_who_is_cut_off_by_the_end_is_told_so(serve: Serve) -> None:
    """In the API's own words, and as a stream ends."""
    answers: dict[bool, httpx.Response] = {}

    def ask(streamed: bool) -> None:
        body = {"model": "bottles", "max_tokens": 4096, "seed": 1, "stream": streamed}
        answers[streamed] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)

    with serve(n_slots=2, drain_s=0) as server:
        threads = [threading.Thread(target=ask, args=(streamed,)) for streamed in (False, True)]
        for thread in threads:
            thread.start()
        eventually(lambda: server.engine.n_running == 2)
    for thread in threads:
        thread.join()
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["code"] == "cancelled"
    *_, last, done = (line for line in answers[True].text.splitlines() if line)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert done == "data: [DONE]"


def test_other_origins_are_not_let_in(running: Running) -> None:
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answers = [
        running.client.options("/v1/completions", headers=preflight),
        running.client.get("/v1/models", headers=preflight),
    ]
    assert not any(name.lower().startswith("access-control") for each in answers for name in each.headers)


@pytest.mark.parametrize(
    "path",
    ["/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/\\x"],
)
def test_no_path_leads_to_a_file(running: Running, path: str) -> None:
    answer = raw(running, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"400", b"404")
    assert b"root:" not in answer


def test_health_and_metrics(serve: Serve) -> None:
    with serve() as server:
        assert server.client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        server.complete(max_tokens=7)
        server.complete(n=0)
        lines = server.client.get("/metrics").text.splitlines()
        assert "groundling_tokens_total 7.0" in lines
        assert 'groundling_texts_total{ending="length"} 1.0' in lines
        assert 'groundling_requests_total{route="/v1/completions",status="400"} 1.0' in lines
        assert any(line.startswith("groundling_first_token_seconds_count 1.0") for line in lines)


def test_health_says_when_decoding_has_failed(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """So does every answer, of which none is asked for again, and the log says where."""
    with serve() as server:
        server.engine.decoder.read = None  # type: ignore[method-assign, assignment]
        for answer in (server.complete(), server.client.get("/health"), server.complete()):
            assert answer.status_code == 503
            assert answer.headers["X-Should-Retry"] == "false"
            assert "Retry-After" not in answer.headers
            assert answer.json()["error"]["code"] == "dead"
            assert "decoding has failed (TypeError(" in answer.json()["error"]["message"]
    assert "Traceback" in caplog.text

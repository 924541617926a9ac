"""What is kept of a text, whether a program asked for it or a visitor of the page."""

from __future__ import annotations

import builtins
import json
import sys
import threading
import time
from typing import Any

import pytest

from groundling.serving import server as server_module
from groundling.serving.demo import Subject

from .conftest import Running, Serve
from .test_guard import eventually, idle

SUBJECT = Subject("bottles", "", [], None, "", "")


def test_a_log_that_nobody_reads_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A full pipe blocks who writes to it."""
    read = threading.Event()
    monkeypatch.setattr(server_module, "LAST_WORDS_S", 5)
    monkeypatch.setattr(server_module, "MAX_UNPRINTED", 3)
    monkeypatch.setattr(builtins, "print", lambda line, flush: (read.wait(10), sys.stdout.write(f"{line}\n")))
    printer = server_module.Printer()
    began_s = time.monotonic()
    for line in "abcdefghij":
        printer(line)
    assert time.monotonic() - began_s < 5
    read.set()
    printer.close()
    assert capsys.readouterr().out.split()[:3] == ["a", "b", "c"]


def ask(server: Running, prompt: str, max_tokens: int, n: int = 1) -> None:
    """Press the page's button as its script does."""
    [write] = [each for each in server.client.get("/config").json()["dependencies"] if len(each["inputs"]) == 8]
    asked = {"fn_index": write["id"], "session_hash": "visitor", "data": [prompt, max_tokens, 1, 0, 1, 1, n, 7]}
    answer = server.client.post("/gradio_api/queue/join", json=asked, headers={"X-Request-Id": "press-1"})
    assert answer.status_code == 200


def listen(server: Running) -> None:
    """Read what the page is told until its text has ended."""
    with server.client.stream("GET", "/gradio_api/queue/data?session_hash=visitor") as events:
        assert any(json.loads(line[5:])["msg"] == "process_completed" for line in events.iter_lines() if line)


def texts_of(server: Running) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, server.log) if "tokens" in line]


def counted(server: Running, name: str) -> float:
    [line] = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith(f"{name}_count ")]
    return float(line.split()[1])


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_visitors_texts_are_noted_as_a_programs_are(serve: Serve, log_prompts: bool) -> None:
    with serve(subject=SUBJECT, log_prompts=log_prompts) as server:
        ask(server, "hanging wall", max_tokens=10, n=2)
        listen(server)
        server.complete(prompt="hanging wall", max_tokens=10, n=2, seed=7)
        eventually(lambda: len(texts_of(server)) == 2)
        page, api = texts_of(server)
        assert page["request_id"] == "press-1"
        assert page["page"] == "write"
        assert [json.loads(line)["path"] for line in server.log if "press-1" in line and "path" in line] == [
            "/gradio_api/queue/join"
        ]
        for name in ("client", "prompt_tokens", "tokens", "endings"):
            assert page[name] == api[name], name
        assert page["tokens"] == 20
        assert page["endings"] == ["length", "length"]
        for line in (page, api):
            assert 0 < line["first_token_s"] <= line["seconds"]
            assert line.get("prompts") == (["hanging wall"] if log_prompts else None)
        assert ("hanging" in "".join(server.log)) == log_prompts
        assert counted(server, "groundling_first_token_seconds") == 2
        assert counted(server, "groundling_completion_seconds") == 2


def test_texts_that_were_left_or_not_taken_are_noted_as_such(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundling.serving.demo.UNREAD_S", 0.1)
    with serve(n_slots=1, max_queue=1, subject=SUBJECT) as server:
        ask(server, "wall", max_tokens=400, n=2)  # and do not listen
        eventually(lambda: server.engine.n_running + server.engine.n_waiting == 2)
        assert server.complete().status_code == 429
        eventually(lambda: idle(server) and len(texts_of(server)) == 2)
        refused, left = texts_of(server)
        assert (refused["status"], refused["endings"], refused["tokens"]) == (429, [], 0)
        assert (left["page"], left["endings"]) == ("write", ["cancelled", "cancelled"])
        assert counted(server, "groundling_completion_seconds") == 0

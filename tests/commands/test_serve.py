"""`groundling serve` as an operator runs it: a process, an address, a signal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from groundling.cli import main
from groundling.commands import serve
from groundling.commands.model_options import open_model, open_run
from groundling.commands.page_subject import subject_of


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server in a process of its own, and the process."""
    command = [sys.executable, "-m", "groundling", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://[\d.:]+(?=/v1)", line):
                assert said.count("warning: no page, which needs the package gradio") == ("PYTHONPATH" in environment)
                yield found[0], process
                break
        else:
            raise AssertionError(f"no address was printed: {process.communicate()}")
    finally:
        process.kill()
        process.communicate()


def ask(address: str, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": "9 green", "max_tokens": 8, "temperature": 0, **more}
    return httpx.post(f"{address}/v1/completions", json=body, timeout=60)


def test_it_writes_what_sample_writes_and_ends_when_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", str(run), "--prompt", "9 green", "--temperature", "0", "--max-tokens", "8", "--json"]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)["text"]
    with served(str(run), "--drain", "5") as (address, process):
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "bottles"
        answer = ask(address, "bottles")
        assert answer.json()["choices"][0]["text"] == expected
        page = httpx.get(f"{address}/", timeout=60).text
        assert "trained from scratch on bottles.txt" in page
        assert "The four losses" in page
        process.send_signal(signal.SIGTERM)
        log, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert [json.loads(line)["status"] for line in log.splitlines()] == [200, 200, 200]
    assert "green" not in log


def test_it_serves_an_exported_folder_under_a_name_and_a_key(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert main(["export", str(run), "--format", "hf", "--no-verify", "--out", str(folder)]) == 0
    with served(str(folder), "--name", "mine", "--no-page", GROUNDLING_API_KEY="sesame") as (address, _):
        assert httpx.get(address).status_code == 404
        assert ask(address, "mine").status_code == 401
        key = {"Authorization": "Bearer sesame"}
        answer = httpx.post(f"{address}/v1/completions", json={"model": "mine"}, headers=key, timeout=60)
        assert answer.status_code == 200
    assert main(["serve", str(folder), "--port", "0", "--no-page", "--drafts", "text"]) == 2
    options = SimpleNamespace(run=str(folder), device="cpu", threads=0, weights="bf16", drafts="none")
    sentence = subject_of(open_model(options), "mine").sentence
    assert re.fullmatch(r"A GPT-2 with [\d,]+ parameters\.", sentence)  # of what it was trained nothing is known
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "run" / "identity.json").write_text("{")
    options.run = str(tmp_path / "run")
    assert ", trained on bottles.txt, with Groundling" in subject_of(open_run(options), "mine").sentence


@pytest.mark.parametrize(
    ("arguments", "alone", "hosts"),
    [
        ([], True, {"127.0.0.1"}),
        (
            ["--allowed-host", "example.org", "--allowed-host", "B.example"],
            True,
            {"127.0.0.1", "example.org", "b.example"},
        ),
        (["--host", "0.0.0.0"], False, None),
        (["--host", "0.0.0.0", "--allowed-host", "example.org"], False, {"0.0.0.0", "example.org"}),
        (["--host", "2001:DB8:0:0::5", "--allowed-host", "example.org"], False, {"2001:db8::5", "example.org"}),
        (["--allowed-host", "FD00:0::5", "--allowed-host", "[fd00::6]"], True, {"127.0.0.1", "fd00::5", "fd00::6"}),
    ],
)
def test_which_names_it_answers_to(arguments: list[str], alone: bool, hosts: set[str] | None) -> None:
    """Beside this machine's own for itself; any, where other machines reach it and none was named."""
    assert serve._config(serve._options(["runs/bottles", *arguments]), None, alone).hosts == hosts


@pytest.mark.parametrize(
    ("arguments", "alone", "bound"),
    [
        ([], True, 0),
        (["--host", "0.0.0.0"], False, 64),
        (["--host", "0.0.0.0", "--max-connections-per-address", "0"], False, 0),
        (["--max-connections-per-address", "3"], True, 3),
    ],
)
def test_how_many_connections_an_address_may_have(arguments: list[str], alone: bool, bound: int) -> None:
    config = serve._config(serve._options(["runs/bottles", *arguments]), None, alone)
    assert config.max_connections_per_address == bound


def test_it_answers_to_its_own_names_and_to_so_many_connections(run: Path) -> None:
    arguments = ["--host", "0.0.0.0", "--allowed-host", "example.org"]
    with served(str(run), "--no-page", *arguments) as (address, _), ExitStack() as held:
        address = address.replace("0.0.0.0", "127.0.0.1")
        for status, name in ((200, "localhost"), (200, "Example.org:80"), (421, "evil.example")):
            assert httpx.get(f"{address}/v1/models", headers={"Host": name}).status_code == status, name
        for _ in range(64):
            held.enter_context(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))))
        assert httpx.get(f"{address}/health").status_code == 429


def test_without_gradio_it_says_so_and_serves_the_api(run: Path, tmp_path: Path) -> None:
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError(name=__name__)")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    with served(str(run), PYTHONPATH=os.pathsep.join(paths)) as (address, process):
        assert ask(address, "bottles").status_code == 200
        assert httpx.get(address).status_code == 404
        process.send_signal(signal.SIGTERM)
        log, _ = process.communicate(timeout=60)
    assert log.count("\n") == 2


def test_it_goes_on_when_nobody_reads_its_log(run: Path) -> None:
    with served(str(run), "--no-page") as (address, process), httpx.Client(base_url=address) as client:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert [client.get("/health").status_code for _ in range(3)] == [200] * 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM  # which uvicorn passes on when it is done
        assert "Traceback" not in process.stderr.read()
        process.stdout = None  # so that nothing more is read of it


def test_what_cannot_be_served_is_said_at_once(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def unknown(host: str, *more: Any, **settings: Any) -> Any:  # at once, where a resolver may take its time
        if host == "no.such.host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **settings)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, words in (
        (["--port", str(taken.getsockname()[1])], "Address already in use"),
        (["--port", "70000"], "--port is 70000: give a number from 0 to 65,535"),
        (["--host", "no.such.host.invalid"], "cannot be listened on"),
        (["--max-concurrency", "0"], "--max-concurrency is 0"),
        (["--timeout", "0"], "--timeout is 0"),
        (["--api-key", " "], "the API key is empty"),
        (["--api-key", "clé"], "not plain ASCII"),
        (["--max-connections-per-address", "-1"], "--max-connections-per-address is -1"),
        (["--port", "0", "--allowed-host", "https://a.example"], "--allowed-host is 'https://a.example': give a name"),
        (["--port", "0", "--allowed-host", "a.example:443"], "without scheme or port"),
    ):
        assert main(["serve", str(run), *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    taken.close()
    assert main(["serve", "no/such/run", "--port", "0"]) == 2
    assert "no/such/run" in capsys.readouterr().err

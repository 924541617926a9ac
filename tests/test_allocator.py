"""How a command starts: again with the allocator's settings, once and visibly, and without what it does not use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from groundling import allocator
from groundling.cli import main
from groundling.runtime import cpp_compiler

TRAIN = ["train", "--preset", "penny", "--corpus", "-", "--tokenizer", "train:300", "--max-steps", "1"]
SMALL = ["--model.n_layer", "1", "--model.n_embd", "8", "--evaluation.final", "none", "--sampling.max_tokens", "1"]
ON_CPU = ["--device", "cpu"]
TEXT = "".join(f"{n} green bottles, hanging on the wall;\n" for n in range(99, 0, -1))

unset = pytest.mark.skipif(allocator.why_not() is not None, reason=f"no restart here: {allocator.why_not()}")


def groundling(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "groundling", *words]
    environment = os.environ | settings
    return subprocess.run(command, cwd=folder, input=TEXT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run's folder, and what its command said, every module that it imported included."""
    folder = tmp_path_factory.mktemp("trained")
    done = groundling(folder, *TRAIN, *SMALL, *ON_CPU, "--out", "run", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr.splitlines()


@unset
def test_train_starts_again_once_and_reads_its_input_then(trained: tuple[Path, list[str]]) -> None:
    run, said = trained
    lines = [line for line in said if line.startswith("allocator:")]
    assert len(lines) == 1
    assert f"{allocator.SWITCH}={allocator.OFF}" in lines[0]
    assert json.loads((run / "record.json").read_text())["allocator"] == allocator.SETTINGS


@pytest.mark.skipif(cpp_compiler() is None, reason="without a C++ compiler, training needs PyTorch's")
def test_nothing_waits_for_what_is_not_used(trained: tuple[Path, list[str]]) -> None:
    """PyTorch's compiler and the algebra that it needs take seconds to import, and nothing is compiled here."""
    run, said = trained
    sampled = groundling(run, "sample", ".", *ON_CPU, "--max-tokens", "1", PYTHONPROFILEIMPORTTIME="1")
    assert sampled.returncode == 0, sampled.stderr
    for lines, needed in ((said, {"torch", "matplotlib.figure"}), (sampled.stderr.splitlines(), {"torch"})):
        imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
        assert needed <= imported
        assert not imported & {"torch._dynamo", "torch._inductor", "sympy", "matplotlib.pyplot", "transformers"}


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings with which a process begins again."""
    begun: list[str] = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: begun.append(environment[allocator.VARIABLE]))
    monkeypatch.setattr(sys, "argv", ["/somewhere/groundling", "train"])
    for name in (allocator.VARIABLE, allocator.SWITCH, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    return begun


@unset
@pytest.mark.parametrize(
    ("settings", "in_use"),
    [
        ({allocator.SWITCH: allocator.OFF}, None),
        ({allocator.VARIABLE: "glibc.malloc.arena_max=3"}, "glibc.malloc.arena_max=3"),
        ({"LD_PRELOAD": "libjemalloc-that-is-not-there.so"}, None),
    ],
)
def test_what_the_user_has_set_stays(
    settings: dict[str, str],
    in_use: str | None,
    restarts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    allocator.restart(["train"])
    assert restarts == []
    assert capsys.readouterr().err == ""
    assert allocator.in_use() == in_use


@unset
def test_other_settings_of_glibc_stay_beside_ours(restarts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(allocator.VARIABLE, "glibc.pthread.rseq=1")
    allocator.restart(["train"])
    assert restarts == [f"glibc.pthread.rseq=1:{allocator.SETTINGS}"]
    monkeypatch.setenv(allocator.VARIABLE, restarts[0])
    allocator.restart(["train"])
    assert len(restarts) == 1, "once"


@unset
def test_a_refusal_keeps_its_exit_code(tmp_path: Path) -> None:
    done = groundling(tmp_path, "train", "--corpus", "nowhere.txt")
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["allocator", "groundling"]


def test_help_and_quick_commands_do_not_start_again(tmp_path: Path) -> None:
    for words in (["train", "--help"], ["--help"], ["sample", "nowhere"]):
        assert "allocator:" not in groundling(tmp_path, *words).stderr


def test_a_program_that_calls_main_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
    assert main(["train", "--corpus", "nowhere.txt"]) == 2
    monkeypatch.setattr(sys, "argv", ["/somewhere/their_program.py", "train", "--corpus", "nowhere.txt"])
    assert main() == 2


def test_doctor_shows_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundling.commands.doctor import allocator_line

    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    monkeypatch.setenv(allocator.SWITCH, allocator.OFF)
    assert f"{allocator.SWITCH}={allocator.OFF}" in allocator_line()
    monkeypatch.setenv(allocator.VARIABLE, "glibc.malloc.arena_max=3")
    assert "glibc.malloc.arena_max=3" in allocator_line()

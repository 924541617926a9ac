"""Every command in README.md and docs/ runs as it is written, but for what would make it long."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from groundling.cli import COMMANDS, main
from groundling.corpus.plays import render_play
from groundling.serving.completions import CompletionRequest
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

from .conftest import new_cache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

THE_TWO = {"make train", "make test"}
"""Run by everyone who follows the README; `make test` is what runs this."""

MAKE_TARGETS = {"make penny": "groundling train --preset penny --out runs/penny"}
"""Other targets that the pages name, and the command that each is."""

SERVED = {"make demo"}
"""Targets that do not return: tests below and in commands/test_serve.py do what they do."""

SHORT = shlex.split(
    "--max-steps 2 --model.n_layer 1 --model.n_head 2 --model.n_embd 16 --windows.batch_size 2"
    " --windows.micro_batch_size 0 --runtime.compile off --sampling.max_tokens 3 --evaluation.final none"
)
"""Added to commands that train: a smaller network, for two steps."""


def commands() -> list[str]:
    """The lines that begin with `groundling` or `make` in the pages' code blocks, comments cut off."""
    found: dict[str, None] = {}
    for page in PAGES:
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.splitlines():
                command = line.removeprefix("$ ").partition("  #")[0].strip()
                if command.startswith(("groundling ", "make ")):
                    found[command] = None
    return list(found)


@pytest.fixture(scope="module", autouse=True)
def workplace(unsynced: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The files that the commands name: a novel, a folder of texts, a finished run, a checkpoint of nanoGPT's kind."""
    path = tmp_path_factory.mktemp("readme")
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    patch.setenv("GROUNDLING_CACHE", str(new_cache(path)))
    Path("texts").mkdir()
    for name, play in {"my-novel.txt": "hamlet", "texts/one.txt": "macbeth", "texts/two.txt": "othello"}.items():
        Path(name).write_text(render_play(play))
    Path("page.txt").write_text(render_play("hamlet")[:1200])
    Path("scene.txt").write_text(render_play("macbeth")[:300])
    Path("names.txt").write_text("HAMLET:\nHORATIO:\n")
    Path("my-novel.txt").write_text(Path("my-novel.txt").read_text()[:8_000])  # a short one: it is evaluated whole
    assert main(["train", "--corpus", "my-novel.txt", "--out", "runs/gpt2", *SHORT]) == 0
    write_checkpoint(Path("nanogpt.pt"))
    yield
    patch.undo()


def write_checkpoint(path: Path) -> None:
    """The finished run's weights as nanoGPT would have saved them."""
    model, _, _ = load_model(find_checkpoint(Path("runs/gpt2")), torch.device("cpu"))
    torch.save({"model": model.state_dict(), "model_args": {"n_layer": 1, "n_head": 2}}, path)


@pytest.mark.parametrize("command", [c for c in commands() if c not in THE_TWO | SERVED])
def test_command(command: str) -> None:
    words = shlex.split(MAKE_TARGETS.get(command, command))
    assert words[0] == "groundling", f"{command}: only `make train` and `make test` are excepted"
    if words[1] in ("train", "estimate"):
        words += SHORT
    if "--resume" in words and "--out" in words:
        run = words[words.index("--out") + 1]
        if not Path(run).exists():
            assert main(["train", "--corpus", "my-novel.txt", "--out", run, *SHORT, "--max-steps", "1"]) == 0
    assert main(words[1:]) == 0


def programs() -> list[str]:
    """The Python programs of the page on exports."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("program", programs(), ids=lambda program: program.split()[1].rstrip(","))
def test_programs_that_read_an_export(program: str, capfd: pytest.CaptureFixture[str]) -> None:
    exported = re.findall(r"gpt2-shakespeare[\w.-]*", program)[0]
    if not Path(exported).exists():
        assert main(shlex.split(next(each for each in commands() if f"--out {exported}" in each))[1:]) == 0
    exec(program, {})
    assert capfd.readouterr().out.strip()


def test_the_program_of_the_page_on_serving_is_openais_own_client() -> None:
    """That it is answered, and what with, is in serving/test_openai_api.py."""
    [program] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.M | re.S)
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai.resources.Completions, "create", lambda self, **settings: asked.append(settings))
        with pytest.raises(AttributeError, match="choices"):
            exec(program, {})
    assert set(asked[0]) <= set(CompletionRequest.model_fields)


FOREIGN = {"--bf16", "--ctx-size", "--hypothesis-profile", "--max-model-len", "--parallel", "--strict"}
"""Options of other programs."""


def test_options_that_the_pages_name_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    known = set(FOREIGN)
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known |= options_in(capsys.readouterr().out)
    known |= {option for program in (ROOT / "benchmarks").glob("*.py") for option in options_in(program.read_text())}
    for page in [*ROOT.glob("[CR]*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:  # not LOG.md
        assert options_in(page.read_text()) - known == set(), page


def options_in(text: str) -> set[str]:
    return {option.rstrip(".-") for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)}


def test_make_targets_are_what_they_are_said_to_be() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target, command in MAKE_TARGETS.items():
        name = target.removeprefix("make ")
        assert re.search(rf"^{name}: .*\n\t\$\(call run_preset,{name}\)$", makefile, re.M), target
        assert f"$(BIN)/{command.replace(name, '$(1)')};" in makefile, target


def install_echo(folder: Path, mark: str) -> None:
    """An environment for make, as if it were installed, with an echo in the place of the command."""
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / mark).touch()
    command = folder / "venv" / "bin" / "groundling"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    (folder / "pyproject.toml").touch()
    os.utime(folder / "pyproject.toml", (0, 0))


def make(folder: Path, target: str) -> str:
    """What the commands of a target are called with."""
    command = ["make", "--silent", "-f", str(ROOT / "Makefile"), "VENV=venv", target]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_make_demo_trains_if_need_be_and_serves(tmp_path: Path) -> None:
    install_echo(tmp_path, ".installed-serve")
    (tmp_path / "venv" / ".installed").touch()
    assert make(tmp_path, "demo").splitlines() == ["train --preset penny --out runs/penny", "serve runs/penny"]
    (tmp_path / "runs" / "penny").mkdir(parents=True)
    (tmp_path / "runs" / "penny" / "identity.json").touch()
    assert make(tmp_path, "demo").splitlines() == ["train --resume --out runs/penny", "serve runs/penny"]
    (tmp_path / "runs" / "penny" / "record.json").touch()
    assert make(tmp_path, "demo") == "serve runs/penny"


def test_make_begins_a_run_and_then_goes_on_with_it(tmp_path: Path) -> None:
    """Never a second folder: the recipe as make runs it, with an echo in the place of the command."""
    install_echo(tmp_path, ".installed")

    def called() -> str:
        return make(tmp_path, "penny")

    assert called() == "train --preset penny --out runs/penny"
    (tmp_path / "runs" / "penny").mkdir(parents=True)
    (tmp_path / "runs" / "penny" / "identity.json").touch()
    assert called() == "train --resume --out runs/penny"


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 8
    assert set(commands()) >= THE_TWO


def test_nothing_in_the_project_is_large() -> None:
    listed = os.popen(f"git -C {shlex.quote(str(ROOT))} ls-files -z").read().split("\0")
    assert "README.md" in listed, "git does not say what the project holds"
    assert [name for name in listed if name and (ROOT / name).stat().st_size > 1_000_000] == []

"""Wrong input gets one sentence (what, where, what to do), exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groundling import machine
from groundling.cli import main
from groundling.commands import doctor
from groundling.commands.arguments import parse_run, run_parser
from groundling.commands.session import check_gpu_memory
from groundling.errors import ConfigError
from groundling.optim.optimizer import OptimConfig
from groundling.optim.schedule import ScheduleConfig
from groundling.runtime import Runtime
from groundling.training import checkpoint
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.stopping import StoppingConfig

from .bottles import SMALL, files_but_cache, train

WRONG: list[tuple[list[str], str]] = [
    (["--corpus", "nowhere.txt"], "nowhere.txt"),
    (["--corpus", "~nobody/novel.txt"], "~nobody/novel.txt"),
    (["--corpus", "empty.txt"], "empty"),
    (["--corpus", "binary.txt"], "binary.txt"),
    (["--corpus", "one.txt", "--tokenizer", "gpt2"], "token"),
    (["--corpus", "one.txt"], "train:257"),
    (["--corpus", "fifo"], "fifo"),
    (["--corpus", "/dev/zero"], "/dev/zero"),
    (["--corpus", "tiny-shakespear"], "tiny-shakespeare"),
    (["--tokenizer", "train:20"], "257"),
    (["--tokenizer", f"train:{10**20}"], "too large"),
    (["--tokenizer", "train:" + "9" * 5000], "too large"),
    (["--tokenizer", "nothing.json"], "nothing.json"),
    (["--tokenizer", "~nobody/nothing.json"], "~nobody/nothing.json"),
    (["--heldout-fraction", "1.5"], "heldout"),
    (["--preset", "gpt3"], "gpt2"),
    (["--config", "nothing.yaml"], "there is no file nothing.yaml"),
    (["--config", "flat.yaml"], "flat.yaml sets schedule to 5"),
    (["--config", "unknown-key.yaml"], "peek"),
    (["--schedule.peek", "1"], "schedule.peek"),
    (["--windows.leng", "16"], "windows.leng"),
    (["--schedule.peak", "fast"], "schedule.peak is 'fast': give a number"),
    (["--max-minutes", "abc"], "--max-minutes is 'abc': give a number or null"),
    (["--stopping.max_minutes", "abc"], "stopping.max_minutes is 'abc': give a number or null"),
    (["--keep=many"], "--keep is 'many': give a whole number"),
    (["--windows.order", "wild"], "windows.order is 'wild': give one of permuted, shifted, sequential"),
    (["--logging.tensorboard", "maybe"], "logging.tensorboard is 'maybe': give true or false"),
    (["--prompts", "5"], "--prompts is '5': give a list"),
    (["--model", "3"], "--model reads a file of settings"),
    (["--windows.length", "64"], "n_ctx"),
    (["--windows.batch_size", "0"], "batch_size"),
    (["--windows.batch_size", f"1{'0' * 400}"], "windows.batch_size is 1000"),
    (["--model.n_head", "3"], "n_head"),
    (["--model.n_layer", "1001"], "n_layer"),
    (["--size", "7B"], "124M"),
    (["--device", "tpu"], "--device is 'tpu': give"),
    (["--dtype", "fp8"], "--dtype is 'fp8': give one of auto"),
    (["--save-every", "often"], "often"),
    (["--max-steps", "-1"], "--max-steps is -1: give"),
    (["--stopping.patience", "3"], "held-out"),
    (["--resume", "--out", "runs/nowhere"], "no run"),
    (["--resume", "--preset", "by-heart"], "by-heart"),
    (["--out", "bottles.txt"], "bottles.txt"),
    (["--out", "bottles.txt/run"], "bottles.txt"),
    (["--out", "x" * 300], "shorter"),
    (["--out"], "--out"),
    (["--resume=yes"], "--resume"),
    (["--corpus"], "--corpus needs a value"),
    (["--config", "latin1.yaml"], "latin1.yaml"),
    (["--config", "misplaced.yaml"], "misplaced.yaml sets 'out'"),
    (["--config", "undated.yaml"], "undated.yaml cannot be read: day is out of range"),
    (["--corpus", "\udcff.txt"], "is not valid UTF-8"),
    (["--seed", "18446744073709551616"], "seed"),
    (["--schedule.passes", ".inf"], "passes"),
    (["--schedule.passes", "1e308"], "schedule.passes is 1e+308: give"),
    (["--schedule.total_steps", f"1{'0' * 400}"], "schedule.total_steps is 1000"),
    (["--stopping.heldout_every", "1e308"], "stopping.heldout_every is 1e+308: give"),
    (["--stopping.overtime", "1e308"], "stopping.overtime is 1e+308: give"),
    (["--optim.eps", "0"], "optim.eps is 0.0: give 1e-30 or more"),
    (["--prompts", "\udcff"], "is not valid UTF-8"),
    (["--max-minutes", ".inf"], "--max-minutes is inf: give 0 or more"),
    (["--schedule.peak", ".nan"], "peak"),
    (["--optim.clip", ".nan"], "clip"),
    (["--optim.last_block_share", "0"], "last_block_share is 0.0: give a positive number"),
    (["--optim.turns", "0"], "turns is 0: give 1"),
    (["--stopping.target", ".nan"], "target"),
    (["--out", "runs/bottles"], "--resume"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_wrong_input_gets_one_sentence(
    workplace: Path, run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    Path("one.txt").write_text("a")
    Path("binary.txt").write_bytes(b"text\0and more")
    Path("unknown-key.yaml").write_text("schedule: {peek: 3}\n")
    Path("flat.yaml").write_text("schedule: 5\n")
    Path("undated.yaml").write_text("prompts: [2024-02-30]\n")
    Path("misplaced.yaml").write_text("out: runs/elsewhere\n")
    Path("latin1.yaml").write_bytes(b"preset: caf\xe9\n")
    if not Path("fifo").exists():
        os.mkfifo("fifo")
    before = files_but_cache(workplace)
    base = [] if "--resume" in arguments else train()
    assert main([*(base or ["train"]), *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("groundling: ")
    assert words in message
    assert not any(leak in message for leak in ("Traceback", "Errno", "Union", "Parser key", "typing."))
    assert files_but_cache(workplace) == before


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        (OptimConfig, {"beta1": 1.0}),
        (OptimConfig, {"beta2": -0.1}),
        (OptimConfig, {"momentum": 1.5}),
        (OptimConfig, {"weight_decay": -1.0}),
        (OptimConfig, {"clip": math.inf}),
        (ScheduleConfig, {"peak": 0.0}),
        (ScheduleConfig, {"peak": -1e-3}),
        (ScheduleConfig, {"warmup_steps": -1}),
        (ScheduleConfig, {"hold_fraction": 1.5}),
        (ScheduleConfig, {"floor_fraction": -0.1}),
        (StoppingConfig, {"expected_steps": 0}),
        (StoppingConfig, {"max_steps": -1}),
        (StoppingConfig, {"max_minutes": -1.0}),
        (StoppingConfig, {"patience": -1}),
        (StoppingConfig, {"overtime": -0.5}),
        (StoppingConfig, {"heldout_every": 0.0}),
        (CheckpointConfig, {"keep": 0}),
        (CheckpointConfig, {"save_every": "soon"}),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(section: type[Any], settings: dict[str, Any]) -> None:
    [name], [value] = settings, settings.values()
    with pytest.raises(ConfigError, match=rf"\.{name} is {re.escape(repr(value))}: give "):
        section(**settings)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (errno.ENOSPC, 1, "bottles: No space left on device: free the disk"),
        (errno.EDQUOT, 1, "bottles: Disk quota exceeded: free some of your share"),
        (errno.EACCES, 2, "bottles: Permission denied: give a path that you may use"),
        (errno.EROFS, 2, "bottles: Read-only file system: "),
        (errno.ENAMETOOLONG, 2, "bottles: File name too long: "),
    ],
)
def test_what_the_system_refuses_gets_one_sentence(
    number: int, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: list[str]) -> int:
        raise OSError(number, os.strerror(number), "runs/bottles")

    monkeypatch.setattr(doctor, "main", refuse)
    assert main(["doctor"]) == code
    said = capsys.readouterr().err
    assert said.startswith("groundling: ")
    assert said.count("\n") == 1
    assert words in said


def test_what_is_no_refusal_of_the_system_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: list[str]) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(doctor, "main", fail)
    with pytest.raises(OSError, match="Bad file descriptor"):
        main(["doctor"])


def test_a_reader_that_leaves_is_no_failure(run: Path) -> None:
    """As `head` does."""
    command = (
        f"{shlex.quote(sys.executable)} -m groundling sample {shlex.quote(str(run))} --max-tokens 20 -n 40 | head -c1"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_a_disk_without_room_is_said_before_a_run_is_begun(
    workplace: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run wants room for all the checkpoints that it keeps and one more, a resumed one for one."""
    config = parse_run(run_parser("train", "", "", run / "config.yaml"), [])
    one = checkpoint.n_bytes(config.model, config.optim)
    before = files_but_cache(workplace)
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: 3 * one - 1)
    assert main(train("--out", "runs/no-room", "--max-steps", "1")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "runs/no-room has 1 MiB of free disk, but checkpoints need 1: give an --out on a larger disk" in said
    assert files_but_cache(workplace) == before
    assert main(train("--out", "runs/little-room", "--max-steps", "1", "--keep", "1")) == 0
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--max-steps", "13"]
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: one - 1)
    assert main(resume) == 2
    assert "free some" in capsys.readouterr().err
    monkeypatch.setattr(machine, "free_disk_bytes", lambda path: one)
    assert main(resume) == 0


def test_a_sink_whose_package_is_missing_is_said_before_a_run_is_begun(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    before = files_but_cache(workplace)
    assert main(train("--logging.tensorboard", "true", "--out", "runs/unwatched")) == 2
    said = capsys.readouterr().err
    assert "pip install 'groundling[tensorboard]'" in said
    assert "text: " not in said
    assert files_but_cache(workplace) == before


def test_wrong_input_in_an_empty_folder_leaves_it_empty(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = str(workplace / "bottles.txt")
    for arguments in (["--stopping.patience", "3"], ["--windows.order", "sequential", "--windows.batch_size", "9999"]):
        assert main(["train", "--corpus", text, *SMALL, "--out", "runs/deep/run", *arguments]) == 2
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "RUN", "--batch-size", "-1"], "--batch-size"),
        (["evaluate", "runs"], "no checkpoint"),
        (["evaluate", "RUN", "--batch-size", "1.5"], "--batch-size is '1.5': give a whole number"),
        (["sample", "RUN", "--temperature", "1e-40"], "temperature"),
        (["sample", "RUN", "--seed", "99999999999999999999999"], "seed"),
        (["sample", "RUN", "--prompt", "\udcff"], "UTF-8"),
        (["sample", "nowhere"], "no run folder"),
        (["evaluate", "x" * 300], "shorter"),
        (["sample"], "RUN"),
        (["doctor", "--loudly"], "--loudly"),
        (["sample", "RUN", "--threads", "20000"], "threads is 20000: give 0 (one per core), or up to 1,024"),
    ],
)
def test_wrong_input_to_other_commands(
    run: Path, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run) if word == "RUN" else word for word in command]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def cut(content: bytes) -> bytes:
    return content[:-3]


def short(content: bytes) -> bytes:
    return content[:8]


def no_header(content: bytes) -> bytes:
    return bytes(4) + content[4:]


def strange_ids(content: bytes) -> bytes:
    return content[:-8] + b"\xff" * 8


@pytest.mark.parametrize("damage", [cut, short, no_header, strange_ids])
@pytest.mark.parametrize("command", [["evaluate"], ["sample", "--drafts", "text"], ["export", "--format", "hf"]])
def test_a_damaged_text_gets_one_sentence(
    run: Path,
    tmp_path: Path,
    command: list[str],
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns(".lock"))
    (damaged / "train.bin").write_bytes(damage((damaged / "train.bin").read_bytes()))
    out = ["--out", str(tmp_path / "exported")] if "export" in command else []
    assert main([command[0], str(damaged), *command[1:], *out]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("groundling: ")
    assert "train.bin" in message
    assert list(tmp_path.iterdir()) == [damaged]


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train, evaluate" in capsys.readouterr().err


def test_an_apple_gpu_is_not_given_more_tokens_than_it_computes_rightly() -> None:
    gpu = Runtime(torch.device("mps"), torch.float32, threads=1, compile=False, reasons=())
    check_gpu_memory(64, 256, gpu, "--batch-size")
    with pytest.raises(ConfigError, match="give --batch-size 64"):
        check_gpu_memory(65, 256, gpu, "--batch-size")
    check_gpu_memory(65, 256, replace(gpu, device=torch.device("cpu")), "--batch-size")

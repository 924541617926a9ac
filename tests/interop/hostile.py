"""A sound model to be spoiled, and the bounds within which each spoiled one must be refused."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import resource
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from groundling.cli import main
from groundling.interop.trained import Trained
from groundling.model.weights import to_huggingface

MAX_S = 5.0
"""Of processor time, which others on the same machine lengthen, too; what it guards against takes minutes."""
MAX_GROWTH_BYTES = 64 << 20

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_ctx": 24, "vocab_size": 301}


def write_folder(trained: Trained, path: Path) -> Path:
    """A sound Hugging Face folder."""
    path.mkdir()
    save_file(to_huggingface(trained.model), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    trained.tokenizer.save(path / "tokenizer.json")
    return path


importlib.import_module("groundling.commands.import_")  # the bounds are of the command, not of its first import


def refusal(source: object, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What `groundling import` says of it, within the bounds."""
    out = Path(str(source)).parent / "out"
    begin_peak()
    before_s, before_bytes = time.process_time(), peak_bytes()
    code = main(["import", str(source), "--out", str(out), *options])
    taken_s, grown_bytes = time.process_time() - before_s, peak_bytes() - before_bytes
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("groundling: ")
    assert said.count("\n") == 1
    assert len(said) < 700
    assert not list(out.parent.glob("*out*")), "something was left"
    assert taken_s < MAX_S
    assert grown_bytes < MAX_GROWTH_BYTES
    return said


PEAK = Path("/proc/self/clear_refs")


def begin_peak() -> None:
    """Forget the peak so far, and the memory that other tests have left free in this process; only Linux can."""
    if PEAK.exists():
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        PEAK.write_text("5")  # proc_pid_clear_refs(5): the peak resident set becomes the present one


def peak_bytes() -> int:
    if PEAK.exists():
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

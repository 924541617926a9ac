"""Metrics and where they go.

Invariant: the training loop writes names and numbers and knows no sink; a sink never changes a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from groundling.errors import CheckpointError, ConfigError
from groundling.files import write_text

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl and the terminal."""

    tensorboard: bool = False
    """Write scalars for TensorBoard into the run folder; needs the extra groundling[tensorboard]."""


def check_logging(config: LoggingConfig) -> None:
    """Raises `ConfigError` if the package of a sink is missing."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard needs a package: pip install 'groundling[tensorboard]'")


class Sink(Protocol):
    """Something that takes metrics: one call per step, evaluations in calls of their own.

    A subclass overrides only what concerns it.
    """  # `...` would make a method abstract

    def write(self, step: int, metrics: Metrics) -> None: ...

    def note(self, message: str) -> None:
        return

    def progress(self, what: str, share: float) -> None:
        return

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        return

    def sync(self) -> None:
        return

    def close(self) -> None:
        return


class Sinks:
    """Several sinks as one."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def write(self, step: int, metrics: Metrics) -> None:
        for sink in self.sinks:
            sink.write(step, metrics)

    def note(self, message: str) -> None:
        """Tell the user something that is no metric."""
        for sink in self.sinks:
            sink.note(message)

    def progress(self, what: str, share: float) -> None:
        """Say that `what` is under way and which share of it, from 0 to 1, is done."""
        for sink in self.sinks:
            sink.progress(what, share)

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        """Forget steps after the first `n_steps`, which are about to be taken again, and the losses over whole texts
        that were taken after them, unless these still hold."""
        for sink in self.sinks:
            sink.rewind(n_steps, losses_hold)

    def sync(self) -> None:
        """Bring all that was written to the disk: a checkpoint of it is about to be there."""
        for sink in self.sinks:
            sink.sync()

    def close(self) -> None:
        with contextlib.ExitStack() as all_of_them:
            for sink in self.sinks:
                all_of_them.callback(sink.close)


class JsonLines(Sink):
    """`metrics.jsonl`: one JSON object a line, full precision; numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("a", encoding="utf-8")
        self.replaceable_step, self.replaceable = -1, set[str]()

    def write(self, step: int, metrics: Metrics) -> None:
        if step == self.replaceable_step and (again := self.replaceable & metrics.keys()):
            self._keep(lambda line: line["step"] != step or not again & line.keys())
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        try:
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        except OSError as error:
            error.filename = str(self.path)  # a full disk does not say what it has no room for
            raise

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        last = n_steps - 1
        self._keep(lambda line: line["step"] <= last and (losses_hold or line["step"] < last or "train/loss" in line))
        # Evaluations after the last of them may be taken again: a step has one line of a name.
        self.replaceable = {name for line in read_lines(self.path) if line["step"] == n_steps - 1 for name in line}
        self.replaceable_step = n_steps - 1

    def _keep(self, wanted: Callable[[Metrics], bool]) -> None:
        self.file.close()
        kept = [json.dumps(line) for line in read_lines(self.path) if wanted(line)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.file = self.path.open("a", encoding="utf-8")

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every line was flushed, or `write` has said why not
            self.file.close()


class LogFile(Sink):
    """`log.txt`: what a run said that is no metric, each line with the local time, for when its terminal is gone."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", errors="backslashreplace")  # a path may be of another encoding

    def write(self, step: int, metrics: Metrics) -> None:
        return

    def note(self, message: str) -> None:
        with contextlib.suppress(OSError):  # of a full disk the metrics tell
            self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self.file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


class TensorBoard(Sink):
    """Scalars for TensorBoard; needs the extra `groundling[tensorboard]`."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made if it is not there."""
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        self.writer = SummaryWriter(directory)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def rewind(self, n_steps: int, losses_hold: bool = True) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer.close()
        self.writer = SummaryWriter(self.directory, purge_step=n_steps)

    def close(self) -> None:
        self.writer.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file; a last line cut short by a crash is left out.

    Raises `CheckpointError` if the file is gone, or for any other line that is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path}, what the run measured, is not there: restore it, or begin the run anew")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                metrics = json.loads(line)
                if type(metrics["step"]) is not int:
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise CheckpointError(f"line {number} of {path} is damaged: remove that line") from None
            yield metrics

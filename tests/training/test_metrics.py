from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from groundling.errors import CheckpointError
from groundling.training import progress as progress_module
from groundling.training.metrics import JsonLines, LogFile, Sinks, TensorBoard, read_lines
from groundling.training.progress import Terminal


def test_numbers_keep_their_precision_and_lines_their_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(0, {"train/loss": 1 / 3})
    sink.write(0, {"corpus/loss": 2.5})
    sink.close()
    assert path.read_text() == '{"step": 0, "train/loss": 0.3333333333333333}\n{"step": 0, "corpus/loss": 2.5}\n'


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(0, {"train/loss": math.nan, "train/grad_norm": math.inf})
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "train/loss": None,
        "train/grad_norm": None,
    }


def test_rewinding_drops_later_steps_and_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    for step in range(5):
        sink.write(step, {"train/loss": float(step)})
    sink.close()
    path.write_text(path.read_text() + '{"step": 5, "tra')
    sink = JsonLines(path)
    sink.rewind(3)
    sink.write(3, {"train/loss": 30.0})
    sink.close()
    assert [(line["step"], line["train/loss"]) for line in read_lines(path)] == [(0, 0), (1, 1), (2, 2), (3, 30.0)]


@pytest.mark.parametrize("line", ['{"step": 1, "train', "\0\0\0", "[]", '{"train/loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl is damaged: remove that line"):
        list(read_lines(path))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    """As when somebody deletes the folder of a run at work."""
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, what the run measured, is not there"):
        list(read_lines(tmp_path / "metrics.jsonl"))


class Full:
    """A file on a full disk: what was not written is tried again when it is closed."""

    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.write("")


def test_a_full_disk_is_said_of_the_file(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.file.close()
    lines.file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left on device") as raised:
        lines.write(0, {"train/loss": 1.0})
    lines.close()
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_sink_that_fails_to_close_leaves_no_other_open() -> None:
    class Failing(Terminal):
        def close(self) -> None:
            closed.append(True)
            raise OSError

    closed: list[bool] = []
    with pytest.raises(OSError):  # noqa: PT011
        Sinks(Failing(1), Failing(1)).close()
    assert closed == [True, True]


def test_rewinding_keeps_the_losses_after_the_last_step_until_they_are_taken_again(tmp_path: Path) -> None:
    """The loss that ended a run is taken once: a run that is resumed after it knows it already."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    lines = [(0, "train/loss", 5.0), (1, "train/loss", 4.0), (1, "corpus/loss", 3.0), (1, "heldout/loss", 7.0)]
    for step, name, loss in lines:
        sink.write(step, {name: loss})
    sink.rewind(2)
    sink.write(1, {"heldout/loss": 7.5})
    sink.write(2, {"train/loss": 2.0})
    sink.close()
    kept = [(line.pop("step"), *line.popitem()) for line in read_lines(path)]
    assert kept == [*lines[:3], (1, "heldout/loss", 7.5), (2, "train/loss", 2.0)]


def test_tensorboard_shows_what_was_written(tmp_path: Path) -> None:
    """Read back with TensorBoard's own reader; steps taken again after a rewind replace the first ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for step in range(4):
        sink.write(step, {"train/loss": float(step)})
    sink.rewind(2)
    sink.write(2, {"train/loss": 20.0})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_the_first_steps_of_a_process_do_not_count_for_the_time_that_remains(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They compile: a minute for a step that then takes a second."""
    terminal = Terminal(expected_steps=100)
    measured = {"train/loss": 1.0, "train/loss_ema": 1.0, "train/tokens_per_s": 1.0, "train/mfu": 0.5}
    for seconds, left in ((60.0, "-"), (30.0, "-"), (1.0, "1:37"), (1.0, "1:37")):
        assert terminal._line(2, {**measured, "train/step_s": seconds}).endswith(f"ETA {left}")
    terminal.rewind(0)
    assert terminal._line(2, {**measured, "train/step_s": 1.0}).endswith("ETA 1:37")


def test_the_time_that_remains_is_of_steps_that_cost_more() -> None:
    """The first five cost half of what the others do, so those are expected to take twice as long."""
    terminal = Terminal(10, lambda first, last: sum(0.5 if step < 5 else 1.0 for step in range(first, last)))
    measured = {"train/loss": 1.0, "train/loss_ema": 1.0, "train/tokens_per_s": 1.0, "train/mfu": 0.5}
    for step, seconds, left in ((0, 9.0, "-"), (1, 9.0, "-"), (2, 10.0, "2:00"), (5, 20.0, "1:20"), (9, 20.0, "0:00")):
        assert terminal._line(step, {**measured, "train/step_s": seconds}).endswith(f"ETA {left}")
    assert terminal._line(11, {**measured, "train/step_s": 20.0}).endswith("ETA 0:00")


def test_the_time_that_remains_is_no_more_than_the_run_was_given() -> None:
    terminal = Terminal(expected_steps=100, seconds_left=lambda: 42.0)
    measured = {"train/loss": 1.0, "train/loss_ema": 1.0, "train/tokens_per_s": 1.0, "train/mfu": 0.5}
    for step, seconds, left in ((0, 9.0, "-"), (1, 9.0, "-"), (2, 1.0, "0:42"), (97, 1.0, "0:02")):
        assert terminal._line(step, {**measured, "train/step_s": seconds}).endswith(f"ETA {left}")


def test_what_a_run_says_is_kept_with_its_time(tmp_path: Path) -> None:
    for said in ("begun: ...", "gone on"):
        sinks = Sinks(LogFile(tmp_path / "log.txt"))
        sinks.write(0, {"train/loss": 1.0})
        sinks.note(said)
        sinks.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["begun: ...", "gone on"]
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_no_run_for_its_log() -> None:
    """What it has no room for is said by the metrics."""
    sink = LogFile(Path("/dev/full"))
    sink.note("lost")
    sink.close()


def test_the_first_steps_of_blocks_that_join_do_not_count_for_it_either() -> None:
    """They compile anew and meet new memory."""
    terminal = Terminal(expected_steps=100)
    measured = {"train/loss": 1.0, "train/loss_ema": 1.0, "train/tokens_per_s": 1.0, "train/mfu": 0.5}
    for n_blocks, seconds, left in (
        *((4, 9.0, "-"), (4, 9.0, "-"), (4, 1.0, "1:37")),
        *((12, 60.0, "1:37"), (12, 30.0, "1:37"), (12, 1.0, "1:37")),
    ):
        line = terminal._line(2, {**measured, "train/step_s": seconds, "train/blocks": n_blocks})
        assert line.endswith(f"ETA {left}")


@pytest.mark.parametrize("width", [80, 200])
def test_the_progress_line_fits_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a first step was not finite; as drawn by rich, with the bar and the time that remains."""
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal(expected_steps=30_000)
    screen = io.StringIO()
    terminal.console = Console(file=screen, force_terminal=True, width=width)
    terminal.live = Progress(BarColumn(bar_width=8), TextColumn("{task.description}"), console=terminal.console)
    terminal.task = terminal.live.add_task("", total=30_000)
    measured = {"train/tokens_per_s": 1234.5, "train/mfu": 0.683, "train/step_s": 1.65}
    with terminal.live:
        terminal.write(0, {"train/loss": math.nan, "train/loss_ema": None, **measured})
        terminal.live.refresh()
        assert "mean -" in screen.getvalue()
        terminal.write(12_345, {"train/loss": 10.948163, "train/loss_ema": 10.95, **measured})
        terminal.progress("corpus/loss over the whole text", 0.25)
        terminal.live.refresh()
        assert "corpus/loss over the whole text: 25%" in screen.getvalue()
        terminal.write(12_345, {"train/loss": 10.948163, "train/loss_ema": 10.95, **measured})
        terminal.live.refresh()
    assert "ETA 8:05:29" in screen.getvalue()


def test_plain_lines_come_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the background, or in a log, where nothing can be drawn anew."""
    seconds = itertools.count()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    terminal = Terminal(expected_steps=100)
    measured = {
        "train/loss": 2.5,
        "train/loss_ema": 3.0,
        "train/tokens_per_s": 1.0,
        "train/mfu": 0.5,
        "train/step_s": 1.0,
    }
    for step in range(30):
        terminal.write(step, measured)
    terminal.note("a word between them")
    for share in range(12):
        terminal.progress("reading", share / 12)
    lines = capsys.readouterr().err.splitlines()
    words = [line.split()[0] for line in lines]
    assert len([word for word in words if "/100" in word]) in (3, 4, 5, 6)
    assert "0/100 loss 2.500000 mean 3.000000" in lines[0]
    assert "a word between them" in lines
    assert sum(line.startswith("reading: ") for line in lines) in (1, 2)

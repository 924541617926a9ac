"""`groundling trace` as a user meets it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from groundling.cli import main
from groundling.commands.tracing import STYLES, Tracer, standard_output, summary_line, trace_lines
from groundling.corpus.plays import render_play
from groundling.errors import UserError
from groundling.training.run_folder import RunFolder

from .bottles import SMALL, TEXT

COPIED = "27 green bottles, hanging on the wall;\nand if one should fall, 26.\n"
STRANGE = "Zebras quiz 7 vexed foxes?\n"


@pytest.fixture(scope="module")
def play(workplace: Path) -> Path:
    """A run on a packaged play."""
    folder = workplace / "runs" / "macbeth"
    arguments = ["--max-steps", "1", "--evaluation.final", "none", "--out", str(folder)]
    assert main(["train", "--corpus", "macbeth", *SMALL, *arguments]) == 0
    return folder


def traced(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["trace", *arguments]) == 0
    return capsys.readouterr().out


def test_a_copy_is_found_with_its_document_and_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(STRANGE + COPIED + STRANGE)
    found = json.loads(traced(capsys, str(run), str(file), "--json"))
    (span,) = found["spans"]
    assert COPIED.strip() in span["text"]
    assert span["count"] == 1
    assert span["place"] == {"document": "bottles.txt", "line": TEXT[: TEXT.index(COPIED)].count("\n") + 1}
    corpus = RunFolder(run).text()
    stands = corpus.train.tokens[span["position"] : span["position"] + span["length"]]
    assert corpus.tokenizer.decode(stands.tolist()) == span["text"]
    assert found["share"] == pytest.approx(span["length"] / found["n_tokens"])
    assert found["longest"] == span


def test_elsewhere_than_on_a_terminal_the_text_is_plain(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(STRANGE + COPIED)
    printed = traced(capsys, str(run), str(file))
    assert printed.startswith(STRANGE + COPIED + "\n")
    assert "\x1b" not in printed
    *_, span, summary = printed.splitlines()
    assert span.split()[:3] == [summary.split("longest ")[1].split(",")[0], "1", "2"]
    assert "bottles.txt, line 27" in span
    assert "27 green bottles" in span
    assert " % of " in summary
    assert summary.endswith("bottles.txt, line 27")


def test_a_play_is_quoted_by_act_scene_and_speaker(
    play: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = render_play("macbeth")
    start = text.index("She should have died hereafter")
    file = tmp_path / "text.txt"
    file.write_text(text[start : start + 400])
    printed = traced(capsys, str(play), str(file))
    assert printed.splitlines()[-1].endswith("from Macbeth, Act 5, Scene 5 (MACBETH)")
    (play / "places.json").unlink()  # as in a run of an earlier version
    assert traced(capsys, str(play), str(file)) == printed


def test_a_run_without_places_has_its_source_and_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(COPIED)
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("places.json", "checkpoints"))
    printed = traced(capsys, str(tmp_path / "run"), str(tmp_path / "text.txt"))
    assert printed.splitlines()[-1].endswith("from bottles.txt, line 27")
    (tmp_path / "run" / "config.yaml").unlink()
    printed = traced(capsys, str(tmp_path / "run"), str(tmp_path / "text.txt"))
    assert printed.splitlines()[-1].endswith("from the training text, line 27")


def test_the_training_text_itself_is_copied_whole(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(traced(capsys, str(run), "bottles.txt", "--json"))
    n_tokens = RunFolder(run).text().train.n_tokens  # the tail of the text is held out
    assert found["longest"] == {**found["longest"], "start": 0, "position": 0, "length": n_tokens}


def test_standard_input_is_read_and_not_kept(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set((workplace / "cache").glob("stdin*"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(COPIED.encode())))
    assert "bottles.txt, line 27" in traced(capsys, str(run), "-")
    assert set((workplace / "cache").glob("stdin*")) == before


def test_a_checkpoint_stands_for_its_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(COPIED)
    checkpoint = next((run / "checkpoints").iterdir())
    assert "bottles.txt, line 27" in traced(capsys, str(checkpoint), str(tmp_path / "text.txt"))


def test_a_checkpoint_elsewhere_has_no_text_of_another_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    lone = tmp_path / "other" / "best" / "kept"  # in a run's folder, but not where its checkpoints are
    shutil.copytree(next((run / "checkpoints").iterdir()), lone)
    with pytest.raises(UserError, match=r"lacks train\.bin"):
        Tracer.of_run(lone)


def test_on_a_terminal_spans_are_coloured_by_length(run: Path) -> None:
    tracer = Tracer.of_run(run)
    ids = tracer.tokenizer.encode(STRANGE + COPIED)
    (span,) = tracer.trace(ids).copies.spans
    for minimum, band in ((span.length, 1), (span.length // 2, 2), (span.length // 4, 3), (1, 4), (span.length + 1, 0)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="standard", highlight=False, no_color=False)
        tracer.trace(ids, minimum=minimum).print_text(console)
        legend = file.getvalue().splitlines()[-1]
        styled = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False)
        with styled.capture() as capture:
            styled.print("x", style=STYLES[band] or None, end="", highlight=False)
        code = capture.get().partition("x")[0]
        line = next(line for line in file.getvalue().splitlines() if "bottles, hanging" in line)
        assert line.startswith(code + "27 green") if code else "\x1b" not in line
        assert str(minimum) in legend


def test_escape_sequences_of_the_text_do_not_reach_the_terminal(run: Path) -> None:
    tracer = Tracer.of_run(run)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None)
    tracer.trace(tracer.tokenizer.encode("a\x1b[31mred\x07 :apple: [bold]\n")).print(console)
    assert ":apple: [bold]" in file.getvalue()
    assert "\x1b" not in file.getvalue()
    assert "red" in file.getvalue()


def test_no_color_is_respected(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    tracer = Tracer.of_run(run)
    file = io.StringIO()
    tracer.trace(tracer.tokenizer.encode(COPIED + "\x1b[31m")).print(Console(file=file, force_terminal=True))
    assert file.getvalue().startswith(COPIED)
    assert "\x1b" not in file.getvalue()


def test_a_reader_who_leaves_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `head` does; rich by itself would end the process with 1."""

    class Left(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(BrokenPipeError):
        standard_output().print("a line")


def test_a_prompt_is_not_counted(run: Path) -> None:
    tracer = Tracer.of_run(run)
    prompt, written = tracer.tokenizer.encode(COPIED), tracer.tokenizer.encode(STRANGE + COPIED)
    trace = tracer.trace(prompt + written, n_prompt=len(prompt))
    alone = tracer.trace(written)
    assert trace.copies.spans == alone.copies.spans
    assert summary_line(trace) == summary_line(alone)
    assert trace.line_of(trace.copies.spans[0]) == alone.line_of(alone.copies.spans[0]) + COPIED.count("\n")
    file = io.StringIO()
    trace.print_text(Console(file=file))
    assert file.getvalue() == COPIED + STRANGE + COPIED + "\n"


def test_a_character_that_was_not_finished_is_not_counted(run: Path) -> None:
    tracer = Tracer.of_run(run)
    whole, cut = (tracer.trace_written("40 green", " bottles" + end) for end in ("", "\N{REPLACEMENT CHARACTER}"))
    assert cut.tokens.tolist() == whole.tokens.tolist()


def test_every_span_has_the_line_in_which_its_first_word_stands(run: Path) -> None:
    tracer = Tracer.of_run(run)
    text = "\n\n".join(f"Stanza {number}\n{COPIED.replace('27', str(number))}" for number in range(20, 30))
    trace = tracer.trace(tracer.tokenizer.encode(text), minimum=1)
    assert len(trace.copies.spans) > 20
    for span in trace.copies.spans:
        before = tracer.tokenizer.decode(trace.tokens[: span.start].tolist())
        words = trace.text_of(span)
        n_blank = len(words) - len(words.lstrip())
        assert trace.line_of(span) == 1 + (before + words[:n_blank]).count("\n")


def test_nothing_written_is_no_copy(run: Path) -> None:
    trace = Tracer.of_run(run).trace(np.empty(0, dtype=np.uint32))
    assert trace_lines(trace) == ["0 % of 0 tokens stand verbatim in the training text in spans of at least 12 tokens"]


def test_a_character_split_by_a_span_stays_whole(run: Path) -> None:
    """Its bytes are tokens of their own here, and one of them stands in the training text."""
    tracer = Tracer.of_run(run)
    ids = tracer.tokenizer.encode("green é Ø 漢 green")
    file = io.StringIO()
    tracer.trace(ids, minimum=1).print_text(Console(file=file, force_terminal=True, color_system=None, width=80))
    assert "é Ø 漢 green" in file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/bottles", "nowhere.txt"], "nowhere.txt"),
        (["runs/bottles", "nothing.txt"], "nothing.txt is empty"),
        (["runs/bottles", "zeros.bin"], "zeros.bin"),
        (["runs/bottles", "pages"], "names 2 texts"),
        (["runs/nowhere", "bottles.txt"], "runs/nowhere"),
        (["pages", "bottles.txt"], "train.bin"),
        (["runs/bottles", "bottles.txt", "--minimum", "0"], "--minimum"),
        (["runs/bottles", "bottles.txt", "--longest", "-1"], "--longest"),
        (["runs/bottles"], "FILE"),
        (["runs/damaged", "bottles.txt"], "train.bin is damaged"),
    ],
)
def test_wrong_input_gets_one_sentence(
    workplace: Path, run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("nothing.txt").touch()
    Path("zeros.bin").write_bytes(b"text\0and more")
    Path("pages").mkdir(exist_ok=True)
    for name in ("one", "two"):
        Path("pages", f"{name}.txt").write_text(name)
    if "runs/damaged" in arguments:
        shutil.copytree(run, "runs/damaged", ignore=shutil.ignore_patterns("checkpoints"))
        damaged = bytearray(Path("runs/damaged/train.bin").read_bytes())
        damaged[-1] ^= 1
        Path("runs/damaged/train.bin").write_bytes(damaged)
    assert main(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("groundling: ")
    assert words in message
    assert captured.out == ""

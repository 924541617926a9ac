"""`groundling sample`: where prompts come from, what is printed where, and that drafts change nothing."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from groundling.cli import main


def sample(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> str:
    assert main(["sample", str(run), *arguments]) == 0
    return capsys.readouterr().out


def samples(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sample(capsys, run, "--json", *arguments).split("\n") if line]


def test_a_seed_repeats_and_another_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "40 green", "--temperature", "2", "--seed")
    first, again, other = (sample(capsys, run, *arguments, seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert first.startswith("40 green")


@pytest.mark.parametrize("drafts", ["auto", "text", "prompt"])
@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_drafts_change_nothing(run: Path, capsys: pytest.CaptureFixture[str], drafts: str, temperature: str) -> None:
    arguments = ("--prompt", "39 green bottles,", "-n", "3", "--max-tokens", "60", "--temperature", temperature)
    assert samples(capsys, run, *arguments, "--drafts", drafts) == samples(capsys, run, *arguments, "--drafts", "none")


def test_a_damaged_text_costs_drafts_and_a_note(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    content = (tmp_path / "run" / "train.bin").read_bytes()
    (tmp_path / "run" / "train.bin").write_bytes(content[:-3])
    expected = samples(capsys, run, "--prompt", "40", "--drafts", "none")
    assert samples(capsys, tmp_path / "run", "--prompt", "40", "--drafts", "prompt") == expected
    assert main(["sample", str(tmp_path / "run"), "--prompt", "40", "--json"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(captured.out)] == expected
    assert "note: no drafts from the training text: " in captured.err
    assert main(["sample", str(tmp_path / "run"), "--prompt", "40", "--drafts", "text"]) == 2


def test_a_checkpoint_may_be_named_from_beside_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [expected] = samples(capsys, run, "--prompt", "40", "--trace")
    monkeypatch.chdir(run / "checkpoints")
    [found] = samples(capsys, Path("step-00000012"), "--prompt", "40", "--trace")
    assert found == expected


def test_each_of_many_samples_can_be_had_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The i-th sample of a prompt has seed + i; here more of them than are decoded together."""
    together = samples(capsys, run, "--prompt", "7 ", "--prompt", "a much longer prompt", "-n", "9", "--seed", "3")
    assert [facts["seed"] for facts in together] == [*range(3, 12)] * 2
    alone = samples(capsys, run, "--prompt", "a much longer prompt", "--seed", "8")
    assert together[9 + 5] == alone[0]


def test_samples_are_printed_in_order_each_with_its_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = samples(capsys, run, "--prompt", "1 green", "--prompt", "2 green", "-n", "2")
    expected = "\n".join(
        f"--- sample {i} of 4, seed {facts['seed']}\n{facts['prompt']}{facts['text']}\n"
        for i, facts in enumerate(written, 1)
    )
    assert sample(capsys, run, "--prompt", "1 green", "--prompt", "2 green", "-n", "2") == expected


def test_prompts_from_files_and_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "whole.txt").write_bytes(b"two\r\nlines\n")
    (tmp_path / "lines.txt").write_bytes("first\n\rsecond\u2028still\r".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))
    whole, lines = str(tmp_path / "whole.txt"), str(tmp_path / "lines.txt")
    written = samples(
        capsys, run, "--prompt", "flag", "--prompt-file", whole, "--prompt-file", "-", "--prompt-lines", lines
    )
    assert [facts["prompt"] for facts in written] == ["flag", "two\nlines", "from a pipe", "first", "second\u2028still"]


def test_a_closed_standard_input_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["sample", str(run), "--prompt-file", "-"]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_stop_string_ends_the_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "40 green", "--max-tokens", "40", "--temperature", "1")
    [whole] = samples(capsys, run, *arguments)
    assert whole["finish_reason"] == "length"
    stop = whole["text"][7:10]
    [stopped] = samples(capsys, run, *arguments, "--stop", stop, "--stop", "never this")
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]


def test_a_trace_names_the_source(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [facts] = samples(capsys, run, "--prompt", "40 green", "--trace")
    assert facts["trace"]["n_tokens"] > 0
    assert "verbatim in the training text" in sample(capsys, run, "--prompt", "40 green", "--trace")


def test_a_trace_without_a_text_is_refused_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock", "train.bin"))
    assert main(["sample", str(tmp_path / "run"), "--trace"]) == 2
    captured = capsys.readouterr()
    assert "train.bin" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_statistics_go_to_standard_error(run: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    assert main(["sample", str(run), "--prompt", "40", "--weights", weights, "--stats"]) == 0
    errors = capsys.readouterr().err
    assert "tokens/s" in errors
    assert f"{weights} weights" in errors


def test_presets_are_settings_to_start_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_name = samples(capsys, run, "--prompt", "40", "--preset", "reference", "--max-tokens", "9")
    spelled = ("--temperature", "0.7", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.1")
    assert by_name == samples(capsys, run, "--prompt", "40", *spelled, "--max-tokens", "9")


def test_a_prompt_longer_than_the_window_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run), "--prompt", "40 green bottles, " * 20, "-n", "2", "--max-tokens", "2"]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert line.endswith("tokens, and this model reads 32: those at its end")


def test_what_does_nothing_at_temperature_0_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = ("--top-k", "5", "--top-p", "0.5", "--min-p", "0.1", "--seed", "3")
    assert main(["sample", str(run), "--prompt", "40", "--temperature", "0", "-n", "2", *idle]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 5
    assert "the 2 samples of a prompt are all the same" in said[0]
    assert [line.split()[1] for line in said[1:]] == list(idle[::2])
    assert main(["sample", str(run), "--prompt", "40", *idle]) == 0
    assert main(["sample", str(run), "--prompt", "40", "--preset", "greedy"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt-lines", "empty.txt"], "empty.txt has no line"),
        (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8"),
        (["-n", "0"], "-n is 0"),
        (["--min-p", "2"], "min_p"),
        (["--stop", ""], "stop"),
        (["--weights", "int4"], "int4"),
    ],
)
def test_wrong_input_is_one_sentence(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    wrong: list[str],
    words: str,
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(run), *wrong]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""

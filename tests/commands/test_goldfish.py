"""`--loss goldfish` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from groundling.cli import main
from groundling.commands.advice import objective_lines
from groundling.config import RunConfig
from groundling.corpus.goldfish import ObjectiveConfig
from groundling.training.run_folder import RunFolder
from groundling.training.stopping import StoppingConfig

from .bottles import steps, train


@pytest.fixture(scope="module")
def goldfish_run(workplace: Path) -> Path:
    """A run to the end of its schedule."""
    arguments = ("--loss", "goldfish", "--schedule.passes", "2", "--schedule.warmup_steps", "1")
    assert main(train(*arguments, "--out", "runs/goldfish")) == 0
    return workplace / "runs" / "goldfish"


def test_the_run_ends_with_its_schedule_and_says_so(
    workplace: Path, goldfish_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ("--schedule.passes", "2", "--schedule.warmup_steps", "1")
    assert main(train("--loss=goldfish", *passes, "--out", "runs/goldfish-again")) == 0
    printed = capsys.readouterr()
    record = json.loads((workplace / "runs" / "goldfish-again" / "record.json").read_text())
    sentence = f"goldfish, 1 in 4 targets (k=4, h=13): {100 * record['goldfish_dropped']:.1f} % dropped"
    assert f"loss: {sentence}; the run ends with its schedule" in printed.err
    assert "stopping.target 0.099999 is not used" in printed.err
    assert f"stopped after {record['steps']} steps: the schedule is at its end" in printed.err
    assert sentence in printed.out
    assert printed.out.count("(no target)") == 2
    for word in ("known", "missed", "above the target"):
        assert word not in printed.out + printed.err
    first, again = (steps(run) for run in (goldfish_run, workplace / "runs" / "goldfish-again"))
    assert [line["train/loss"] for line in again] == [line["train/loss"] for line in first]


def test_the_record_and_the_configuration_say_what_was_dropped(goldfish_run: Path, run: Path) -> None:
    record = json.loads((goldfish_run / "record.json").read_text())
    assert record["loss"] == "goldfish, 1 in 4 targets (k=4, h=13)"
    assert 0.05 < record["goldfish_dropped"] < 0.6  # a short text that repeats itself
    assert record["stop_reason"] == "schedule"
    assert record["first_batch_below_target"] is None
    assert 2 <= record["passes"] < 3  # what is dropped was read all the same
    settings = yaml.safe_load((goldfish_run / "config.yaml").read_text())
    assert settings["objective"] == {"loss": "goldfish", "drop_every": 4, "context": 13}
    assert settings["stopping"]["target"] == 0
    plain = json.loads((run / "record.json").read_text())
    assert (plain["loss"], plain["goldfish_dropped"]) == ("plain", None)


def test_losses_over_the_whole_text_are_over_every_prediction(
    goldfish_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(goldfish_run), "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)
    record = json.loads((goldfish_run / "record.json").read_text())
    assert taken["corpus/loss"] == pytest.approx(record["corpus_loss"], rel=1e-5)
    assert taken["corpus/loss_offset"] == pytest.approx(record["corpus_loss_offset"], rel=1e-5)


def test_a_run_goes_on_with_its_own_loss_only(
    goldfish_run: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (goldfish_run / "config.yaml").read_text()
    resume = ["train", "--resume", "--out", str(goldfish_run)]
    for other in (["--loss", "plain"], ["--objective.context", "5"]):
        assert main([*resume, *other]) == 2
        assert "another loss (goldfish, 1 in 4 targets (k=4, h=13), now" in capsys.readouterr().err
    assert (goldfish_run / "config.yaml").read_text() == before
    assert main(["train", "--resume", "--out", str(run), "--loss", "goldfish"]) == 2
    assert "another loss (plain, now goldfish" in capsys.readouterr().err
    n_steps = len(steps(goldfish_run))
    assert main([*resume, "--schedule.passes", "3"]) == 0
    assert len(steps(goldfish_run)) > n_steps


def test_a_run_from_before_there_was_a_choice_goes_on(workplace: Path) -> None:
    assert main(train("--max-steps", "1", "--out", "runs/old")) == 0
    old = workplace / "runs" / "old"
    identity = json.loads((old / "identity.json").read_text())
    assert identity.pop("loss") == "plain"
    (old / "identity.json").write_text(json.dumps(identity))
    settings = yaml.safe_load((old / "config.yaml").read_text())
    del settings["objective"]
    (old / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "--resume", "--out", str(old), "--max-steps", "2"]) == 0


@pytest.mark.usefixtures("quick_measure")
def test_estimate_takes_the_loss(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *train("--loss", "goldfish")[1:]]) == 0
    printed = capsys.readouterr()
    assert "% dropped" in printed.err
    assert "estimate: " in printed.out


def test_settings_without_use_are_named(goldfish_run: Path) -> None:
    corpus = RunFolder(goldfish_run).text()
    unused = RunConfig(objective=ObjectiveConfig(drop_every=8))
    (line,) = objective_lines(unused, corpus)
    assert line.startswith("warning: objective.drop_every and objective.context are not used")
    assert objective_lines(RunConfig(), corpus) == []
    without_target = RunConfig(objective=ObjectiveConfig("goldfish"), stopping=StoppingConfig(target=0))
    assert "stopping.target" not in "".join(objective_lines(without_target, corpus))


def test_the_short_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert "--objective.loss {plain,goldfish}" in printed
    assert re.search(r"--loss +is --objective\.loss", printed)


def test_a_loss_that_does_not_exist_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train("--loss", "goldfisch")) == 2
    assert "goldfish" in capsys.readouterr().err

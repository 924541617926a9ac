"""From words and files to a configuration: what wins over what."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from groundling.cli import main
from groundling.commands.arguments import (
    SHORTCUTS,
    before_parsing,
    expand_shortcuts,
    load_preset,
    parse_run,
    run_parser,
)
from groundling.config import SHAKESPEARE_PROMPTS, RunConfig, preset_names, preset_path
from groundling.runtime import cache_dir

from .bottles import steps, train

RECORDS = Path(__file__).parents[2] / "docs" / "record"
ONE_STEP = ("--max-steps", "1", "--evaluation.final", "none")


def parse(*arguments: str) -> RunConfig:
    preset = before_parsing(arguments).preset
    return parse_run(run_parser("train", "", "", preset_path(preset or "gpt2")), arguments)


@pytest.mark.parametrize("name", preset_names())
def test_presets_say_their_name_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_preset(name)
    assert config.preset == name
    assert config.text.sources
    path = tmp_path / "dumped.yaml"
    path.write_text(config.as_yaml())
    assert parse_run(run_parser("train", "", "", path), []) == config


def test_texts_that_look_like_numbers_survive_a_round_trip(tmp_path: Path) -> None:
    """PyYAML writes 1e5 as it is, and jsonargparse reads a number there: such a run could not be resumed."""
    config = replace(load_preset("penny"), prompts=("1e5", "6.02e23", ".5", "nan", "1_0", "no", "Zoë", "🍾"))
    path = tmp_path / "dumped.yaml"
    path.write_text(config.as_yaml(), encoding="utf-8")
    assert parse_run(run_parser("train", "", "", path), []) == config


@pytest.mark.parametrize(
    "name", ["🍾.txt", "Zoë\u2028\x85.txt", "1e5", "[a, b].txt", 'it\'s "so".txt', "a" * 300, "\\ud83c"]
)
def test_any_name_of_a_text_is_taken_as_it_is(name: str) -> None:
    assert parse("--corpus", name, "other.txt").text.sources == (name, "other.txt")


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/config.yaml")), ids=lambda path: path.parent.name)
def test_the_configurations_on_record_repeat_their_runs(path: Path) -> None:
    """Whatever has become of their presets since: what a record lacks was as the setting's own default is."""
    record = json.loads((path.parent / "record.json").read_text())["config"]
    again = parse("--config", str(path)).as_dict()
    for section, defaults in RunConfig().as_dict().items():
        settings = record.get(section, defaults)
        assert again[section] == (defaults | settings if isinstance(defaults, dict) else settings), section


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


def test_later_flags_win_and_names_for_the_same_setting_are_the_same(workplace: Path) -> None:
    Path("a.yaml").write_text("seed: 1\nschedule: {peak: 0.1}\n")
    Path("b.yaml").write_text("seed: 2\ncheckpoint: {save_every: 500}\n")
    assert parse("--max-steps", "5", "--stopping.max_steps", "7").stopping.max_steps == 7
    assert parse("--stopping.max_steps", "7", "--max-steps=5").stopping.max_steps == 5
    both = parse("--config", "a.yaml", "--config=b.yaml")
    assert (both.seed, both.schedule.peak, both.checkpoint.save_every) == (2, 0.1, 500)
    sized = parse("--model.n_ctx", "256", "--size", "355M", "--model.n_layer", "6")
    assert (sized.model.n_layer, sized.model.n_head, sized.model.n_ctx) == (6, 16, 256)
    assert parse("--corpus", "one", "two", "--heldout", "three").text.sources == ("one", "two")
    assert parse("--corpus", "-").text.sources == ("-",)


def test_a_home_folder_is_found_where_no_shell_has_looked(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    Path("home.yaml").write_text("seed: 9\n")
    early = before_parsing(["--out=~/runs/x", "--config=~/home.yaml"])
    assert (early.out, early.config) == (workplace / "runs" / "x", [workplace / "home.yaml"])
    assert parse("--config=~/home.yaml").seed == 9
    monkeypatch.setenv("GROUNDLING_CACHE", "~/kept")
    assert cache_dir() == workplace / "kept"


def test_a_file_may_name_its_preset(workplace: Path) -> None:
    Path("penny.yaml").write_text("preset: penny\nseed: 3\n")
    config = parse("--config", "penny.yaml")
    assert (config.preset, config.seed, config.model) == ("penny", 3, load_preset("penny").model)
    Path("heart.yaml").write_text("preset: by-heart\n")
    both = parse("--config", "penny.yaml", "--config", "heart.yaml")
    assert (both.preset, both.seed, both.model) == ("by-heart", 3, load_preset("by-heart").model)


def test_shortcuts_name_settings_that_exist() -> None:
    settings = RunConfig().as_dict()
    for flag, target in SHORTCUTS.items():
        section, _, name = target.partition(".")
        assert name in settings[section], flag
    assert expand_shortcuts(["--corpus", "a", "b", "--seed", "1"]) == ['--text.sources=["a", "b"]', "--seed", "1"]


def test_prompts_are_the_text_s_own_unless_others_are_given(workplace: Path) -> None:
    """Resolved into config.yaml, also where a preset has prompts for its own text."""

    def prompts(name: str, *arguments: str) -> list[str]:
        assert main([*arguments, *ONE_STEP, "--out", f"runs/{name}"]) == 0
        resolved: list[str] = yaml.safe_load((workplace / "runs" / name / "config.yaml").read_text())["prompts"]
        return resolved

    own = prompts("own-prompts", *train())
    assert own[0] == "40 green bottles, hanging"
    assert len(own) == 3
    lines = Path("bottles.txt").read_text().splitlines()
    assert all(any(line.startswith(prompt) for line in lines) for prompt in own)
    penny = ("--preset", "penny", "--heldout-fraction", "0")
    assert prompts("penny-prompts", *train(*penny)) == own
    assert prompts("given-prompts", *train("--prompts", '["one", "two"]')) == ["one", "two"]
    assert prompts("play-prompts", *train("--corpus", "the-tempest")) == list(SHAKESPEARE_PROMPTS)
    repeated = str(workplace / "runs" / "play-prompts" / "config.yaml")
    assert prompts("repeated-prompts", "train", "--config", repeated, "--corpus", "bottles.txt") == own
    assert load_preset("penny").prompts[0] == "ANTIPHOLUS OF SYRACUSE:"

"""The configuration of a run: the sections of its components, composed.

Invariant: a component's settings are declared beside the component and nowhere else; what a run used is
dumped, resolved, into its folder, and read from there when it is resumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from groundling.corpus.config import CorpusConfig
from groundling.corpus.goldfish import ObjectiveConfig
from groundling.corpus.windows import WindowConfig
from groundling.errors import ConfigError
from groundling.evaluation.corpus_loss import EvaluationConfig
from groundling.generation.sampling import SamplingConfig
from groundling.model.compact import HeadVocabulary
from groundling.model.gpt2 import GPTConfig
from groundling.model.positions import InitialPositions
from groundling.optim.optimizer import OptimConfig
from groundling.optim.schedule import ScheduleConfig
from groundling.runtime import RuntimeConfig
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.growth import GrowthConfig
from groundling.training.metrics import LoggingConfig
from groundling.training.recipe import Recipe
from groundling.training.stopping import StoppingConfig

DEFAULT_PRESET = "gpt2"

SHAKESPEARE_PROMPTS = ("First Citizen:", "ROMEO:", "To be or not")
"""Prompts of runs on packaged texts."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    preset: str = DEFAULT_PRESET
    """Preset that the other settings start from."""
    seed: int = 1337
    """Seed of the weights and of the order of windows."""
    init: str = ""
    """Model to begin with instead of random weights: a run, or whatever `groundling import` reads. Its size and its
    tokenizer come with it."""
    head_vocabulary: HeadVocabulary = "full"
    """seen: the ids that do not occur in the training text share one row of the embedding, which is quicker and leaves
    them indistinguishable. full: each id has its own. Losses are over the full vocabulary either way."""
    initial_positions: InitialPositions = "random"
    """What the position table begins with, unless `init` gives one. random: as GPT-2's. waves: sines and cosines, so
    that a network learns sooner to use the tokens before, wherever in a window they are; of no use on a fixed grid."""
    text: CorpusConfig = field(default_factory=CorpusConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: tuple[str, ...] = ()
    """A list of prompts for the samples at the end. If none are given: for a text of your own, the beginnings of its
    first line and of two others; for packaged ones, words of Shakespeare's."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: give 0 or more, below 2**63")
        if self.init and self.head_vocabulary == "seen":
            raise ConfigError(
                f"head_vocabulary is seen, which would put one row in place of those that {self.init} has learned for"
                " the ids that the text lacks: use full, or leave out init"
            )
        if not self.init:  # whose position table is known when it is read
            self.check_window()

    def check_window(self) -> None:
        """Raises `ConfigError` if the windows are longer than the model's position table."""
        if self.windows.length > self.model.n_ctx:
            raise ConfigError(
                f"windows.length is {self.windows.length}, but model.n_ctx is {self.model.n_ctx}: the model has no"
                " later positions, so lower the one or raise the other"
            )

    @property
    def recipe(self) -> Recipe:
        """The sections that the trainer receives."""
        return Recipe(**{field.name: getattr(self, field.name) for field in fields(Recipe)})

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries and numbers, as YAML and JSON hold them."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def as_yaml(self) -> str:
        """The resolved configuration, readable by `--config`."""
        return yaml.dump(self.as_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as 1e5, which PyYAML writes as they are and readers of newer YAML take for numbers."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text_node)


def preset_path(name: str) -> Path:
    """The YAML file of a preset.

    Raises `ConfigError` for a name that no preset has.
    """
    if name not in preset_names():
        raise ConfigError(f"there is no preset {name!r}: choose one of {', '.join(preset_names())}")
    return Path(str(resources.files("groundling.presets") / f"{name}.yaml"))


def preset_names() -> list[str]:
    """Names of the packaged presets."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in resources.files("groundling.presets").iterdir()
        if path.name.endswith(".yaml")
    )

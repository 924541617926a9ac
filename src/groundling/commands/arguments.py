"""From words on the command line to a configuration.

Invariant: preset, then files, then flags, each later one winning, wherever a file stands on the line; a
resumed run starts from its own resolved configuration instead of the preset. Unknown keys and
abbreviations are errors.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from groundling.config import DEFAULT_PRESET, RunConfig, preset_path
from groundling.errors import ConfigError
from groundling.model.gpt2 import SIZES

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SHORTCUTS = {
    "corpus": "text.sources",
    "heldout": "text.heldout",
    "heldout-fraction": "text.heldout_fraction",
    "tokenizer": "text.tokenizer",
    "loss": "objective.loss",
    "max-steps": "stopping.max_steps",
    "max-minutes": "stopping.max_minutes",
    "save-every": "checkpoint.save_every",
    "keep": "checkpoint.keep",
    "device": "runtime.device",
    "dtype": "runtime.dtype",
}
"""Short flags, and the settings that they are other names of."""

LISTS = ("text.sources", "text.heldout")
"""Settings whose short flag takes all words up to the next flag."""

BEFORE_FLAGS = ("--config", "--size")
"""Flags that others win over, wherever they stand."""


class Parser(ArgumentParser):
    """A parser that takes no abbreviations and answers wrong input with one sentence instead of its usage."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, exit_on_error=False, default_env=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:  # our own sentences, raised by a section's checks, are the clearest
            if isinstance(cause, ConfigError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        sentence = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
        raise ConfigError(f"{sentence} (`{self.prog} --help` lists the options)")


class EarlyParser(argparse.ArgumentParser):
    """Reads a few flags before the others can be understood."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`groundling --help` shows the commands)")


def before_parsing(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that decide which defaults the rest is parsed with: preset, config (a list), out, resume.

    Raises `ConfigError` if a file of settings cannot be read, or has a key that no section has.
    """
    parser = EarlyParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    for path in known.config:
        settings = _read_settings(path)
        known.preset = known.preset or settings.get("preset")
    return known


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the settings {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings: write `section: {{name: value}}`, as a run's config.yaml does")
    known = [field.name for field in fields(RunConfig)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{path} sets {key!r}, which is no section: choose among {', '.join(known)}")
    return settings


def run_parser(command: str, description: str, examples: str, defaults: Path | None = None) -> Parser:
    """A parser for every setting of a run, with the defaults of a preset's or a run's file."""
    shortcuts = "\n".join(f"  --{flag:18} is --{target}" for flag, target in SHORTCUTS.items())
    parser = Parser(
        prog=f"groundling {command}",
        description=description,
        epilog=f"short flags:\n{shortcuts}\n\n{examples}",
        default_config_files=[glob.escape(str(defaults or preset_path(DEFAULT_PRESET)))],
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, read after the preset")
    parser.add_argument("--size", choices=list(SIZES), help="size of the network, by its released name")
    parser.add_class_arguments(RunConfig)
    return parser


def parse_run(parser: Parser, arguments: Sequence[str]) -> RunConfig:
    """The configuration that these arguments mean.

    Raises `ConfigError` for a setting that is unknown or wrong.
    """
    parsed = parser.instantiate(parser.parse_args(written_out(arguments)))
    return RunConfig(**{field.name: parsed[field.name] for field in fields(RunConfig)})


def load_preset(name: str) -> RunConfig:
    """The configuration of a preset, with nothing added."""
    return parse_run(run_parser("train", "", "", preset_path(name)), [])


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with files and size first, and every shortcut replaced by the setting it stands for.

    Raises `ConfigError` for a flag without its value.
    """
    first: dict[str, list[str]] = {flag: [] for flag in BEFORE_FLAGS}
    rest: list[str] = []
    words = list(arguments)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        target = SHORTCUTS.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if flag not in BEFORE_FLAGS and target is None:
            rest.append(f"{flag}{equals}{value}")
            continue
        values = [value] if equals else []
        if target in LISTS and not equals:
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
        elif not equals and words:
            values.append(words.pop(0))
        if not values:
            raise ConfigError(f"{flag} needs a value")
        if flag == "--size":
            first[flag] = _size_flags(values[0])
        elif target is None:
            first[flag] += [flag, values[0]]
        else:
            rest.append(f"--{target}={json.dumps(values) if target in LISTS else values[0]}")
    return [word for flag in BEFORE_FLAGS for word in first[flag]] + rest


def _size_flags(name: str) -> list[str]:
    if name not in SIZES:
        raise ConfigError(f"there is no size {name!r}: choose one of {', '.join(SIZES)}")
    sizes = asdict(SIZES[name])
    del sizes["n_vocab"]  # the tokenizer's
    return [f"--model.{field}={value}" for field, value in sizes.items()]

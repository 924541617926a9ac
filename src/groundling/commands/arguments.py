"""From words on the command line to a configuration.

Invariant: preset, then files, then flags, each later one winning, wherever a file stands on the line; a
resumed run starts from its own resolved configuration instead of the preset. Unknown keys and
abbreviations are errors.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from groundling.config import DEFAULT_PRESET, RunConfig, preset_path
from groundling.errors import ConfigError, UserError
from groundling.files import home_expanded
from groundling.model.gpt2 import SIZES

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SHORTCUTS = {
    "corpus": "text.sources",
    "heldout": "text.heldout",
    "heldout-fraction": "text.heldout_fraction",
    "tokenizer": "text.tokenizer",
    "loss": "objective.loss",
    "head-vocabulary": "head_vocabulary",
    "initial-positions": "initial_positions",
    "optimizer": "optim.kind",
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


WRONG_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":\s.*(?:Got|Given) value:\s(?P<value>.*)', re.DOTALL)
"""How jsonargparse says that a value has the wrong type."""
WRONG_SECTION = re.compile(r'Parser key "(?P<key>\w+)":\s+Unable to load config')
"""How it says that a section's flag, which reads a file, was given something else."""

MISSING = re.compile(r"the following arguments are required: (?P<names>[\w, -]+)")
"""How argparse says that arguments are missing."""

EXPECTED = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a word",
    tuple: "a list, such as '[one, two]'",
    NoneType: "null",
}


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
            if isinstance(cause, UnicodeEncodeError):
                raise ConfigError(f"{cause.object!r} is not valid UTF-8: give it in the terminal's encoding")
            cause = cause.__cause__ or cause.__context__
        if wrong := WRONG_VALUE.search(message):
            raise ConfigError(self._wrong_value(wrong["key"], wrong["value"].strip()))
        if section := WRONG_SECTION.search(message):
            flag = f"--{section['key']}"
            raise ConfigError(f"{flag} reads a file of settings, which this is not: give them as {flag}.NAME VALUE")
        if missing := MISSING.search(message):
            names = [self._flag(name) for name in missing["names"].split(", ")]
            raise ConfigError(f"{' and '.join(names)} must be given (`{self.prog} --help` lists the options)")
        sentence = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
        raise ConfigError(f"{sentence} (`{self.prog} --help` lists the options)")

    def _flag(self, name: str) -> str:
        """What the user types for an argument of this name."""
        action = next((action for action in self._actions if action.dest == name), None)
        return action.option_strings[0] if action and action.option_strings else name.upper()

    def _wrong_value(self, key: str, value: str) -> str:
        action = next((action for action in self._actions if action.dest == key), None)
        name = key if action is None or "." in key else action.option_strings[0]
        return f"{name} is {value!r}: give {_expected(getattr(action, '_typehint', None))}"


def _expected(hint: Any) -> str:
    """What a setting of this type may be, in words."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_expected(kind) for kind in get_args(hint))
    return EXPECTED.get(get_origin(hint) or hint, "another value")


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
    parser.add_argument("--config", type=home_expanded, action="append", default=[])
    parser.add_argument("--out", type=home_expanded)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    named = [name for path in known.config if (name := _read_settings(path).get("preset"))]
    known.preset = known.preset or (named[-1] if named else None)  # as with other settings, the last file wins
    return known


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: give --config the path of a YAML file with settings") from None
    except OSError as error:
        raise ConfigError(f"the settings {path} cannot be read ({error.strerror}): give a YAML file") from None
    except RecursionError:
        raise ConfigError(f"the settings {path} are nested too deeply: give a YAML file of sections") from None
    except (ValueError, yaml.YAMLError) as error:  # no UTF-8, a date that no calendar has
        raise ConfigError(f"the settings {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings: write `section: {{name: value}}`, as a run's config.yaml does")
    plain = RunConfig().as_dict()
    for key, value in settings.items():
        if key not in plain:
            raise ConfigError(f"{path} sets {key!r}, which is no section: choose among {', '.join(plain)}")
        if isinstance(plain[key], dict) and not isinstance(value, dict):
            raise ConfigError(f"{path} sets {key} to {value!r}, but it is a section: write `{key}: {{name: value}}`")
    return settings


def run_parser(command: str, description: str, examples: str, defaults: Path | None = None) -> Parser:
    """A parser for every setting of a run, with the defaults of a preset's or a run's file."""
    shortcuts = "\n".join(f"  --{flag:18} is --{target}" for flag, target in SHORTCUTS.items())
    parser = Parser(
        prog=f"groundling {command}",
        usage=f"groundling {command} [OPTIONS]",  # all of them would fill two screens
        description=f"{description}\n\nshort flags:\n{shortcuts}",
        epilog=examples,
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
    parsed = parser.instantiate(parser.parse_args(expand_shortcuts(arguments)))
    return RunConfig(**{field.name: parsed[field.name] for field in fields(RunConfig)})


@functools.cache
def load_preset(name: str) -> RunConfig:
    """The configuration of a preset, with nothing added."""
    return parse_run(run_parser("train", "", "", preset_path(name)), [])


@contextlib.contextmanager
def naming_flags(arguments: Sequence[str]) -> Iterator[None]:
    """What is raised inside calls a setting by its short flag, if that is what the user typed."""
    typed = {word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    try:
        yield
    except UserError as error:
        message = str(error)
        for flag in typed & SHORTCUTS.keys():
            message = re.sub(rf"(--|\b){re.escape(SHORTCUTS[flag])}\b", f"--{flag}", message)
        error.args = (message,)
        raise


def expand_shortcuts(arguments: Sequence[str]) -> list[str]:
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
            rest.append(f"--{target}={_flow_list(flag, values) if target in LISTS else values[0]}")
    return [word for flag in BEFORE_FLAGS for word in first[flag]] + rest


def _flow_list(flag: str, values: list[str]) -> str:
    """Strings as YAML has them on one line."""
    for value in values:
        if any(0xD800 <= ord(character) < 0xE000 for character in value):  # bytes that the terminal's encoding lacks
            raise ConfigError(f"{flag} {value!r} is not valid UTF-8: give it in the terminal's encoding")
    return yaml.safe_dump(values, default_flow_style=True, default_style='"', width=math.inf).strip()


def _size_flags(name: str) -> list[str]:
    if name not in SIZES:
        raise ConfigError(f"there is no size {name!r}: choose one of {', '.join(SIZES)}")
    sizes = asdict(SIZES[name])
    del sizes["n_vocab"]  # the tokenizer's
    return [f"--model.{field}={value}" for field, value in sizes.items()]

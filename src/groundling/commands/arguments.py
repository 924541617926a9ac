"""From words on the command line to a configuration.

Invariant: preset, then file, then flags, whatever their order on the line; a resumed run starts from its
own resolved configuration instead of the preset. Unknown keys and abbreviations are errors.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from groundling.config import RunConfig, preset_names, preset_path
from groundling.errors import ConfigError
from groundling.model.gpt2 import SIZES

set_parsing_settings(docstring_parse_attribute_docstrings=True)

SHORTCUTS: dict[str, tuple[str, Any, str | None, str]] = {
    "corpus": (
        "text.sources",
        str,
        "+",
        "text to train on: a packaged name, files, folders, globs, or - (standard input)",
    ),
    "heldout": ("text.heldout", str, "+", "text to hold out, in the same forms"),
    "heldout-fraction": ("text.heldout_fraction", float, None, "share of the text to hold out, from its end"),
    "tokenizer": ("text.tokenizer", str, None, "gpt2, train:N (N tokens, trained on the text), or a tokenizer.json"),
    "max-steps": ("stopping.max_steps", int, None, "stop after this many steps"),
    "max-minutes": ("stopping.max_minutes", float, None, "stop after this many minutes of training"),
    "save-every": ("checkpoint.save_every", str, None, "checkpoint interval: steps (500) or minutes (15m)"),
    "keep": ("checkpoint.keep", int, None, "checkpoints that stay on the disk"),
    "device": ("runtime.device", str, None, "auto, cpu, cuda, cuda:N or mps"),
    "dtype": ("runtime.dtype", str, None, "auto, fp32 or bf16"),
}
"""Short flag: (field it sets, type, nargs, help)."""


class Parser(ArgumentParser):
    """A parser that takes no abbreviations and answers wrong input with one sentence instead of its usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, default_env=False, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause: BaseException | None = ex
        while cause is not None:  # our own sentences, raised by a section's checks, are the clearest
            if isinstance(cause, ConfigError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        sentence = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split()))
        raise ConfigError(f"{sentence} (`{self.prog} --help` lists the options)")


def run_parser(prog: str, description: str, examples: str, defaults: Path) -> Parser:
    """A parser for every setting of a run, with the defaults of a preset's or a run's file."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        default_config_files=[str(defaults)],
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, read after the preset")
    parser.add_argument("--size", choices=list(SIZES), help="size of the network, by its released name")
    for flag, (_, kind, nargs, text) in SHORTCUTS.items():
        parser.add_argument(f"--{flag}", type=kind, nargs=nargs, help=text)
    parser.add_class_arguments(RunConfig)
    return parser


def before_parsing(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that decide which defaults the rest is parsed with."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(list(arguments))
    return known


def load_preset(name: str) -> RunConfig:
    """The configuration of a preset, with nothing added."""
    config, _ = parse_run(run_parser("groundling", "", "", preset_path(name)), [])
    return config


def parse_run(parser: Parser, arguments: Sequence[str]) -> tuple[RunConfig, Any]:
    """The configuration that these arguments mean, and everything else that was parsed.

    Raises `ConfigError` for a setting that is unknown or wrong.
    """
    words = list(arguments)
    for position, word in enumerate(words):  # the file comes before the flags, wherever it stands
        if word == "--config":
            words = words[position : position + 2] + words[:position] + words[position + 2 :]
        elif word.startswith("--config="):
            words = [word, *words[:position], *words[position + 1 :]]
    parsed = parser.parse_args(words)
    if parsed.get("size"):
        for name, value in asdict(SIZES[parsed.size]).items():
            if name != "n_vocab":
                parsed[f"model.{name}"] = value
    for flag, (target, *_rest) in SHORTCUTS.items():
        if (value := parsed.get(flag.replace("-", "_"))) is not None:
            parsed[target] = tuple(value) if isinstance(value, list) else value
    fields = {name: parsed[name] for name in RunConfig.__dataclass_fields__}
    checked = Parser()
    checked.add_class_arguments(RunConfig)
    plain = checked.parse_object({k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in fields.items()})
    return RunConfig(**checked.instantiate(plain).as_dict()), parsed


def presets_help() -> str:
    """Names of the presets, for help texts."""
    return f"settings to start from: {', '.join(preset_names())}"

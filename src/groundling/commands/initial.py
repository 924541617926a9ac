"""`--init`: the model that a run goes on with, and what of the settings comes from it.

Invariant: a setting that the user gave and that the model contradicts is refused, never silently passed over; a run
that was begun so needs its source no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from groundling.commands.arguments import load_preset
from groundling.config import RunConfig
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, ConfigError
from groundling.interop.trained import open_trained
from groundling.model.gpt2 import GPT2
from groundling.model.weights import sha256_of_weights
from groundling.training import checkpoint
from groundling.training.growth import GrowthConfig
from groundling.training.run_folder import RunFolder

FROM_INIT = "init"
"""The tokenizer setting of a run whose tokenizer came with its initial model."""


@dataclass(frozen=True)
class Initial:
    """The model that a run begins with."""

    model: GPT2
    tokenizer: Tokenizer
    window: int
    """Tokens of the windows that it was trained on."""
    source: str
    changes: tuple[str, ...] = ()
    """As in `Trained`."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of its weights. Must be taken before they are trained."""
        return sha256_of_weights(self.model)

    def line(self) -> str:
        """What the run takes from it, in words."""
        size = self.model.config
        return (
            f"init: {self.source}: its weights, its size ({size.n_layer} layers, {size.n_head} heads, n_embd"
            f" {size.n_embd}, n_ctx {size.n_ctx}) and its tokenizer ({self.tokenizer.n_vocab:,} ids)"
        )


def open_initial(config: RunConfig, resumed: RunFolder | None) -> Initial | None:
    """The model that these settings begin with; None if they name none, or name the one that the run has gone on from.

    Raises `CheckpointError` if it cannot be read.
    """
    if not config.init or (resumed and resumed.settings().get("init") == config.init):
        return None
    trained = open_trained(Path(config.init))
    return Initial(trained.model, trained.tokenizer, trained.window, config.init, trained.changes)


def with_initial(config: RunConfig, initial: Initial, typed: Sequence[str]) -> RunConfig:
    """The configuration with the size and the tokenizer of the initial model, and windows that fit it.

    Raises `ConfigError` for a setting that contradicts it: one that is not the preset's, or is among the words typed.
    """
    preset = load_preset(config.preset)
    flags = {word.partition("=")[0] for word in typed}
    for name in (field.name for field in fields(config.model)):
        given, own = getattr(config.model, name), getattr(initial.model.config, name)
        # --size says nothing of n_vocab, which is the tokenizer's.
        said = {f"--model.{name}"} | (set() if name == "n_vocab" else {"--size"})
        was_given = given != getattr(preset.model, name) or flags & said
        if given != own and was_given:
            raise ConfigError(
                f"model.{name} is {given}, but the size comes from --init {initial.source}, whose {name} is {own}:"
                " leave that setting out"
            )
    tokenizer = config.text.tokenizer
    if tokenizer not in (FROM_INIT, initial.tokenizer.name) and (
        tokenizer != preset.text.tokenizer or flags & {"--tokenizer", "--text.tokenizer"}
    ):
        raise ConfigError(
            f"text.tokenizer is {tokenizer}, but the tokenizer comes from --init {initial.source}:"
            " leave that setting out"
        )
    windows, n_ctx = config.windows, initial.model.config.n_ctx
    if windows.length > n_ctx and windows.length == preset.windows.length and "--windows.length" not in flags:
        windows = replace(windows, length=initial.window)
    if windows.length > n_ctx:
        raise ConfigError(
            f"windows.length is {windows.length}, but {initial.source} has {n_ctx} positions: give"
            f" --windows.length {n_ctx} or less"
        )
    return replace(
        config,
        initial_positions=RunConfig.initial_positions,  # a preset's waves are not drawn
        growth=GrowthConfig(),  # nor do trained blocks wait
        text=replace(config.text, tokenizer=FROM_INIT),
        windows=windows,
        model=initial.model.config,
    )


def tokenizer_of(config: RunConfig, initial: Initial | None, resumed: RunFolder | None) -> Tokenizer | None:
    """The tokenizer that came, now or when the run began, with the initial model; None if the settings name one.

    Raises `ConfigError` if the settings were taken from such a run without its model.
    """
    if initial:
        return initial.tokenizer
    if config.text.tokenizer != FROM_INIT:
        return None
    if resumed:
        return Tokenizer.load(resumed.tokenizer)
    raise ConfigError("text.tokenizer is init, but no init is given: name the model with --init, or another tokenizer")


def check_begun(folder: RunFolder) -> None:
    """Raises `CheckpointError` if a run to resume lost its initial model before it was kept."""
    if folder.initial_sum() and not checkpoint.complete(folder.checkpoints):
        raise CheckpointError(
            f"{folder.path} was interrupted before it had kept its initial model: remove it, and begin it anew"
        )

"""A trained model as every export receives it, wherever it comes from.

Invariant: the network is in fp32 on the CPU, and the tokenizer has as many ids as the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from groundling.corpus.shards import TokenFile
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, ConfigError
from groundling.evaluation.report import UNPRINTABLE
from groundling.interop.foreign import Imported
from groundling.interop.hub_folder import WINDOW
from groundling.interop.sources import is_run, open_foreign
from groundling.interop.tensor_files import training_record
from groundling.json_files import read_object
from groundling.model.gpt2 import GPT2
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import RunFolder, find_checkpoint, folder_of


@dataclass(frozen=True)
class Trained:
    """A network, its tokenizer, and what is known of its training."""

    model: GPT2
    tokenizer: Tokenizer
    window: int
    """Tokens of the windows it was trained on; its position table may be longer."""
    name: str
    """What a user calls it: the name of its run's folder, printable."""
    folder: RunFolder | None = None
    """The run it comes from, if it comes from one."""
    record: dict[str, Any] = field(default_factory=dict)
    """The run's record.json; empty if these weights have none. Of a foreign checkpoint: `steps` and
    `train_loss`, if it says them."""
    license: str | None = None
    """Of the weights, by its identifier on the hub, for the model card; what it may be is for the user to know."""
    changes: tuple[str, ...] = ()
    """What was assumed, left out or converted to have a foreign model so."""

    def train_tokens(self) -> TokenFile | None:
        """The training text, if the run still has it. Raises `CorpusError` if it is damaged."""
        return self.folder.tokens("train", self.tokenizer.n_vocab) if self.folder else None


def open_trained(path: Path, tokenizer: Path | None = None, n_head: int | None = None) -> Trained:
    """The model of a run folder or of a checkpoint, or of anything that `groundling import` reads.

    `tokenizer` and `n_head` say what a foreign source does not. Raises `CheckpointError` if there is no model there, or
    none intact.
    """
    if not is_run(path):
        return of_foreign(open_foreign(path, tokenizer, n_head), path)
    if tokenizer or n_head:
        raise ConfigError(f"{path} is a run, which has a tokenizer and sizes: leave out --tokenizer and --n-head")
    checkpoint = find_checkpoint(path)
    model, own_tokenizer, window = load_model(checkpoint, torch.device("cpu"))
    folder = folder_of(path, checkpoint)
    name = printable(folder.path.resolve().name)
    return Trained(model, own_tokenizer, window, name, folder, _record(folder, checkpoint))


def of_foreign(imported: Imported, path: Path) -> Trained:
    """A foreign model as exports receive it: of its training, the steps and the last loss are known, if anything."""
    name = printable(path.stem if path.is_file() else path.resolve().name)
    n_ctx, window = imported.model.config.n_ctx, imported.source.settings.get(WINDOW)
    if type(window) is not int or not 0 < window <= n_ctx:
        window = n_ctx
    record = dict(imported.source.record)
    return Trained(imported.model, imported.tokenizer, window, name, record=record, changes=imported.changes)


def printable(text: object) -> str:
    """Text without what is not text."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", re.sub("\r\n?", "\n", str(text)))


def _record(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """The folder's record, if it is of this checkpoint; of an imported model, what its source said."""
    if not folder.imported.exists():
        return folder.kept_record(checkpoint)
    try:
        facts = read_object(folder.imported)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.imported} says nothing ({error}): remove it to do without") from None
    return training_record(facts.get("steps"), facts.get("train_loss"))

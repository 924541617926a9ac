"""A trained model as every export receives it, wherever it comes from.

Invariant: the network is in fp32 on the CPU, and the tokenizer has as many ids as the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, ConfigError
from groundling.interop.foreign import Imported
from groundling.interop.sources import is_run, open_foreign
from groundling.interop.tensor_files import training_record
from groundling.json_files import read_object
from groundling.model.gpt2 import GPT2
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import RunFolder, find_checkpoint

WINDOW = "groundling_window"
"""What an export's config.json says besides transformers' own settings: `Trained.window`."""


NUMBER, TEXT, NONE = (int, float), (str,), type(None)
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("steps", "tokens_seen", "seed", "parameters", "window"), (int,)),
    **dict.fromkeys(("passes", "wall_s", "evaluation_s", "tokens_per_s", "train_loss"), NUMBER),
    **dict.fromkeys(("corpus_loss", "corpus_loss_offset", "heldout_loss", "mfu", "goldfish_dropped"), (*NUMBER, NONE)),
    "n_seen": (int, NONE),
    **dict.fromkeys(("command", "device", "dtype", "weights_sha256", "corpus_sha256", "tokenizer_sha256"), TEXT),
    **dict.fromkeys(("stop_reason", "loss"), (str, NONE)),
    **dict.fromkeys(("config", "machine", "versions"), (dict, NONE)),
}
"""What a record's values may be, of those that exports quote."""


@dataclass(frozen=True)
class Trained:
    """A network, its tokenizer, and what is known of its training."""

    model: GPT2
    tokenizer: Tokenizer
    window: int
    """Tokens of the windows it was trained on; its position table may be longer."""
    name: str
    """What a user calls it: the name of its run's folder."""
    folder: RunFolder | None = None
    """The run it comes from, if it comes from one."""
    record: dict[str, Any] = field(default_factory=dict)
    """The run's record.json; empty if these weights have none. Of a foreign checkpoint: `steps` and
    `train_loss`, if it says them."""


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
    folder = RunFolder(path if path != checkpoint else path.resolve().parent.parent)
    return Trained(model, own_tokenizer, window, folder.path.resolve().name, folder, _record(folder, checkpoint))


def of_foreign(imported: Imported, path: Path) -> Trained:
    """A foreign model as exports receive it: of its training, the steps and the last loss are known, if anything."""
    name = path.stem if path.is_file() else path.resolve().name
    n_ctx, window = imported.model.config.n_ctx, imported.source.settings.get(WINDOW)
    if type(window) is not int or not 0 < window <= n_ctx:
        window = n_ctx
    return Trained(imported.model, imported.tokenizer, window, name, record=dict(imported.source.record))


def _check_kinds(record: dict[str, Any]) -> None:
    """Raises ValueError if a value is not of the kind that a run records: a folder from elsewhere may hold anything."""
    for name, value in record.items():
        kind = KINDS.get(name)
        numeric = kind is not None and type(value) in (int, float) and not 0 <= value < float("inf")
        if kind is not None and (type(value) not in kind or numeric):
            raise ValueError(f"its {name} is none that a run has")
    for name in ("machine", "versions"):
        if not all(value is None or type(value) in (str, int, list) for value in (record.get(name) or {}).values()):
            raise ValueError(f"its {name} is none that a run has")
    config = record.get("config") or {}
    if not all(type(config.get(name, {})) is dict for name in ("stopping", "sampling", "text")):
        raise ValueError("its config is none that a run has")
    if not all(type(prompt) is str for prompt in config.get("prompts") or []):
        raise ValueError("its prompts are no texts")


def _record(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """The folder's record, if it is of this checkpoint; of an imported model, what its source said."""
    try:
        if folder.imported.exists():
            facts = read_object(folder.imported)
            return training_record(facts.get("steps"), facts.get("train_loss"))
        if not folder.record.exists():
            return {}
        record, sums = read_object(folder.record), read_object(checkpoint / "manifest.json")
        _check_kinds(record)
        return record if record["weights_sha256"] == sums["model.safetensors"] else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        path = folder.imported if folder.imported.exists() else folder.record
        raise CheckpointError(f"{path} cannot be read ({error}): remove it to do without") from None

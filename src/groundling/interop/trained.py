"""A trained model as every export receives it, wherever it comes from.

Invariant: the network is in fp32 on the CPU, and the tokenizer has as many ids as the network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError
from groundling.model.gpt2 import GPT2
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import RunFolder, find_checkpoint


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
    """The run's record.json; empty if these weights have none."""


def open_trained(path: Path) -> Trained:
    """The model of a run folder or of a checkpoint.

    Raises `CheckpointError` if there is none, or none intact.
    """
    checkpoint = find_checkpoint(path)
    model, tokenizer, window = load_model(checkpoint, torch.device("cpu"))
    folder = RunFolder(path if path != checkpoint else path.resolve().parent.parent)
    return Trained(model, tokenizer, window, folder.path.resolve().name, folder, _record(folder, checkpoint))


def _record(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """The folder's record, if it is of this checkpoint."""
    try:
        record: dict[str, Any] = json.loads(folder.record.read_text(encoding="utf-8"))
        sums = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        return record if record["weights_sha256"] == sums["model.safetensors"] else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder.record} cannot be read ({error}): remove it to do without") from None

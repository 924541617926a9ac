"""Folders as Hugging Face keeps models in, on the disk or on its hub.

Invariant: nothing outside the folder is read, whatever an index or a link in it says; of the hub, no pickle is taken
and no code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from groundling.errors import CheckpointError
from groundling.interop.pickles import pickled_weights
from groundling.interop.tensor_files import Weights, merged, safetensors_weights, training_record
from groundling.json_files import read_object

CONFIG = "config.json"
TRAINING = "metadata.json"
"""What the reference's script and `--format safetensors` write of the training: step, loss."""
WINDOW = "groundling_window"
"""Tokens of the windows of training, which exports of ours name in `CONFIG`, among transformers' own settings, or in
`TRAINING`: the position table may be longer."""
FORMS = {
    "model.safetensors": ("a folder with safetensors", safetensors_weights),
    "pytorch_model.bin": ("a folder with pickled weights", pickled_weights),
}
"""The file of weights, by preference; `FILE.index.json` if it is in several."""
SHARD = re.compile(r"[\w.-]+")
MAX_SHARDS = 1000
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""One of these a model on the hub must have: its snapshot may hold pickles, if another program fetched them."""
HUB_FILES = [
    CONFIG,
    *HUB_WEIGHTS,
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
]
"""What is taken of a model on the hub."""


def folder_weights(folder: Path) -> Weights:
    """The weights of a folder with a configuration. Raises `CheckpointError` if it has none that can be read."""
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt", ".safetensors", ".bin"):
            _inside(path)
    for name, (form, read) in FORMS.items():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            parts: Iterable[Weights] = [read(folder / name)]
        elif index.exists():
            parts = (read(folder / shard) for shard in _shards(folder, index))
        else:
            continue
        weights = merged(parts, folder, form)
        if index.exists() and not (folder / name).exists():
            _check_index(index, weights)
        return with_neighbours(weights, folder)
    raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin: give a folder with a model")


def hub_weights(name: str) -> Weights:
    """The weights of a model on the hub, in safetensors. Raises `CheckpointError` if it has none, or cannot be had."""
    folder = _download(name)
    if not any((folder / weights).exists() for weights in HUB_WEIGHTS):
        raise CheckpointError(
            f"{name} on the hub has no weights in safetensors: give another model, or download it and give its folder"
        )
    return folder_weights(folder)


def with_neighbours(weights: Weights, folder: Path) -> Weights:
    """The weights with what stands beside them: the configuration, the tokenizer, a word on the training
    if they say none themselves."""
    settings, record = dict(weights.settings), dict(weights.record)
    if (folder / CONFIG).exists():
        settings = read_object(folder / CONFIG)
    if not record and (folder / TRAINING).exists():
        training = read_object(folder / TRAINING)
        record = training_record(training.get("step"), training.get("loss"))
        settings = {WINDOW: training.get(WINDOW)} | settings
    return replace(weights, settings=settings, record=record, folder=folder)


def _inside(path: Path) -> None:
    """Raises `CheckpointError` if this entry is a link that leads out of the folder."""
    root = Path(os.path.realpath(path.parent))
    if root.parent.name == "snapshots":  # of the hub's cache, whose snapshots link to the blobs beside them
        root = root.parent.parent
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise CheckpointError(f"{path} is a link that leads out of its folder: copy the file itself there")


def _shards(folder: Path, index: Path) -> list[str]:
    """The names of the files that an index names, each in the folder itself."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files: copy or make it again")
    shards = sorted(set(places.values()))
    for name in shards:
        if not SHARD.fullmatch(name) or name in (".", ".."):
            raise CheckpointError(
                f"{index} names the file {name[:100]!r}, which is not in its folder: give another model"
            )
        _inside(folder / name)
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{index} names {len(shards):,} files, far more than a GPT-2 has: give another model")
    return shards


def _check_index(index: Path, weights: Weights) -> None:
    named = read_object(index)["weight_map"].keys()
    if wrong := sorted(named ^ weights.shapes.keys()):
        what = "names {} that no file holds" if wrong[0] in named else "does not name {}, which a file holds"
        raise CheckpointError(f"{index} {what.format(wrong[0][:100])}: copy or make the model again")


def _download(name: str) -> Path:
    """The folder of a model on the hub, from its cache if it is there, or if the hub cannot be asked.

    Raises `CheckpointError` if the hub has no such model or cannot be asked.
    """
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OIDCError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError, OIDCError) as error:  # of these kinds are its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"there is no file or folder {name}, and no model of that name was to be had from the hub"
            f" ({reason[0].rstrip('.')[:200]}):"
            " check the path, the name, and the network"
        ) from None

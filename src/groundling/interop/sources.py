"""What a user may name as a model: which of the readers is for it.

Invariant: a source is told by what it is, never by its name alone, and nothing but regular files is opened.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from groundling.errors import CheckpointError
from groundling.files import regular_file
from groundling.interop.foreign import Imported, make_own
from groundling.interop.hub_folder import HUB_NAME, folder_weights, hub_weights, with_neighbours
from groundling.interop.pickles import pickled_weights
from groundling.interop.tensor_files import Weights, safetensors_weights
from groundling.training import checkpoint

FILE_NAMES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx", ".zip", ".json")
"""Ends of names that are files', not models' on the hub."""
READABLE = "a run, a Hugging Face folder or name, a .safetensors file or a PyTorch checkpoint"


def is_run(path: Path) -> bool:
    """Whether the path is a run folder, or a checkpoint of one."""
    if not path.is_dir():
        return False
    begun = all((path / name).exists() for name in ("identity.json", "origin.json"))
    return begun or (path / checkpoint.MANIFEST).exists() or bool(checkpoint.complete(path / "checkpoints"))


def open_foreign(source: Path, tokenizer: Path | None = None, n_head: int | None = None) -> Imported:
    """The model that a user means by a path, or by a name on the hub.

    Raises `CheckpointError` or `ConfigError` if it cannot be made our own.
    """
    return make_own(_weights(source), tokenizer, n_head)


def _weights(source: Path) -> Weights:
    if source.is_dir():
        return folder_weights(source)
    if not source.exists() and not source.is_symlink():
        name = source.as_posix()
        is_path = len(source.parts) > 1 and Path(source.parts[0]).exists()  # runs/gtp2, where runs/ is here
        if HUB_NAME.fullmatch(name) and source.suffix not in FILE_NAMES and not is_path:
            return hub_weights(name)
        raise CheckpointError(f"there is no file or folder {source}: give {READABLE}")
    try:
        with regular_file(source).open("rb") as file:
            begin = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({error.strerror}): check the path") from None
    is_pickle = begin[:4] == b"PK\x03\x04" or begin[:2] == b"\x80\x02"
    if begin[8:9] == b"{" or (source.suffix == ".safetensors" and not is_pickle):  # a header's length can begin so, too
        weights = safetensors_weights(source)
    elif is_pickle:
        weights = pickled_weights(source)
    else:
        raise CheckpointError(f"{source} is no model that Groundling reads: give {READABLE}")
    if weights.settings:  # its own go before those of a file beside it
        return replace(weights, folder=source.parent)
    return with_neighbours(weights, source.parent)

"""Checkpoints: directories that are whole or absent, and sufficient.

Invariant: a directory with a matching manifest holds everything that continues the run bit for bit
(weights, optimizer moments, step, stop-rule counters) and everything that uses the model (its size, its
tokenizer, its window). The manifest, with the SHA-256 of every other file, is written last.

    checkpoints/step-00002145/
        model.safetensors      weights, as transformers reads them
        optimizer.safetensors  the optimizer's moments, by parameter name (not of imported models)
        model.json             GPTConfig and the training window
        tokenizer.json         Hugging Face tokenizers
        state.json             step, tokens seen, wall time, stop rule
        manifest.json          SHA-256 of each file above
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundling import machine
from groundling.corpus.tokenizer import MAX_BYTES, Tokenizer
from groundling.errors import CheckpointError, ConfigError, RunFailed
from groundling.files import atomic_directory, regular_file, sha256_of, write_json
from groundling.json_files import read_object
from groundling.model import weights
from groundling.model.compact import CompactGPT2, expanded
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.optim.optimizer import OptimConfig

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
TENSOR_FILES = {WEIGHTS: 1, "optimizer.safetensors": 3}
"""Files of tensors, and how often the network's bytes they may take: AdamW keeps two moments of each parameter."""
NEEDED = (WEIGHTS, "model.json", "tokenizer.json")
USED = (*NEEDED, "state.json")
"""What a model is used with; going on with its training takes the optimizer's moments, too."""
FILES = (*TENSOR_FILES, "model.json", "tokenizer.json", "state.json")
"""What a manifest may name: nothing outside its folder."""
MAX_HEADER_BYTES = 4 << 20
NAME = "step-{:08d}"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    save_every: int | str = "15m"
    """Interval between checkpoints: steps (500), minutes (15m), or 0 for none but the last."""
    keep: int = 2
    """Newest checkpoints that stay on the disk."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep is {self.keep}: give 1 or more")
        if not re.fullmatch(r"\d+|\d+(\.\d+)?m", str(self.save_every)):
            raise ConfigError(f"checkpoint.save_every is {self.save_every!r}: give steps (500) or minutes (15m)")

    @property
    def wanted(self) -> bool:
        """Whether there should be others than the last."""
        return float(str(self.save_every).removesuffix("m")) > 0

    def due(self, n_steps: int, seconds_since_last: float) -> bool:
        """Whether a checkpoint should be written after so many steps, so long after the last one."""
        number = float(str(self.save_every).removesuffix("m"))
        if not self.wanted:
            return False
        if str(self.save_every).endswith("m"):
            return seconds_since_last >= 60 * number
        return n_steps % number == 0


def save(
    root: Path,
    n_steps: int,
    model: GPT2,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    tokenizer: Tokenizer,
    window: int,
    keep: int,
    spared_step: int | None = None,
    replace: bool = False,
) -> Path:
    """Write a checkpoint after `n_steps` steps and remove all but the newest `keep`, and that of `spared_step`; returns
    its directory.

    There must be none of that step, unless it is to be replaced.

    Without an optimizer it holds a model that was trained elsewhere.
    Raises `RunFailed` if the disk is full or cannot be written; older checkpoints then stay.
    """
    path = root / NAME.format(n_steps)
    try:
        with atomic_directory(path, overwrite=replace) as directory:
            full = expanded(model)
            weights.save(full, directory / WEIGHTS)
            if optimizer is not None:
                save_file(_optimizer_tensors(model, optimizer), directory / "optimizer.safetensors")
            write_json(directory / "model.json", {**asdict(full.config), "window": window})
            tokenizer.save(directory / "tokenizer.json")
            write_json(directory / "state.json", dict(state))
            sums = {file.name: sha256_of(file) for file in sorted(directory.iterdir())}
            write_json(directory / MANIFEST, sums)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"the checkpoint {path} cannot be written ({error}): free the disk, then begin again (train: --resume)"
        ) from None
    for old in complete(root)[:-keep]:
        if spared_step is None or old.name != NAME.format(spared_step):
            shutil.rmtree(old, ignore_errors=True)  # what cannot be removed yet is old at the next save, too
    return path


def n_bytes(model: GPTConfig, optim: OptimConfig) -> int:
    """What a checkpoint takes on the disk, but for names and shapes: weights, and their moments, in fp32.

    AdamW has two moments of each weight, Muon one of those in the matrices that it moves.
    """
    n_moved_by_muon = 12 * model.n_layer * model.n_embd**2 if optim.kind == "muon" else 0
    return 4 * (3 * model.n_parameters() - n_moved_by_muon)


def complete(root: Path) -> list[Path]:
    """Checkpoints under `root` that reached their final name, oldest first."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def damage(path: Path, names: Collection[str] = FILES) -> str | None:
    """What is wrong with a checkpoint's files of these names, or None if their sums in its manifest hold."""
    try:
        sums = read_object(path / MANIFEST)
        if missing := [name for name in NEEDED if name not in sums]:
            return f"its manifest lacks {missing[0]}"
        for name, expected in sums.items():
            if name not in FILES:
                return f"its manifest names {name[:80]!r}, which no checkpoint has"
            if name not in names:
                continue
            if (path / name).stat().st_size > _most_bytes(path, name):
                return f"{name} is far larger than its network"
            if sha256_of(regular_file(path / name)) != expected:
                return f"{name} has changed since it was written"
    except (OSError, ValueError) as error:
        return f"its manifest or a file is missing or unreadable ({error})"
    return None


def _most_bytes(path: Path, name: str) -> int:
    """How large a file of a checkpoint may be, so that summing one from elsewhere comes to an end."""
    if name not in TENSOR_FILES:
        return MAX_BYTES
    config, _ = _size(path)
    needed, memory = 4 * config.n_parameters(), machine.memory_bytes()
    if memory is not None and needed > memory:
        raise ValueError(f"it says a network of {needed:,} bytes, more than this machine has memory")
    return TENSOR_FILES[name] * needed + MAX_HEADER_BYTES


def newest_intact(root: Path, names: Collection[str] = FILES) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of whose files these are undamaged, and what is wrong with each newer one."""
    damaged: dict[Path, str] = {}
    for path in reversed(complete(root)):
        wrong = damage(path, names)
        if wrong is None:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def set_aside(damaged: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts as one nor is lost; returns its new path."""
    aside = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(aside, ignore_errors=True)
    damaged.rename(aside)
    return aside


def give_up_newest(root: Path) -> tuple[Path, Path]:
    """Set the newest checkpoint aside, whose weights the update before it ruined; where it was, and where it is.

    Raises `RunFailed` if there is no older one.
    """
    *older, newest = complete(root)
    if not older:
        raise RunFailed(
            f"the weights of {newest} give no finite loss, and no older checkpoint is there: begin anew, with other"
            " weights or a lower schedule.peak"
        )
    return newest, set_aside(newest)


def weights_sum(path: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its manifest has it. Raises `CheckpointError` if it has none."""
    sums = read_object(path / MANIFEST)
    if type(sums.get(WEIGHTS)) is not str:
        raise CheckpointError(f"{path / MANIFEST} lacks {WEIGHTS}: copy or make the checkpoint again")
    return str(sums[WEIGHTS])


def window_of(path: Path) -> int:
    """Tokens of the windows that a checkpoint was trained on. Raises `CheckpointError` if it does not say."""
    return _size(path)[1]


def load_state(path: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises `CheckpointError` if there are none."""
    state = read_object(path / "state.json")
    if type(state.get("n_steps")) is not int or state["n_steps"] < 0:
        raise CheckpointError(f"{path / 'state.json'} says no number of steps: copy or make it again")
    return state


def restore(path: Path, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and moments into the model and its optimizer.

    Raises `CheckpointError` if the files are damaged or belong to another network.
    """
    full = expanded(model)
    weights.load(full, path / WEIGHTS)
    if isinstance(model, CompactGPT2):
        model.take(full)
    try:
        tensors = load_file(path / "optimizer.safetensors")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / 'optimizer.safetensors'} cannot be read: {error}") from None
    state: dict[Tensor, dict[str, Tensor]] = {}
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        moment, _, parameter_name = name.partition("/")
        parameter = named.get(parameter_name)
        if parameter is None or (moment != "step" and tensor.shape != parameter.shape):
            raise CheckpointError(f"{path / 'optimizer.safetensors'} holds {name}, which this model does not have")
        state.setdefault(parameter, {})[moment] = tensor.to(parameter.device)
    optimizer.state.clear()
    optimizer.state.update(state)


def load_model(path: Path, device: torch.device) -> tuple[GPT2, Tokenizer, int]:
    """The model of a checkpoint on a device, its tokenizer and the window it was trained on.

    It is one that `find_checkpoint` gave, whose sums hold. Raises `CheckpointError` if its files hold no such model.
    """
    config, window = _size(path)
    weights.check_size(config, path / WEIGHTS)  # a folder from elsewhere may claim what it likes
    model = weights.unfilled(config, device)
    weights.load(model, path / WEIGHTS)
    tokenizer = Tokenizer.load(path / "tokenizer.json", n_rows=config.n_vocab)
    if tokenizer.n_vocab != config.n_vocab:
        raise CheckpointError(
            f"{path} has {config.n_vocab:,} ids and a tokenizer of {tokenizer.n_vocab:,}: give another"
        )
    return model.eval(), tokenizer, window


def _size(path: Path) -> tuple[GPTConfig, int]:
    """The network's size and window, as a checkpoint says them. Raises `CheckpointError` if it does not."""
    try:
        facts = read_object(path / "model.json")
        if not all(type(size) is int and 0 < size < 2**31 for size in facts.values()):
            raise ValueError("not all of it are positive numbers")
        window = facts.pop("window")
        config = GPTConfig(**facts)
        if window > config.n_ctx:
            raise ValueError(f"a window of {window:,} in {config.n_ctx:,} positions")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / 'model.json'} says no size of a network: {error}") from None
    return config, window


def _optimizer_tensors(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as "moment/parameter name", contiguous, on the CPU."""
    return {
        f"{moment}/{name}": tensor.contiguous().cpu()
        for name, parameter in model.named_parameters()
        for moment, tensor in optimizer.state.get(parameter, {}).items()
    }

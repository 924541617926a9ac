"""A run's folder: where its files stand, and what may be continued in it.

Invariant: one process at a time, and only with the text, tokenizer and architecture that it was made
from. A folder that could not begin its run does not stay behind.

    runs/gpt2/
        config.yaml      the whole configuration, resolved
        identity.json    what must not change: text, tokenizer, architecture
        train.bin        tokens of the training text (heldout.bin: of the held-out text)
        metrics.jsonl    one line per step, and one per evaluation
        checkpoints/     see checkpoint.py
        record.json, loss.png, samples.txt, written at the end
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from groundling.corpus.shards import TokenFile, make_header
from groundling.errors import CheckpointError
from groundling.files import atomic_file, locked, write_json
from groundling.training import checkpoint

NO_SUM = "0" * 64
"""A run's copy of tokens is not looked up by what it was made of."""


class RunFolder:
    """Paths of a run, new or to be continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.identity = path / "identity.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.record = path / "record.json"
        self.curve = path / "loss.png"
        self.samples = path / "samples.txt"

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.identity.exists()

    def preset(self) -> str:
        """The preset that the run was made with.

        Raises `CheckpointError` if its configuration is missing or damaged.
        """
        try:
            return str(yaml.safe_load(self.config.read_text(encoding="utf-8"))["preset"])
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.config} cannot be read ({error}): begin the run anew with another --out"
            ) from None

    @contextlib.contextmanager
    def open(self, identity: dict[str, Any], resume: bool) -> Iterator[None]:
        """Hold the folder for this process, made new or checked against the identity of the run to continue.

        Raises `CheckpointError` if it is in use, holds a run that was not to be resumed, or one that was
        made from something else. A new folder is removed again if no checkpoint came of it.
        """
        if resume and not self.exists():
            raise CheckpointError(f"{self.path} holds no run to resume: leave out --resume to begin one")
        if not resume and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            what = "already holds a run: give --resume to continue it, or another --out"
            raise CheckpointError(f"{self.path} {what if self.exists() else 'is not empty: give another --out'}")
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            if resume:
                self._check(identity)
            else:
                write_json(self.identity, identity)
            try:
                yield
            finally:
                if not resume and not checkpoint.complete(self.checkpoints):
                    self._remove(itself=new)

    def keep_tokens(self, name: str, file: TokenFile) -> None:
        """Keep a copy of the run's tokens in its folder, so that it needs neither the cache nor the text again."""
        target = self.path / f"{name}.bin"
        if not target.exists():
            header = make_header(file.tokens.dtype, file.n_tokens, source=NO_SUM, tokens=file.sha256())
            with atomic_file(target) as copy:
                copy.write(header)
                for tokens in file.scan():
                    copy.write(tokens.tobytes())

    def tokens(self, name: str) -> TokenFile | None:
        """The tokens kept under this name (train, heldout), or None."""
        path = self.path / f"{name}.bin"
        return TokenFile.open(path) if path.exists() else None

    def _check(self, identity: dict[str, Any]) -> None:
        known = json.loads(self.identity.read_text(encoding="utf-8"))
        for what, value in identity.items():
            if known.get(what) != value:
                raise CheckpointError(
                    f"{self.path} was made with another {what} ({known.get(what)}, now {value}): give another --out"
                )

    def _remove(self, itself: bool) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if itself:
            self.path.rmdir()


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a run folder or by a checkpoint directory.

    Raises `CheckpointError` if there is none, or none intact.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no run folder: give the folder that `groundling train` printed")
    if (path / checkpoint.MANIFEST).exists():
        return path
    newest, notes = checkpoint.newest_intact(path / "checkpoints")
    if newest is None:
        raise CheckpointError("; ".join(notes) or f"{path} holds no checkpoint: train it first, or give another folder")
    return newest

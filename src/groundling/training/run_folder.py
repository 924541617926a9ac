"""A run's folder: where its files stand, and what may be continued in it.

Invariant: one process at a time, and only with the text, tokenizer, architecture and loss that it was made
with. A folder that could not begin its run does not stay behind.

    runs/gpt2/
        config.yaml      the whole configuration, resolved
        identity.json    what must not change: text, held-out text, tokenizer, architecture, loss, initial
                         model, head vocabulary, optimizer, initial position table
        origin.json      the text's name and size, and what the run began to compute on
        places.json      the names of the text's documents, in order
        tokenizer.json   Hugging Face tokenizers
        train.bin        tokens of the training text (heldout.bin: of the held-out text)
        metrics.jsonl    one line per step, and one per evaluation
        log.txt          what was said while it ran
        checkpoints/     see checkpoint.py
        record.json, loss.png, samples.txt, written at the end
        evaluated.json   the losses that `groundling evaluate` last took, and the sum of the weights it took them of

A folder that `groundling import` made has a checkpoint of step 0, tokenizer.json and imported.json, no text and no run.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from groundling.corpus.load import Corpus
from groundling.corpus.places import packaged_documents
from groundling.corpus.shards import TOKENS_SUM, TokenFile, make_header
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, CorpusError
from groundling.files import LOCK, PARTIAL, atomic_file, locked, write_json, write_text
from groundling.json_files import read_bounded, read_object
from groundling.training import checkpoint
from groundling.training.run_file_checks import check_losses, check_record, check_settings

NO_SUM = "0" * 64
"""A run's copy of tokens is not looked up by what it was made of."""


MAX_PLACES_BYTES = 64 << 20
"""A name for each document of a text of many."""
MAX_CONFIG_YAML_BYTES, MAX_RECORD_BYTES = 4 << 20, 8 << 20
"""A configuration takes a thousand bytes, and the names of many sources as much as a command line holds, 2 MiB. A
record holds both the configuration and the command."""

BEFORE_BEGINNING = ("config.yaml", "train.bin", "heldout.bin", "tokenizer.json", "places.json", "origin.json", LOCK)
"""What a run writes before it has begun, which identity.json says."""

INITIAL = "initial model"
"""SHA-256 of the weights that a run began with, if they were not drawn (`model.weights.sha256_of_weights`)."""

HEAD_VOCABULARY = "head vocabulary"
"""Whether ids that the text lacks share a row: the name in identities."""

OPTIMIZER = "optimizer"
"""`OptimConfig.kind`, whose moments are in the checkpoints: the name in identities."""

INITIAL_POSITIONS = "initial position table"
"""What the position table began with: the name in identities."""

UNSAID = {"loss": "plain", INITIAL: None, HEAD_VOCABULARY: "full", OPTIMIZER: "adamw", INITIAL_POSITIONS: "random"}
"""What identities leave out that were written before there was a choice."""


class _PlainLoader(yaml.SafeLoader):
    """YAML without references, which can say a thousand million things in a few lines."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it refers to itself")
        return super().compose_node(parent, index)


class RunFolder:
    """Paths of a run, new or to be continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.identity = path / "identity.json"
        self.origin = path / "origin.json"
        self.places = path / "places.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.record = path / "record.json"
        self.imported = path / "imported.json"
        self.evaluated = path / "evaluated.json"
        self.curve = path / "loss.png"
        self.samples = path / "samples.txt"

    def initial_sum(self) -> str | None:
        """SHA-256 of the weights that the run began with; None if they were drawn."""
        identity = read_object(self.identity)
        return identity.get(INITIAL)

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.identity.exists()

    @contextlib.contextmanager
    def open(self, identity: dict[str, Any], config: str, resume: bool) -> Iterator[None]:
        """Hold the folder for this process, made new or checked against the identity of the run to continue.

        `config` is the YAML that a new run begins with. Raises `CheckpointError` if the folder is in use or
        cannot be made, holds a run that was not to be resumed, or one that was made from something else. A
        new folder is removed again, with the parents made for it, if no step was taken in it.
        """
        if resume and not self.exists():
            raise CheckpointError(f"{self.path} holds no run to resume: leave out --resume to begin one")
        made: list[Path] = []
        try:
            if not resume:
                self.refuse_used()
            made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be used ({error.strerror}): give another --out") from None
        with locked(self.path):
            if resume:
                self._check(identity)
            else:
                for left_over in self._left_over():
                    left_over.unlink()
            try:
                if not resume:
                    write_text(self.config, config)
                yield
            finally:
                if not resume and not self._has_steps():
                    self._remove(made)

    def refuse_used(self) -> None:
        """Raises `CheckpointError` if a new run cannot begin here because something is here already."""
        is_used = self.path.exists() and (not self.path.is_dir() or any(p.name != LOCK for p in self.path.iterdir()))
        if is_used and not self._left_over():
            what = "already holds a run: give --resume to continue it, or another --out"
            other = "holds an imported model: give another --out"
            if not self.exists():
                what = other if self.imported.exists() else "is not empty: give another --out"
            raise CheckpointError(f"{self.path} {what}")

    def _left_over(self) -> list[Path]:
        """What a run left here that was killed before it had begun; empty if anything else is here."""
        found = list(self.path.iterdir()) if self.path.is_dir() else []
        ours = [path for path in found if path.name in BEFORE_BEGINNING or path.name.endswith(PARTIAL)]
        begun = self.exists() or not (self.path / LOCK).exists()
        return [] if begun or len(ours) < len(found) else [path for path in ours if path.name != LOCK]

    def refuse_another_text(self, name: str, sha256: str) -> None:
        """Raises `CheckpointError` if the run was made with another text than the one of this name and sum."""
        if read_object(self.identity).get("text") != sha256:
            before = self._origin().get("text", {}).get("name", "unnamed")
            change = f"{before}, now {name}" if name != before else f"{name}, of which another part or version is given"
            raise CheckpointError(
                f"{self.path} was made with another text ({change}): leave out --corpus and what is held out to"
                " continue it, or give another --out to begin anew"
            )

    def _has_steps(self) -> bool:
        written = self.metrics.exists() and self.metrics.stat().st_size > 0
        return written or any(checkpoint.complete(self.checkpoints))  # never remove weights, whatever else is gone

    def _remove(self, made: list[Path]) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path in made:  # the folder itself, then its parents, in which another run may have begun meanwhile
            with contextlib.suppress(OSError):
                path.rmdir()

    def _check(self, identity: dict[str, Any]) -> None:
        known = UNSAID | read_object(self.identity)
        for what, value in identity.items():
            if known.get(what) != value:
                raise CheckpointError(
                    f"{self.path} was made with another {what}{self._difference(what, known.get(what), value)}:"
                    " leave that setting out to continue it, or give another --out to begin anew"
                )

    def _difference(self, what: str, before: Any, now: Any) -> str:
        """In words that a user knows; nothing where only sums tell two things apart."""
        if isinstance(before, dict) and isinstance(now, dict):
            changed = [name for name in before if before[name] != now.get(name)]
            return f" ({', '.join(f'{name} {before[name]}, now {now.get(name)}' for name in changed)})"
        if what in ("loss", HEAD_VOCABULARY, OPTIMIZER, INITIAL_POSITIONS):
            return f" ({before}, now {now})"
        known = self._origin().get(what)
        return f" ({known})" if isinstance(known, str) else ""

    def _origin(self) -> dict[str, Any]:
        """What `keep_text` wrote; empty if the run ended before that."""
        return read_object(self.origin) if self.origin.exists() else {}

    def _keep_tokens(self, name: str, file: TokenFile) -> None:
        target = self.path / f"{name}.bin"
        if not target.exists():
            header = make_header(file.tokens.dtype, file.n_tokens, source=NO_SUM, tokens=file.sha256())
            with atomic_file(target) as copy:
                copy.write(header)
                for tokens in file.scan():
                    copy.write(tokens.tobytes())

    def keep_text(self, corpus: Corpus, runtime: dict[str, str], identity: dict[str, Any]) -> None:
        """Keep what the run is made of, so that it needs neither the text nor the cache again: it has begun then."""
        self._keep_tokens("train", corpus.train)
        if corpus.heldout is not None:
            self._keep_tokens("heldout", corpus.heldout)
        corpus.tokenizer.save(self.tokenizer)
        text = {name: getattr(corpus, name) for name in ("name", "sha256", "n_bytes", "n_documents")}
        write_json(self.places, {"documents": list(corpus.document_names)})
        write_json(self.origin, {"text": text, "tokenizer": corpus.tokenizer.name, "runtime": runtime})
        write_json(self.identity, identity)

    def document_names(self) -> tuple[str, ...]:
        """The names of the training text's documents; of a run that did not keep them, what its settings still tell.

        Empty if those are not there either. Raises `CheckpointError` if places.json is damaged.
        """
        try:
            if self.places.exists():
                return tuple(map(str, read_object(self.places, MAX_PLACES_BYTES)["documents"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.places} cannot be read ({error}): remove it to do without") from None
        try:
            sources = [str(source) for source in self.settings()["text"]["sources"]]
        except (CheckpointError, TypeError, KeyError):
            return ()
        return packaged_documents(sources) or (", ".join(sources),)

    def text(self) -> Corpus:
        """The text that `keep_text` kept. Raises `CheckpointError` if it is missing, `CorpusError` if it is damaged."""
        has_tokens = (self.path / "train.bin").exists()
        if not has_tokens and self.imported.exists():
            raise CheckpointError(f"{self.path} was imported, so it has no training text: give a run that was trained")
        if not has_tokens or not self.origin.exists():
            raise CheckpointError(f"{self.path} lacks train.bin or origin.json: begin the run anew with another --out")
        origin = read_object(self.origin)
        kinds = {"name": str, "sha256": str, "n_bytes": int, "n_documents": int}
        text = origin.get("text")
        if not (isinstance(text, dict) and {name: type(value) for name, value in text.items()} == kinds):
            raise CheckpointError(f"{self.origin} does not describe a text: begin the run anew with another --out")
        tokenizer = Tokenizer.load(self.tokenizer, str(origin.get("tokenizer")))
        train, heldout = (self.tokens(name, tokenizer.n_vocab) for name in ("train", "heldout"))
        if train is None:
            raise CheckpointError(f"{self.path} lost its train.bin just now: begin the run anew with another --out")
        return Corpus(tokenizer=tokenizer, train=train, heldout=heldout, **text)

    def settings(self) -> dict[str, Any]:
        """The configuration that the run was begun or last resumed with, as YAML holds it.

        Raises `CheckpointError` if it is missing or damaged.
        """
        try:
            settings = yaml.load(read_bounded(self.config, MAX_CONFIG_YAML_BYTES), _PlainLoader)
            check_settings(settings)
            return dict(settings)
        except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.config} cannot be read ({error}): begin the run anew with another --out"
            ) from None

    def keep_losses(self, weights_sha256: str, losses: dict[str, float | None]) -> None:
        """Keep losses over the whole text, by metric name, of the weights of this sum."""
        write_json(self.evaluated, {"weights_sha256": weights_sha256, "losses": losses})

    def kept_losses(self, weights_sha256: str) -> dict[str, float | None]:
        """What `keep_losses` kept of the weights of this sum; empty if that was nothing, or is damaged."""
        try:
            kept = read_object(self.evaluated)
            check_losses(kept["losses"])
            return dict(kept["losses"]) if kept["weights_sha256"] == weights_sha256 else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def kept_record(self, checkpoint_path: Path) -> dict[str, Any]:
        """record.json, if it is of this checkpoint's weights; empty if it is of others, or if there is none.

        Raises `CheckpointError` if it cannot be read, or is not what a run writes.
        """
        if not self.record.exists():
            return {}
        try:
            record = read_object(self.record, MAX_RECORD_BYTES)
            check_record(record)
        except ValueError as error:
            raise CheckpointError(f"{self.record} is no record of a run ({error}): remove it to do without") from None
        return record if record["weights_sha256"] == checkpoint.weights_sum(checkpoint_path) else {}

    def runtime(self) -> dict[str, str]:
        """What the run began to compute on (`Runtime.facts`); raises `CheckpointError` if they are lost."""
        facts = read_object(self.origin).get("runtime")
        if not isinstance(facts, dict):
            raise CheckpointError(f"{self.origin} does not say where the run began: begin it anew with another --out")
        return facts

    def tokens(self, name: str, n_vocab: int) -> TokenFile | None:
        """The tokens kept under this name (train, heldout), or None.

        Raises `CorpusError` if they are damaged, or of a tokenizer with more ids than `n_vocab`.
        """
        path = self.path / f"{name}.bin"
        if not path.exists():
            return None
        file = TokenFile.open(path)
        if file.header[TOKENS_SUM].hex() != file.sha256():  # an id that is none would be the first to be noticed
            raise CorpusError(f"{path} is damaged: restore it, or train again with another --out")
        if (largest := file.max_token()) >= n_vocab:
            raise CorpusError(
                f"{path} has the token {largest:,}, and the run has {n_vocab:,} ids: restore it, or train again with"
                " another --out"
            )
        return file


def folder_of(path: Path, checkpoint_path: Path) -> RunFolder:
    """The run folder of a checkpoint that a user named by `path`, itself or by its run; alone, it is its own folder."""
    if path != checkpoint_path:
        return RunFolder(path)
    named, parent = checkpoint_path.absolute().parent, checkpoint_path.resolve().parent  # either may be behind a link
    folder = RunFolder(named.parent)
    if named.name == "checkpoints" and (folder.exists() or folder.imported.exists()):
        return folder
    return RunFolder(parent.parent if parent.name == "checkpoints" else checkpoint_path)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a run folder or by a checkpoint directory, with an undamaged model.

    Raises `CheckpointError` if there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no run folder: give the folder that `groundling train` printed")
    if (path / checkpoint.MANIFEST).exists():
        if (wrong := checkpoint.damage(path, checkpoint.USED)) is not None:
            raise CheckpointError(f"the checkpoint {path} cannot be used: {wrong}")
        return path
    newest, damaged = checkpoint.newest_intact(path / "checkpoints", checkpoint.USED)
    if newest is None and damaged:
        newest_name, wrong = next(iter(damaged.items()))
        raise CheckpointError(
            f"every checkpoint of {path} is damaged ({newest_name.name}: {wrong}):"
            " begin the run anew with another --out"
        )
    if newest is None:
        raise CheckpointError(f"{path} holds no checkpoint: train it first, or give another folder")
    return newest

"""Documents to a token file: constant memory, all cores, and no work lost when it is interrupted.

Invariant: the file depends on the documents and the tokenizer alone. Between two documents stands one
`<|endoftext|>`; how often the writing was interrupted leaves no trace. A file under its final name holds all its
tokens. It is written as `.NAME.partial`, which a small journal makes resumable: the journal names only tokens that were
synced before it was written, so a kill at any moment costs at most the work since the last entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from groundling.corpus import shards
from groundling.corpus.documents import Document
from groundling.corpus.shards import TokenFile
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CorpusError
from groundling.files import HASH_BLOCK_BYTES, is_at, lock, sync_file, write_json

Progress = Callable[[int, int], None]
"""Called with the bytes of text that are done, and all of them."""

FORMAT = b"groundling tokens 1"
"""Part of every file's source sum: changing it makes every cached file stale."""

BATCH_BYTES = 1 << 21
BATCH_BLOCKS = 1 << 10
"""What is encoded at a time: Hugging Face's encodings take some 100 bytes a token until they are copied."""

JOURNAL_BYTES = 1 << 25
"""Text between two entries of the journal: some ten seconds of two cores."""


class Block(NamedTuple):
    """A block of text, and what to know of it when it is written."""

    text: str
    n_bytes: int
    begins_document: bool
    """Whether `<|endoftext|>` goes before it."""


@dataclass(frozen=True)
class Done:
    """How far a partial file has come. Replaced as a whole, so that an interrupt finds it consistent."""

    source: str
    n_blocks: int = 0
    n_tokens: int = 0
    n_bytes: int = 0


def source_sum(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    """SHA-256 of what a token file is made of: format, tokenizer, and the sum of each document in order."""
    digest = hashlib.sha256(FORMAT)
    for part in (tokenizer.sha256, *(document.sha256 for document in documents)):
        digest.update(bytes.fromhex(part))
    return digest.hexdigest()


def write_tokens(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    path: Path,
    progress: Progress | None = None,
    journal_bytes: int = JOURNAL_BYTES,
) -> TokenFile:
    """The token file of the documents at `path`; what was already done of it is not done again.

    A whole and undamaged file of the same documents and tokenizer is opened as it is; a partial one is
    continued. Whoever else writes the same path at the same time is waited for. An exception out of
    `progress` interrupts the writing like a signal would, and so does a disk that fails while the text is read.
    Raises `CorpusError` if the text gives fewer than two tokens or more than 2**31 - 1, if a document
    changes while it is read, or if the file cannot be written.
    """
    source = source_sum(documents, tokenizer)
    if whole := _whole(path, source):
        return whole
    with _writing(path), PartialFile.claim(path, source, shards.token_dtype(tokenizer.n_vocab)) as partial:
        if whole := _whole(path, source):  # another process wrote it while this one waited
            partial.discard()
            return whole
        total_bytes = sum(document.n_bytes for document in documents)
        recorded = partial.done.n_bytes
        try:
            remaining = itertools.islice(_blocks(documents), partial.done.n_blocks, None)
            for batch in _batches(remaining):
                partial.append(batch, _encode(batch, tokenizer))
                if partial.done.n_bytes - recorded >= journal_bytes:
                    partial.record()
                    recorded = partial.done.n_bytes
                if progress:
                    progress(partial.done.n_bytes, total_bytes)
            if partial.done.n_tokens < 2:
                raise CorpusError(_too_short(documents))
            partial.finish(path)
        except CorpusError as error:
            # The disk's trouble, not the text's: another try goes on from here.
            if isinstance(error.__cause__, OSError):
                with contextlib.suppress(OSError):
                    partial.record()
            else:  # no other try can end better
                partial.discard()
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                partial.record()
            raise
    return TokenFile.open(path)


def _too_short(documents: Sequence[Document]) -> str:
    """What is said of documents, one at most, that give fewer than two tokens."""
    which = documents[0].name if documents else "the text"
    if documents and documents[0].start:
        which, advice = f"the part of {which} that is held out", "hold out more, or name a held-out text"
    else:
        advice = "give a longer text"
    return f"{which} has fewer tokens than the two that are needed to predict one from the other: {advice}"


def _whole(path: Path, source: str) -> TokenFile | None:
    """The file at `path` if it holds exactly what `source` stands for."""
    if path.is_file():
        with contextlib.suppress(CorpusError):  # a damaged one is made anew
            file = TokenFile.open(path)
            return file if file.holds(source) else None
    return None


def _blocks(documents: Sequence[Document]) -> Iterator[Block]:
    """The blocks of all documents; checks at each document's end that it still has its sum."""
    for number, document in enumerate(documents):
        begins = number > 0
        for text in document.blocks_as_summed():
            yield Block(text, len(text.encode("utf-8")), begins)
            begins = False


def _batches(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    batch: list[Block] = []
    n_bytes = 0
    for block in blocks:
        batch.append(block)
        n_bytes += block.n_bytes
        if n_bytes >= BATCH_BYTES or len(batch) == BATCH_BLOCKS:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[Block], tokenizer: Tokenizer) -> shards.Tokens:
    dtype = shards.token_dtype(tokenizer.n_vocab)
    separator = np.array([tokenizer.end_of_text_id], dtype=dtype)
    arrays = []
    for block, ids in zip(batch, tokenizer.encode_blocks([block.text for block in batch]), strict=True):
        if block.begins_document:
            arrays.append(separator)
        arrays.append(np.array(ids, dtype=dtype))
    return np.concatenate(arrays)


class PartialFile:
    """`.NAME.partial` and its journal: tokens on their way to a file NAME."""

    def __init__(self, file: IO[bytes], path: Path, journal: Path, source: str, dtype: shards.TokenType) -> None:
        self._file = file
        self._path = path
        self._journal = journal
        self._dtype = dtype
        self.done = self._recorded(source)
        end = shards.HEADER_BYTES + self.done.n_tokens * dtype.itemsize
        file.truncate(end)  # drops what came after the last entry, or makes room for the header
        file.seek(end)

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, source: str, dtype: shards.TokenType) -> Iterator[PartialFile]:
        """The partial file of `path`, for this process alone; waits while another one has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        while True:
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                lock(file, wait=True)
                if is_at(partial, file):  # it may have been renamed meanwhile
                    yield cls(file, partial, path.with_name(f".{path.name}.journal.json"), source, dtype)
                    return

    def _recorded(self, source: str) -> Done:
        """The last entry of the journal, if it is of the same source and its tokens are there."""
        try:
            done = Done(**json.loads(self._journal.read_text(encoding="utf-8")))
            n_bytes = shards.HEADER_BYTES + done.n_tokens * self._dtype.itemsize
            if done.source == source and n_bytes <= os.fstat(self._file.fileno()).st_size:
                return done
        except (OSError, ValueError, TypeError):
            pass  # no journal, or not one of ours: begin at the beginning
        self._journal.unlink(missing_ok=True)  # it would be believed once the file has grown past what it says
        return Done(source)

    def append(self, blocks: Sequence[Block], tokens: shards.Tokens) -> None:
        """Write the tokens of some blocks."""
        n_tokens = self.done.n_tokens + len(tokens)
        if n_tokens > shards.MAX_TOKENS:
            raise CorpusError(
                f"the text has more than {shards.MAX_TOKENS:,} tokens, the most that one token file holds: "
                f"name fewer texts"
            )
        self._file.write(tokens.tobytes())
        self.done = Done(
            self.done.source,
            self.done.n_blocks + len(blocks),
            n_tokens,
            self.done.n_bytes + sum(block.n_bytes for block in blocks),
        )

    def record(self) -> None:
        """Sync the tokens, then say in the journal that they are there: never the other way round."""
        self._file.flush()
        os.fsync(self._file.fileno())
        write_json(self._journal, asdict(self.done))

    def finish(self, path: Path) -> None:
        """Write the header, sync, and take the final name."""
        self._file.flush()
        tokens_sum = hashlib.sha256()
        self._file.seek(shards.HEADER_BYTES)
        while block := self._file.read(HASH_BLOCK_BYTES):  # not through a mapping: its pages would count as ours
            tokens_sum.update(block)
        self._file.seek(0)
        self._file.write(shards.make_header(self._dtype, self.done.n_tokens, self.done.source, tokens_sum.hexdigest()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.replace(path)
        sync_file(path.parent)
        self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file and its journal."""
        self._path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"the token file {path} cannot be written ({error.strerror}): make room, or choose another cache folder"
        ) from error

"""From what the user names to documents: packaged texts, files, folders, globs, standard input.

Invariant: nothing is opened before stat(2) has said that it is a regular file, so nothing here can hang
on a FIFO or a device; standard input is read once, when it is named.

A name is looked up in this order:
1. `-` is standard input, copied into the cache folder first, in constant memory.
2. A packaged name: `tiny-shakespeare`, `complete-works` (all 38 plays), `heldout` (the 29 plays of which
   Tiny Shakespeare holds nothing), or one play, such as `hamlet`. A file or folder of the same name wins only
   when it is written with a separator: `./hamlet`.
3. A path that exists. A file is read whatever its suffix; of a folder, at any depth and in sorted order, the
   files that end in .txt, .text, .md or .markdown, without the hidden and the empty ones, and without runs, whose
   samples are no text of the user's.
4. A glob with `*`, `?` or `[`, where `**` crosses folders: every file that matches, sorted, whatever its
   suffix.
What is named twice, as by a folder and a file in it, is taken once, at its first place.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from groundling.corpus import plays
from groundling.corpus.binary import HEAD_BYTES, PIPED, refuse_binary
from groundling.corpus.documents import Document
from groundling.errors import CorpusError
from groundling.files import HASH_BLOCK_BYTES, home_expanded

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
STANDARD_INPUT = "-"
TINY_SHAKESPEARE = "tiny-shakespeare"
COLLECTIONS = (TINY_SHAKESPEARE, "complete-works", "heldout")

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def packaged_names() -> tuple[str, ...]:
    """Every name that needs no file: the three collections, then the 38 plays."""
    return COLLECTIONS + plays.play_names()


def find_documents(names: Sequence[str], cache_dir: Path) -> tuple[Document, ...]:
    """The documents that `names` mean, in their order, each once.

    Raises `CorpusError` for a name that means nothing, and for what cannot be a text.
    """
    documents: dict[str, Document] = {}
    for name in dict.fromkeys(names):  # standard input has nothing more the second time
        for document in _find(name, cache_dir):
            documents.setdefault(document.origin, document)
    return tuple(documents.values())


def refuse_overlap(
    train: Iterable[Document], heldout: Iterable[Document], advice: str = "leave it out of one of the two"
) -> None:
    """Raises `CorpusError`, with this advice, if a document, a part of one, or a copy of one is on both sides."""
    by_origin = {origin: document for document in train for origin in document.origins}
    by_sum = {document.sha256: document for document in by_origin.values()}
    for document in heldout:
        shared = next((by_origin[origin] for origin in document.origins if origin in by_origin), None)
        if twin := shared or by_sum.get(document.sha256):
            raise CorpusError(
                f"{document.name} is held out, but {twin.name} in the training text holds the same text: {advice}"
            )


def _find(name: str, cache_dir: Path) -> list[Document]:
    if name == STANDARD_INPUT:
        return [_spool_standard_input(cache_dir)]
    if name in packaged_names():
        return _packaged(name)
    if not name:
        raise CorpusError("an empty name was given as a text: name a file, a folder or a packaged text")
    path = home_expanded(name)
    if path.is_dir():
        return _folder(path)
    if path.exists() or path.is_symlink():
        return [_file(path)]
    if glob.has_magic(name):
        return _glob(name)
    raise CorpusError(_no_such(name))


def _packaged(name: str) -> list[Document]:
    if name == TINY_SHAKESPEARE:
        return [Document.from_text(name, plays.tiny_shakespeare, shares=plays.TINY_SHAKESPEARE_PLAYS)]
    names = {"complete-works": plays.play_names(), "heldout": plays.heldout_play_names()}.get(name, (name,))
    return [Document.from_text(play, partial(plays.render_play, play)) for play in names]


def _file(path: Path) -> Document:
    """One regular file with at least one byte that can be opened."""
    try:
        found = path.stat()
        for is_kind, kind in _KINDS:
            if is_kind(found.st_mode):
                raise CorpusError(f"{path} is {kind}, not a file: to read a pipe, pass - and pipe into it")
        if found.st_size == 0:
            raise CorpusError(f"{path} is empty: give a file with text in it")
        with path.open("rb") as file:  # what is wrong with the first bytes is said before anything is read whole
            refuse_binary(file.read(HEAD_BYTES), str(path))
            return Document.from_file(path)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None


def _folder(folder: Path) -> list[Document]:
    files = [path for path in _walk(folder) if path.suffix.lower() in TEXT_SUFFIXES]
    documents = [_file(path) for path in files if not (path.is_file() and path.stat().st_size == 0)]
    if not documents:
        raise CorpusError(
            f"the folder {folder} holds no text ({', '.join(TEXT_SUFFIXES)}, not empty, not hidden, not in a run): "
            f"for files with other suffixes name them by a glob, such as {folder / '**' / '*.html'}"
        )
    return documents


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise CorpusError(
            f"the folder {error.filename} cannot be read: {error.strerror}; check its permissions"
        ) from None

    for parent, folders, files in os.walk(folder, onerror=refuse):
        if {"identity.json", "origin.json"} <= set(files):  # a run, whose samples are no text of the user's
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def _glob(pattern: str) -> list[Document]:
    # Not pathlib: it gives hidden files too, and drops the slash by which a pattern asks for folders alone.
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207
    documents = [_file(Path(match)) for match in matches if not Path(match).is_dir()]
    if not documents:
        raise CorpusError(f"the glob {pattern} matches no file from {Path.cwd()}: check it, and quote it for the shell")
    return documents


def _no_such(name: str) -> str:
    looks_like_a_path = os.sep in name or Path(name).suffix
    close = () if looks_like_a_path else difflib.get_close_matches(name.lower(), packaged_names(), n=3)
    if close:
        return f"there is no file or packaged text {name}: did you mean {' or '.join(close)}?"
    return f"there is no file or folder {name}: check it, or give a packaged text such as {TINY_SHAKESPEARE}"


def _spool_standard_input(cache_dir: Path) -> Document:
    """Standard input as a file of the cache folder, named by its content."""
    if sys.stdin is None or sys.stdin.isatty():
        raise CorpusError("- reads standard input, which is a terminal here: pipe a text into the command")
    digest, n_bytes = hashlib.sha256(), 0
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_dir, prefix=".stdin.", delete=False) as file:
            spool = Path(file.name)
            try:
                while block := sys.stdin.buffer.read(HASH_BLOCK_BYTES):
                    digest.update(block)
                    n_bytes += file.write(block)
                file.close()
                path = cache_dir / f"stdin-{digest.hexdigest()[:32]}.txt"
                spool.replace(path)
            finally:
                spool.unlink(missing_ok=True)
    except OSError as error:
        raise CorpusError(
            f"standard input cannot be copied to {cache_dir}: {error.strerror}; "
            f"make room or choose another cache folder"
        ) from None
    if not n_bytes:
        raise CorpusError("standard input is empty: pipe a text into the command")
    return Document.from_file(path, name=PIPED)

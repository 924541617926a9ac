"""The one entry to this room: from a `CorpusConfig` to memory-mapped tokens.

Invariant: what is trained on and what is held out share no document, and only the former shapes a trained
tokenizer. Token files and trained tokenizers are cached by the SHA-256 of what they were made of, so a
changed text is never mistaken for the old one.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groundling.corpus.config import CorpusConfig
from groundling.corpus.documents import Document, split_heldout
from groundling.corpus.encode import Progress, source_sum, write_tokens
from groundling.corpus.shards import TokenFile
from groundling.corpus.sources import STANDARD_INPUT, TINY_SHAKESPEARE, find_documents, refuse_overlap
from groundling.corpus.tokenizer import Tokenizer, parse_tokenizer_spec, train_tokenizer
from groundling.errors import CorpusError
from groundling.files import home_expanded

CACHE_NAME_CHARS = 32
"""Of a SHA-256 in hexadecimal, 128 bits: no two texts share it by chance."""
MAX_NAME_CHARS = 60


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, and what is said of it in a run's records."""

    name: str
    """Short, usable as the name of a folder: tiny-shakespeare, my-novel."""
    tokenizer: Tokenizer
    train: TokenFile
    heldout: TokenFile | None
    sha256: str
    """Of one document: SHA-256 of its normalised bytes (of Tiny Shakespeare, the canonical sum). Of several:
    SHA-256 of their own sums, as bytes, one after the other. Of a token file: of its tokens' bytes."""
    n_bytes: int
    """The training text's bytes after normalisation, separators not counted."""
    n_documents: int
    document_names: tuple[str, ...] = ()
    """Of the training text, in order; of a token file, its own name alone. Empty where they were not kept."""


CheckText = Callable[[str, str], None]
"""Called with a text's name and `Corpus.sha256`, to refuse it."""


def load_corpus(
    config: CorpusConfig,
    cache_dir: Path,
    progress: Progress | None = None,
    check_text: CheckText | None = None,
    tokenizer: Tokenizer | None = None,
    own_heldout: bool = True,
) -> Corpus:
    """The tokens of a text, made once and kept in `cache_dir`.

    `progress` is called with the bytes of text that are encoded and all that are to be, both splits counted;
    not at all if the cache has them. `check_text` is called before a tokenizer is trained on the text or the text
    encoded. A `tokenizer` takes the place of the config's; without `own_heldout` Tiny Shakespeare comes without the
    plays that are held out. Raises `CorpusError` for anything in the config that cannot be used.
    """
    if not config.sources:
        raise CorpusError(f"no text is named: give a file, a folder, or a packaged text such as {TINY_SHAKESPEARE}")
    if config.heldout and config.heldout_fraction:
        raise CorpusError(
            "both heldout and heldout_fraction are given, one of them perhaps by the preset: choose one of them, with"
            " --heldout-fraction 0 or without --heldout"
        )
    if any(is_token_file(source) for source in (*config.sources, *config.heldout)):
        return _load_token_files(config, check_text, tokenizer)
    return _load_text(config, cache_dir, progress, check_text, tokenizer, own_heldout)


def _load_text(
    config: CorpusConfig,
    cache_dir: Path,
    progress: Progress | None,
    check_text: CheckText | None,
    tokenizer: Tokenizer | None,
    own_heldout: bool,
) -> Corpus:
    train, heldout = _documents(config, cache_dir, own_heldout)
    name, sha256 = _short_name(config.sources), _text_sum(train)
    if check_text:
        check_text(name, sha256)
    tokenizer = tokenizer or _tokenizer(config.tokenizer, train, cache_dir)

    train_bytes = sum(document.n_bytes for document in train)
    total_bytes = train_bytes + sum(document.n_bytes for document in heldout)

    def write(documents: Sequence[Document], bytes_before: int) -> TokenFile:
        path = cache_dir / f"{source_sum(documents, tokenizer)[:CACHE_NAME_CHARS]}.bin"
        report: Progress | None = None
        if progress:
            report = lambda done, _: progress(bytes_before + done, total_bytes)  # noqa: E731
        return write_tokens(documents, tokenizer, path, report)

    return Corpus(
        name=name,
        tokenizer=tokenizer,
        train=write(train, 0),
        heldout=write(heldout, train_bytes) if heldout else None,
        sha256=sha256,
        n_bytes=train_bytes,
        n_documents=len(train),
        document_names=tuple(document.name for document in train),
    )


def _documents(
    config: CorpusConfig, cache_dir: Path, own_heldout: bool
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """The documents to train on and those to hold out."""
    if STANDARD_INPUT in config.sources and STANDARD_INPUT in config.heldout:
        raise CorpusError("standard input (-) is named for training and held out: it can be read only once")
    train = documents = find_documents(config.sources, cache_dir)
    if config.heldout_fraction:
        train, heldout = split_heldout(train, config.heldout_fraction)
        if len(documents) > 1:  # a single one gives its own tail
            refuse_overlap(train, heldout, "leave one of them out, or hold out no fraction (--heldout-fraction 0)")
        return train, heldout
    default = ("heldout",) if own_heldout and tuple(config.sources) == (TINY_SHAKESPEARE,) else ()
    heldout = find_documents(config.heldout or default, cache_dir)
    refuse_overlap(train, heldout)
    return train, heldout


def _tokenizer(spec: str, train: Sequence[Document], cache_dir: Path) -> Tokenizer:
    meaning = parse_tokenizer_spec(spec)
    if meaning is None:
        return Tokenizer.gpt2()
    if isinstance(meaning, Path):
        return Tokenizer.load(meaning)
    path = cache_dir / f"tokenizer-{meaning}-{_text_sum(train)[:CACHE_NAME_CHARS]}.json"
    if path.is_file():
        with contextlib.suppress(CorpusError):  # damaged: it is made anew
            return Tokenizer.load(path, name=spec)
    tokenizer = train_tokenizer(train, meaning)
    try:
        tokenizer.save(path)
    except OSError as error:
        raise CorpusError(
            f"the tokenizer {path} cannot be written ({error.strerror}): make room, or choose another cache folder"
        ) from error
    return Tokenizer.load(path, name=spec)


def _text_sum(documents: Sequence[Document]) -> str:
    """See `Corpus.sha256`."""
    if len(documents) == 1:
        return documents[0].sha256
    return hashlib.sha256(b"".join(bytes.fromhex(document.sha256) for document in documents)).hexdigest()


def is_token_file(source: str) -> bool:
    """Whether this source names tokens, of a tokenizer that their file does not say, and no text."""
    return Path(source).suffix == ".bin"


def _load_token_files(config: CorpusConfig, check_text: CheckText | None, tokenizer: Tokenizer | None) -> Corpus:
    if (
        len(config.sources) > 1
        or len(config.heldout) > 1
        or not all(is_token_file(source) for source in (*config.sources, *config.heldout))
    ):
        raise CorpusError("a token file (.bin) stands alone: give one for training, at most one held out, and no text")
    tokenizer = tokenizer or _tokenizer_of_tokens(config)
    train = _open_tokens(config.sources[0], tokenizer)
    heldout = _open_tokens(config.heldout[0], tokenizer) if config.heldout else None
    if heldout and heldout.sha256() == train.sha256():
        raise CorpusError(f"{heldout.path} is held out, but it has the same tokens as {train.path}: give another")
    if config.heldout_fraction:
        train, heldout = train.split(config.heldout_fraction)
    name, sha256 = _short_name(config.sources), train.sha256()
    if check_text:
        check_text(name, sha256)
    n_bytes, n_documents = _measure(train, tokenizer)
    names = (config.sources[0],)
    return Corpus(name, tokenizer, train, heldout, sha256, n_bytes, n_documents, names)


def _tokenizer_of_tokens(config: CorpusConfig) -> Tokenizer:
    """The tokenizer that token files were made with."""
    meaning = parse_tokenizer_spec(config.tokenizer)
    if isinstance(meaning, int):
        raise CorpusError(
            f"a tokenizer cannot be trained on a token file: set the tokenizer to gpt2 or to the "
            f"tokenizer.json that {config.sources[0]} was made with"
        )
    return Tokenizer.load(meaning) if meaning else Tokenizer.gpt2()


def _open_tokens(source: str, tokenizer: Tokenizer) -> TokenFile:
    file = TokenFile.open(home_expanded(source))
    if (largest := file.max_token()) >= tokenizer.n_vocab:
        raise CorpusError(
            f"{source} has the token {largest}, and the tokenizer {tokenizer.name} ends at "
            f"{tokenizer.n_vocab - 1}: the file needs the tokenizer.json that it was made with"
        )
    return file


def _measure(file: TokenFile, tokenizer: Tokenizer) -> tuple[int, int]:
    """Bytes of text, and documents, in a token file; `<|endoftext|>` may stand before, between or after."""
    lengths = np.array([len(token) for token in tokenizer.token_bytes], dtype=np.int64)
    lengths[tokenizer.end_of_text_id] = 0
    n_bytes, n_documents, in_document = 0, 0, False
    for tokens in file.scan():
        n_bytes += int(lengths[tokens].sum())
        is_text = np.concatenate([[in_document], tokens != tokenizer.end_of_text_id])
        n_documents += int((~is_text[:-1] & is_text[1:]).sum())
        in_document = bool(is_text[-1])
    return n_bytes, n_documents


def _short_name(sources: Sequence[str]) -> str:
    """The first source, in lower case, with hyphens for all but letters and digits, and how many follow."""
    path = home_expanded("standard-input" if sources[0] == STANDARD_INPUT else sources[0])
    while glob.has_magic(path.name):  # of a glob, the folder that it searches
        path = path.parent
    plain = unicodedata.normalize("NFKC", path.resolve().stem).lower()
    words = [word for word in re.split(r"[\W_]+", plain) if word]
    name = "-".join(words)[:MAX_NAME_CHARS].strip("-") or "corpus"
    return name if len(sources) == 1 else f"{name}-and-{len(sources) - 1}-more"

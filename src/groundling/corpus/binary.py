"""Kinds of files that a text is mistaken for, known by their first bytes, and how to make plain text of them.

Invariant: only beginnings that no plain text has are listed: they hold a byte that is not UTF-8 or a control
character, or are those of a format that is written in letters (PDF, RTF).
Source of the signatures: the formats' specifications, as file(1) lists them.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from groundling.errors import CorpusError

HEAD_BYTES = 16
"""As many as the longest beginning below needs."""

PIPED = "standard input"
"""The name of a text that no command can be told to convert."""

_PANDOC = "pandoc -t plain -o {text} {file}"
_NO_TEXT = "it holds no text to train on: name a text file"

_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"%PDF-", "a PDF file", "pdftotext {file} {text}"),
    (rb"\{\\rtf", "an RTF document", _PANDOC),
    (rb"PK\x03\x04", "a zip archive, as .docx, .odt and .epub files are", _PANDOC),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document, such as .doc", "soffice --convert-to txt {file}"),
    (rb"\x1f\x8b", "gzip data", "gzip -dc {file} > {text}"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data", "bzip2 -dc {file} > {text}"),
    (rb"\xfd7zXZ\x00", "xz data", "xz -dc {file} > {text}"),
    (rb"\x28\xb5\x2f\xfd", "zstd data", "zstd -dc {file} > {text}"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {file}"),
    (rb"\x89PNG\r\n", "a PNG image", ""),
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"GIF8[79]a.[\x00-\x08]", "a GIF image", ""),
    (rb"RIFF...[\x00-\x08]WEBP", "a WebP image", ""),
    (rb"RIFF...[\x00-\x08]WAVE", "a sound file", ""),
    (rb"ID3[\x02-\x04]|OggS\x00", "a sound file", ""),
    (rb"\x00\x00..ftyp", "a video or image", ""),
    (rb"\x7fELF|MZ[\x90\x00]", "a program", ""),
    (rb"SQLite format 3\x00", "an SQLite database", ""),
)
"""(pattern of the first bytes, what it is, the command that makes text of it or nothing)"""


def refuse_binary(head: bytes, name: str) -> None:
    """Raises `CorpusError` if a file that begins with `head` is of a known kind that is no plain text."""
    for pattern, what, command in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            raise CorpusError(f"{name} is {what}, not plain text: {_advice(command, name)}")


def _advice(command: str, name: str) -> str:
    if not command:
        return _NO_TEXT
    if name == PIPED:
        return "pipe plain text into the command"
    return f"convert it first: {command.format(file=shlex.quote(name), text=shlex.quote(_text_name(name)))}"


def iconv(encoding: str, name: str) -> str:
    """The whole command that makes UTF-8 of a text in this encoding."""
    command = f"iconv -f {encoding} -t UTF-8"
    return command if name == PIPED else f"{command} {shlex.quote(name)} > {shlex.quote(_text_name(name))}"


def _text_name(name: str) -> str:
    """A name beside `name` for the text made of it, that is not the name itself."""
    path = Path(name)
    ending = "-utf8.txt" if path.suffix == ".txt" else ".txt"
    return str(path.with_name(path.stem.removesuffix(".txt") + ending))

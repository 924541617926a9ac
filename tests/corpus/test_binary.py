"""What is no plain text is named for what it is, with the command that makes text of it."""

from __future__ import annotations

import gzip
import io
import shlex
import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus.binary import HEAD_BYTES, PIPED, iconv, refuse_binary
from groundling.corpus.blocks import read_text
from groundling.corpus.sources import find_documents
from groundling.errors import CorpusError


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("my book.pdf", b"%PDF-1.4\nplain letters only\n", "a PDF file.*: pdftotext 'my book.pdf' 'my book.txt'$"),
        ("letter.docx", a_zip(), r"\.docx.*: pandoc -t plain -o letter\.txt letter\.docx$"),
        ("page.rtf", rb"{\rtf1\ansi Hello}", "RTF.*pandoc"),
        ("novel.txt.gz", gzip.compress(b"text"), r"gzip data.*: gzip -dc novel\.txt\.gz > novel\.txt$"),
        ("scan.png", b"\x89PNG\r\n\x1a\n\0\0", "a PNG image.*holds no text"),
        ("photo.txt", b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image.*holds no text"),
    ],
)
def test_files_of_other_kinds_are_named(
    name: str, content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the text is read: as soon as it is looked up, and wherever in it the reading begins."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(CorpusError, match=words) as refusal:
        find_documents([name], tmp_path / "cache")
    assert "iconv" not in str(refusal.value)
    with pytest.raises(CorpusError, match=words):
        list(read_text(io.BytesIO(content), name, start=8))


def test_what_is_piped_is_not_given_a_file_name() -> None:
    with pytest.raises(CorpusError, match="PDF file, not plain text: pipe plain text"):
        refuse_binary(b"%PDF-1.7", PIPED)
    assert iconv("GB18030", PIPED) == "iconv -f GB18030 -t UTF-8"


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_no_text_is_taken_for_something_else(text: str) -> None:
    head = text.encode()[:HEAD_BYTES]
    if not head.startswith((b"%PDF-", rb"{\rtf")):
        refuse_binary(head, "text")


@pytest.mark.parametrize(
    "beginning", ["ID3 is a tag", "RIFF raff", "BZh", "PK", "MZ", "OggS", "GIF87a is", "7z x", "%"]
)
def test_a_text_about_such_files_is_a_text(beginning: str) -> None:
    refuse_binary(beginning.encode(), "text")


def test_the_iconv_command_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence ends in a whole command, which mends the file when it is typed."""
    monkeypatch.chdir(tmp_path)
    Path("it's old.txt").write_bytes("Grüße".encode("latin-1"))
    (document,) = find_documents(["it's old.txt"], tmp_path / "cache")
    with pytest.raises(CorpusError) as refusal:
        list(document.blocks())
    command = str(refusal.value).partition("look at what comes: ")[2]
    assert shlex.split(command)[-1] == "it's old-utf8.txt"
    subprocess.run(command, shell=True, check=True)
    assert Path("it's old-utf8.txt").read_text(encoding="utf-8") == "Grüße"

"""Sources: every way to name a text, and one clear sentence for every way to get it wrong."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from groundling.corpus.plays import render_play, tiny_shakespeare
from groundling.corpus.sources import find_documents, packaged_names, refuse_overlap
from groundling.errors import CorpusError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with texts in it."""
    for name, text in {
        "books/b.txt": "B",
        "books/a.md": "A",
        "books/deep/c.TXT": "C",
        "books/page.html": "H",
        "books/image.jpg": "\0",
        "books/empty.txt": "",
        "books/.hidden.txt": "X",
        "books/.git/x.txt": "X",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def read(tmp_path):
    def texts_of(*names: str) -> list[str]:
        return ["".join(document.blocks()) for document in find_documents(names, tmp_path / "cache")]

    return texts_of


def test_packaged_names(read, tmp_path):
    assert len(packaged_names()) == 3 + 38
    assert read("tiny-shakespeare") == [tiny_shakespeare()]
    assert read("hamlet") == [render_play("hamlet")]
    assert len(find_documents(["complete-works"], tmp_path)) == 38
    assert len(find_documents(["heldout"], tmp_path)) == 29


def test_a_packaged_name_wins_unless_the_path_has_a_separator(folder, read):
    Path("hamlet").write_text("mine")
    assert read("hamlet") == [render_play("hamlet")]
    assert read("./hamlet") == ["mine"]


def test_a_folder_gives_its_texts_in_order(folder, read):
    assert read("books") == ["A", "B", "C"]


def test_what_runs_have_written_is_no_text_of_a_folder(folder, read):
    Path("books/letters").mkdir()
    Path("books/letters/identity.json").write_text("{}")  # which others may have, too
    Path("books/letters/one.txt").write_text("L")
    for name in ("identity.json", "samples.txt", "origin.json", "deep/more.txt"):
        path = Path("books/runs/gpt2", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    Path("books/runs/notes.txt").write_text("N")
    assert read("books") == ["A", "B", "C", "L", "N"]


def test_a_file_is_read_whatever_its_suffix(folder, read):
    assert read("books/page.html", "books/b.txt") == ["H", "B"]


def test_globs(folder, read):
    assert read("books/[ab].*") == ["A", "B"]
    assert read("books/**/*.TXT") == ["C"]
    assert read("**/*.md") == ["A"]


def test_a_name_with_a_bracket_is_a_file_if_there_is_one(folder, read):
    Path("draft[1].txt").write_text("draft")
    assert read("draft[1].txt") == ["draft"]


def test_what_is_named_twice_is_taken_once_at_its_first_place(folder, read):
    Path("link.txt").symlink_to("books/b.txt")
    assert read("books/b.txt", "books", "link.txt", str(Path("books/a.md").resolve())) == ["B", "A", "C"]
    assert len(read("hamlet", "complete-works", "hamlet")) == 38


def test_the_home_folder_is_expanded(folder, read, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert read("~/books/b.txt") == ["B"]


def test_a_name_may_begin_with_a_tilde(folder, read):
    Path("~draft.txt").write_text("D")
    assert read("~draft.txt") == ["D"]
    assert read("./~draft.txt") == ["D"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hamlett", "did you mean hamlet"),
        ("Macbeth", "did you mean macbeth"),
        ("tiny_shakespeare", "did you mean tiny-shakespeare"),
        ("novel.txt", "no file or folder novel.txt"),
        ("", "empty name"),
        ("books/empty.txt", "is empty"),
        ("books/*.pdf", "matches no file"),
        ("books/deep/*/", "matches no file"),
        ("/dev/null", "is a device"),
        ("broken", "cannot be read"),
        ("pipe", "is a pipe"),
        ("to-pipe", "is a pipe"),
        ("socket", "is a socket"),
        ("bare", "holds no text"),
        ("piped/*", "is a pipe"),
    ],
)
def test_what_cannot_be_a_text_is_refused_without_waiting(folder, read, name, words):
    Path("broken").symlink_to("nowhere")
    os.mkfifo("pipe")
    Path("to-pipe").symlink_to("pipe")
    Path("piped").mkdir()
    os.mkfifo("piped/p.txt")
    Path("bare").mkdir()
    Path("bare/image.jpg").write_text("x")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(CorpusError, match=words):
            read(name)


def test_a_binary_file_is_refused_when_it_is_read(folder, read):
    with pytest.raises(CorpusError, match=r"image\.jpg .*offset 0"):
        read("books/image.jpg")


def test_an_unreadable_file_is_refused(folder, read, monkeypatch):
    """The refusal comes from the system; simulated, because a test run as root could read any file."""
    path_open = Path.open

    def refuse(path, *arguments, **settings):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return path_open(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CorpusError, match="Permission denied"):
        read("books/b.txt")


def piped(tmp_path: Path, text: bytes, names: str = "['-']") -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from pathlib import Path; from groundling.corpus.sources import find_documents\n"
        "cache = Path(sys.argv[1])\n"
        f"documents = find_documents({names}, cache)\n"
        "print(len(documents), ascii(''.join(documents[0].blocks())), ''.join(documents[0].blocks()) != '')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_standard_input_is_kept_and_read_as_often_as_needed(tmp_path):
    assert piped(tmp_path, "a\r\nß".encode()).stdout == "1 'a\\n\\xdf' True\n"
    assert piped(tmp_path, "a\r\nß".encode()).returncode == 0
    assert piped(tmp_path, "a\r\nß".encode(), "['-', '-']").stdout == "1 'a\\n\\xdf' True\n"
    assert len(list((tmp_path / "cache").iterdir())) == 1  # named by its content: piped thrice, kept once


def test_empty_standard_input_is_refused(tmp_path):
    assert "standard input is empty" in piped(tmp_path, b"").stderr


def test_standard_input_without_a_place_to_keep_it_is_refused(tmp_path):
    (tmp_path / "cache").write_text("a file stands where the cache folder should be")
    assert "CorpusError: standard input cannot be copied" in piped(tmp_path, b"text").stderr


@pytest.mark.parametrize(
    ("train", "heldout"),
    [
        (["hamlet"], ["hamlet"]),
        (["complete-works"], ["hamlet"]),
        (["tiny-shakespeare"], ["coriolanus"]),
        (["coriolanus"], ["tiny-shakespeare"]),
        (["books"], ["books/b.txt"]),
        (["books/b.txt"], ["copy.txt"]),
    ],
)
def test_text_on_both_sides_is_refused(folder, train, heldout):
    Path("copy.txt").write_text("B")
    sides = [find_documents(names, folder / "cache") for names in (train, heldout)]
    with pytest.raises(CorpusError, match="leave it out of one"):
        refuse_overlap(*sides)


def test_different_texts_may_stand_on_the_two_sides(folder):
    refuse_overlap(find_documents(["tiny-shakespeare"], folder), find_documents(["heldout"], folder))
    refuse_overlap(find_documents(["books/a.md"], folder), find_documents(["books/b.txt"], folder))

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from groundling import files


def test_an_atomic_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    files.write_text(path, "whole")
    with pytest.raises(RuntimeError), files.atomic_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise RuntimeError
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "whole"


def test_an_atomic_directory_replaces_only_when_done(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with files.atomic_directory(path) as directory:
        (directory / "a").write_text("first")
    with pytest.raises(RuntimeError), files.atomic_directory(path) as directory:  # noqa: PT012
        (directory / "a").write_text("second")
        raise RuntimeError
    assert (path / "a").read_text() == "first"
    with files.atomic_directory(path) as directory:
        (directory / "b").write_text("third")
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]
    assert [p.name for p in path.iterdir()] == ["b"]


def test_sums_are_those_of_hashlib(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert files.sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()

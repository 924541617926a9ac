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


def test_an_atomic_directory_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with pytest.raises(RuntimeError), files.atomic_directory(path) as directory:  # noqa: PT012
        (directory / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".other.partial").mkdir()  # of a process that was killed
    with files.atomic_directory(path) as directory:
        (directory / "a").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]
    with pytest.raises(OSError, match="not empty"), files.atomic_directory(path) as directory:
        (directory / "a").write_text("second")
    assert (path / "a").read_text() == "whole"


def test_sums_are_those_of_hashlib(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert files.sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from groundling import files
from groundling.errors import CheckpointError


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
    with pytest.raises(CheckpointError, match="has come to be there"), files.atomic_directory(path) as directory:
        (directory / "a").write_text("second")
    assert (path / "a").read_text() == "whole"


def test_sums_are_those_of_hashlib(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert files.sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_atomic_path_is_whole_or_as_it_was(tmp_path: Path, folder: bool, overwrite: bool) -> None:
    path = tmp_path / "deep" / "thing"

    def make(place: Path, content: str) -> None:
        if folder:
            place.mkdir()
            place = place / "inner"
        place.write_text(content)

    with pytest.raises(RuntimeError), files.atomic_path(path, overwrite) as place:  # noqa: PT012
        make(place, "half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_path(path, overwrite) as place:
        assert place.parent == path.parent, "a rename cannot cross disks"
        make(place, "first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path, overwrite) as place:  # noqa: PT012
        make(place, "half")
        raise KeyboardInterrupt
    content = path / "inner" if folder else path
    assert content.read_text() == "first"
    if overwrite:
        with files.atomic_path(path, overwrite) as place:
            make(place, "second")
            assert content.read_text() == "first"
        assert content.read_text() == "second"
    assert [found.name for found in path.parent.iterdir()] == ["thing"]


def test_an_atomic_folder_does_not_replace_one_unasked(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    (path / "inner").write_text("first")
    with pytest.raises(CheckpointError, match="has come to be there"), files.atomic_path(path) as place:
        place.mkdir()
    assert (path / "inner").read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "thing"

    def write(place: Path) -> None:
        place.write_text("ours")
        path.write_text("theirs")

    with pytest.raises(CheckpointError, match="has come to be there"), files.atomic_path(path) as place:
        write(place)
    assert path.read_text() == "theirs"
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_an_atomic_path_takes_a_file_or_folder_in_the_place_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    (path / "inner").write_text("first")
    with files.atomic_path(path, overwrite=True) as place:
        place.write_text("a file")
    assert path.read_text() == "a file"
    with files.atomic_path(path, overwrite=True) as place:
        place.mkdir()
    assert path.is_dir()
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_what_a_killed_process_left_does_not_hinder(tmp_path: Path) -> None:
    for left in (".thing.partial", ".thing.old.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").touch()
    (tmp_path / "thing").write_text("first")
    with files.atomic_path(tmp_path / "thing", overwrite=True) as place:
        place.write_text("second")
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing").read_text() == "second"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_whom_the_umask_lets_read_may_read(tmp_path: Path, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        with files.atomic_path(tmp_path / "thing") as place:
            place.mkdir()
            (place / "inner").touch(mode=0o600)  # as safetensors writes
    finally:
        os.umask(before)
    assert (tmp_path / "thing" / "inner").stat().st_mode & 0o777 == file
    assert (tmp_path / "thing").stat().st_mode & 0o777 == folder


def test_what_was_there_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "thing"
    path.write_text("first")
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name == ".thing.partial":
            raise OSError
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError), files.atomic_path(path, overwrite=True) as place:  # noqa: PT011
        place.write_text("second")
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with files.locked(tmp_path):
        pass


def test_bytes_that_are_no_text_survive_in_json(tmp_path: Path) -> None:
    """A path may hold any; Python reads them as surrogates, which UTF-8 has none of."""
    name = os.fsdecode(b"caf\xe9.txt")
    files.write_json(tmp_path / "names.json", [name])
    assert json.loads((tmp_path / "names.json").read_text()) == [name]


def test_a_disk_that_is_full_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="space") as raised, files.atomic_file(tmp_path / "weights"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "weights")


def test_two_processes_do_not_make_the_same_path(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    with files.atomic_path(path) as place:
        place.write_text("first")
        with pytest.raises(CheckpointError, match="is being written by another process"), files.atomic_path(path):
            pass
        with files.atomic_path(tmp_path / "other") as other:
            other.write_text("other")
    assert path.read_text() == "first"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["other", "thing"]


def test_killed_processes_leave_no_locks_behind(tmp_path: Path) -> None:
    for left in (".step-1.lock", ".step-2.partial"):
        (tmp_path / left).touch()
    with files.atomic_directory(tmp_path / "step-3"):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["step-3"]


def test_a_link_that_leads_nowhere_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.symlink_to(tmp_path / "gone")
    with files.atomic_path(path, overwrite=True) as place:
        place.mkdir()
    assert path.is_dir()
    assert not path.is_symlink()
    assert [found.name for found in tmp_path.iterdir()] == ["thing"]


def test_what_takes_its_name_is_on_the_disk_before(tmp_path: Path, disk: list[tuple[str, int, str]]) -> None:
    """rename(2) and fsync(2) give no order without it: a power cut could leave a name without its content."""
    files.write_text(tmp_path / "file", "content")
    inode, parent = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert disk == [("sync", inode, ""), ("rename", inode, "file"), ("sync", parent, "")]
    disk.clear()
    with files.atomic_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
        (partial / "b").mkdir()
        (partial / "b" / "c").write_text("c")
    folder = tmp_path / "folder"
    synced = [("sync", path.stat().st_ino, "") for path in (folder / "a", folder / "b", folder / "b" / "c", folder)]
    assert disk == [*synced, ("rename", folder.stat().st_ino, "folder"), ("sync", parent, "")]

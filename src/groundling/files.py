"""Files that are either whole or absent.

Invariant: nothing here leaves a half-written file under its final name. Content is written beside the
final name, flushed and synced, then renamed; the parent directory is synced last (POSIX rename(2) and
fsync(2) give no order without it).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from groundling.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock(2) fails with where the file system has none, as some network file systems do."""

HASH_BLOCK_BYTES = 1 << 20
LOCK = ".lock"
"""The file that stands for a directory where one process holds it."""
PARTIAL = ".partial"
"""Ends the name of what is not whole yet."""


def regular_file(path: Path) -> Path:
    """The path itself. Raises `CheckpointError` if it is not a regular file, or a link to one."""
    if not path.is_file():  # false for FIFOs and devices, which opening could wait for or fill the memory from
        there = path.exists() or path.is_symlink()
        raise CheckpointError(
            f"{path} is {'no regular file' if there else 'not there'}: restore it, or give another path"
        )
    return path


def home_expanded(name: str) -> Path:
    """The path that a user wrote, with `~` as a shell reads it: left alone where nobody is called so."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib's refuses a file whose name begins with ~


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal, read in blocks of constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its final name only if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_file(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say what it has no room for
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A free path beside `path`; the file or folder made there takes the final name only if the block ends well.

    Everything in it is synced before the rename. With `overwrite`, what was at `path` goes when the new is whole. If
    the block raises, folders that were made for it go again.
    Raises `CheckpointError` if another process is making the same path.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _held(path), _renamed(path, overwrite) as temporary:
            yield temporary
    finally:
        if not path.exists():
            for parent in missing:
                with contextlib.suppress(OSError):  # somebody else has put something there
                    parent.rmdir()


def is_at(path: Path, file: IO[Any]) -> bool:
    """Whether an open file still is what stands at this path: whoever held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a path that is being made for one process, by a file beside it that goes with the hold."""
    if fcntl is None:
        yield
        return
    holder = path.with_name(f".{path.name}{LOCK}")
    while True:
        with holder.open("w") as file:
            try:
                lock(file, wait=False)
            except BlockingIOError:
                raise CheckpointError(
                    f"{path} is being written by another process: wait for it to end, or give another path"
                ) from None
            if is_at(holder, file):
                try:
                    yield
                finally:
                    holder.unlink(missing_ok=True)
                return


@contextlib.contextmanager
def _renamed(path: Path, overwrite: bool) -> Iterator[Path]:
    temporary, replaced = (path.with_name(f".{path.name}{end}") for end in (PARTIAL, f".old{PARTIAL}"))
    _remove(temporary)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as the process's umask has it
        for entry in [*sorted(temporary.rglob("*")), temporary]:
            if entry.is_file():
                entry.chmod(mode)  # safetensors writes files that only their owner reads
            sync_file(entry)
        if path.exists() or path.is_symlink():
            if not overwrite:
                raise CheckpointError(f"{path} has come to be there meanwhile: give another name")
            _remove(replaced)
            path.rename(replaced)
        try:
            temporary.rename(path)
        except OSError:
            if overwrite and (replaced.exists() or replaced.is_symlink()) and not path.exists():
                replaced.rename(path)
            raise
        sync_file(path.parent)
        _remove(replaced)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory that takes its final name, which must be free unless `overwrite` is set, only if the block ends well.

    What earlier attempts at any directory left under temporary names beside it is removed, so one process at a time
    may use the parent, and nobody else.
    """
    for left_over in (*path.parent.glob(f".*{PARTIAL}"), *path.parent.glob(f".*{LOCK}")):
        _remove(left_over)
    with atomic_path(path, overwrite) as temporary:
        temporary.mkdir()
        yield temporary


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with the guarantee of `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # a path's bytes that are no UTF-8, as JSON escapes them


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with the guarantee of `atomic_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def lock(file: IO[Any], wait: bool) -> None:
    """Hold an open file for one process, by flock(2), which the kernel releases when the process dies.

    Raises BlockingIOError if another process holds it and `wait` is false. Does nothing on Windows, and on file systems
    without locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for one process. Raises `CheckpointError` if another process holds it."""
    with (directory / LOCK).open("w") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise CheckpointError(
                f"{directory} is in use by another process: wait for it to end, or give this run another --out"
            ) from None
        yield

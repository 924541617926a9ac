"""A wheel of the very package that is running, for a place that cannot get it from an index.

Invariant: the same code gives the same bytes, and unpacking the wheel is installing it. Source: the binary distribution
format of the Python Packaging User Guide (PEP 427).
"""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import groundling
from groundling.errors import ConfigError

NAME = "groundling"
LEFT_OUT = {"__pycache__", ".DS_Store"}
FIRST_DAY = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can say."""

TAGS = f"""Wheel-Version: 1.0
Generator: groundling {groundling.__version__}
Root-Is-Purelib: true
Tag: py3-none-any
"""


def write(folder: Path) -> Path:
    """A wheel of the running package, in this folder. Raises `ConfigError` if the package was never installed."""
    stem = f"{NAME}-{groundling.__version__}"
    information = f"{stem}.dist-info"
    entries = {f"{information}/METADATA": _metadata().encode(), f"{information}/WHEEL": TAGS.encode()}
    package = Path(groundling.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and not LEFT_OUT & set(path.parts):
            entries[f"{NAME}/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        record = [*(_recorded(name, content) for name, content in entries.items()), f"{information}/RECORD,,"]
        entries[f"{information}/RECORD"] = "".join(f"{line}\n" for line in record).encode()
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name, FIRST_DAY)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, content)
    return wheel


def requirements(extra: str = "") -> list[str]:
    """What the running package needs, without its extras but for one."""
    needed = (distribution(NAME).requires if _metadata() else None) or []
    asked = re.compile(rf"""\s*;\s*extra == ["']{re.escape(extra)}["']$""")
    own = [line for line in needed if "extra ==" not in line]
    return own + [asked.sub("", line) for line in needed if asked.search(line)]


def _metadata() -> str:
    try:
        text = distribution(NAME).read_text("METADATA") or distribution(NAME).read_text("PKG-INFO")
    except PackageNotFoundError:
        text = None
    if not text:
        raise ConfigError("Groundling runs here without being installed: install it (pip install .) to pack it")
    return text


def _recorded(name: str, content: bytes) -> str:
    """A line of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"

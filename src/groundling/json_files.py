"""JSON files of others: of bounded size and depth, no key twice.

Invariant: nothing but regular files is opened, no more is read than a file of its kind may have, and whatever stands in
it ends in one sentence.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from groundling.errors import CheckpointError
from groundling.files import regular_file

MAX_CONFIG_BYTES = 1 << 20
"""The config.json that transformers writes of GPT-2 takes under a thousand bytes."""


def read_bounded(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """The content of a regular file. Raises `CheckpointError` if it cannot be read or is larger than it may be."""
    size = regular_file(path).stat().st_size
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1) if size <= max_bytes else b""  # it may grow while it is read
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check the path") from None
    if max(size, len(content)) > max_bytes:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and {max_bytes:,} are more than it needs: restore it, or give another"
        )
    return content


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> Any:
    """The JSON of a file. Raises `CheckpointError` if it is larger than it may be, no JSON, or has a key twice."""
    try:
        return parse_json(read_bounded(path, max_bytes))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): copy or make it again") from None


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """`read_json`, which must be an object."""
    value = read_json(path, max_bytes)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy or make it again")
    return value


def parse_json(content: bytes) -> Any:
    """JSON in which no object has a key twice. Raises ValueError for anything else, however deep it is nested."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return found

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from groundling.cli import main

from ..conftest import new_cache
from .bottles import TEXT, train


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk(unsynced: None) -> None:
    pass


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with a text in it, and a cache of its own."""
    path = tmp_path_factory.mktemp("workplace")
    (path / "bottles.txt").write_text(TEXT)
    before = Path.cwd(), os.environ.get("GROUNDLING_CACHE")
    os.chdir(path)
    os.environ["GROUNDLING_CACHE"] = str(new_cache(path))
    yield path
    os.chdir(before[0])
    if before[1] is None:
        del os.environ["GROUNDLING_CACHE"]
    else:
        os.environ["GROUNDLING_CACHE"] = before[1]


@pytest.fixture(scope="session")
def run(workplace: Path) -> Path:
    """A short run of a small network on a text of the user's."""
    arguments = train(
        "--max-steps", "12", "--schedule.passes", "13", "--heldout-fraction", "0.2", "--out", "runs/bottles"
    )
    assert main(arguments) == 0
    return workplace / "runs" / "bottles"

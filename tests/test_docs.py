"""The pages lead somewhere: every link, and from the page of rooms to every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from groundling.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_page_of_rooms_names_every_module() -> None:
    rooms = (ROOT / "docs/design/0001-rooms.md").read_text()
    modules = [path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    of_commands = {f"{name}.py" for name in COMMANDS} | {"import_.py"}
    named = set(re.findall(r"\w+\.(?:py|cpp|h)\b", rooms)) | of_commands
    assert {path.name for path in modules} - named == {"__init__.py"}

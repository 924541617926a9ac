"""What commands say to the user beside their results.

Invariant: standard output is kept for results; everything else goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(message: str) -> None:
    """Print a line for the user; standard output is kept for results."""
    print(message, file=sys.stderr, flush=True)


def say_changes(changes: Sequence[str]) -> None:
    """Say what was assumed, left out or converted of a foreign model."""
    for change in changes:
        say(f"changed: {change}")

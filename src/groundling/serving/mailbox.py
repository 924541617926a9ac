"""From the engine's thread to the event loop.

Invariant: what was posted is delivered once and in order; the loop is woken once for all that waits, because each
waking makes it contend with the engine for Python's lock, between two passes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """Calls that one thread wants made on one event loop."""

    def __init__(self) -> None:
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

    def post(self, loop: asyncio.AbstractEventLoop, call: Callable[..., object], *values: Any) -> None:
        """Have the loop make this call. Raises `RuntimeError` if the loop is closed."""
        self._posted.append((call, values))
        if len(self._posted) == 1:  # with more, the loop was woken for the first of them and takes all
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._posted:
            call, values = self._posted.popleft()
            call(*values)

"""SIGINT and SIGTERM as a request that the loop reads.

Invariant: the first signal never interrupts an update or a write; the second ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from groundling.errors import Interrupted


class StopSignals:
    """While entered, remembers the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> StopSignals:
        self.received = None
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(f"{self.received.name} received")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(Interrupted.exit_code)
        self.received = signal.Signals(number)

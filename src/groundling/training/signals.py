"""SIGINT, SIGTERM, and SIGHUP of a terminal that is gone, as a request that the loop reads.

Invariant: the first signal never interrupts an update or a write; the second ends the process at once, unless it is
another SIGHUP, of which a shell and the system may each send one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from groundling.errors import Interrupted

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
"""Windows has none."""


class StopSignals:
    """While entered, which may be more than once, remembers the first SIGINT, SIGTERM or (unless ignored) SIGHUP."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._depth = 0

    def __enter__(self) -> StopSignals:
        if self._depth == 0:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # as nohup has it
                numbers.append(HANGUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.received is not None:
            raise Interrupted(f"{self.received.name} received")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == HANGUP:
                return
            os._exit(Interrupted.exit_code)
        self.received = signal.Signals(number)
        # os.write, because a handler may run in the middle of a print
        with contextlib.suppress(OSError):  # whoever reads it may have ended by the same signal
            name = self.received.name
            os.write(2, f"\n{name}: stopping after this step, then saving; again to stop at once\n".encode())

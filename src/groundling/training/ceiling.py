"""The matrix ceiling that steps are measured by.

Invariant: no step reaches more than all of it. Where one does, the machine was busy when it was measured: it is
measured again, once in a run, and is at least what was reached.
"""

from __future__ import annotations

from collections.abc import Callable

from groundling import machine
from groundling.runtime import Runtime


class Ceiling:
    """FLOP a second of the fastest matrix products on this machine, as far as it is known."""

    def __init__(self, flops: float, runtime: Runtime) -> None:
        self.flops, self.runtime = flops, runtime
        self.measured_again = False

    def share(self, reached_flops: float, note: Callable[[str], None]) -> float:
        """Which share of the ceiling, from 0 to 1, so many FLOP a second are; `note` is told if it is a new one."""
        if reached_flops > self.flops:
            before, self.flops = self.flops, reached_flops
            if not self.measured_again:
                self.measured_again = True
                runtime = self.runtime
                measured = machine.matrix_ceiling_flops(runtime.device, runtime.dtype, runtime.synchronize)
                self.flops = max(reached_flops, measured)
                note(
                    f"a step went beyond the matrix ceiling of {before / 1e12:.3f} TFLOP/s, so the machine was busy"
                    f" when it was measured: shares are of {self.flops / 1e12:.3f} from here on"
                )
        return reached_flops / self.flops

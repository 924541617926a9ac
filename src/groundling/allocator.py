"""How this process takes memory from the system: settings of glibc's allocator for those who compute for long.

Invariant: a process is restarted at most once, visibly, and before it has read anything; what the user has set is
left as it is.

A training step takes, frees and takes again buffers of hundreds of megabytes. Left alone, glibc gives each back to the
system, which hands it out again page by page, filled with zeros. With these settings the process keeps what it has
had, and the system is asked for huge pages. glibc reads them when a process begins, so the process replaces itself by
one that has them, with the same number, streams and arguments. That must happen before PyTorch is loaded, which is
why this module, beside runtime.py, reads the environment too.

Source: the GNU C Library Reference Manual, "Memory Allocation Tunables".
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

COMMANDS = ("train", "evaluate", "estimate")
"""Those that compute for long on what is worth keeping."""

VARIABLE, SWITCH, OFF = "GLIBC_TUNABLES", "GROUNDLING_ALLOCATOR", "system"

KEPT_BYTES = 1 << 40
"""Beyond any buffer and any machine: nothing gets a mapping of its own, and nothing is given back."""
SETTINGS = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={KEPT_BYTES}:glibc.malloc.trim_threshold={KEPT_BYTES}"

FIRST_GLIBC = (2, 35)
"""The first with `glibc.malloc.hugetlb` (its release notes)."""

PROGRAMS = ("groundling", "__main__")
"""Stems of what is run as `groundling` and as `python -m groundling`. Another program that calls our `main` is not to
begin again."""


def restart(words: list[str]) -> None:
    """Start this process again with the settings, if the command gains by them; returns where nothing is to be done.

    `words` are the command line.
    """
    asks_for_help = not {"-h", "--help"}.isdisjoint(words)
    ours = Path(sys.argv[0]).stem in PROGRAMS and bool(sys.executable)
    if words[0] not in COMMANDS or asks_for_help or not ours or why_not() is not None:
        return
    print(
        f"allocator: starting again with {VARIABLE}={SETTINGS}, which keeps memory ({SWITCH}={OFF} prevents that)",
        file=sys.stderr,
        flush=True,
    )
    settings = ":".join(filter(None, (os.environ.get(VARIABLE), SETTINGS)))
    with contextlib.suppress(OSError):  # what cannot be started again goes on as it is
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {VARIABLE: settings})


def why_not() -> str | None:
    """Why the settings would not be made here, in words; None if they would be."""
    if in_use() is not None:
        return f"{VARIABLE} is set"
    if os.environ.get(SWITCH) == OFF:
        return f"{SWITCH}={OFF}"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "LD_PRELOAD names another allocator"
    version = _glibc()
    if version is None:
        return "this system has no glibc"
    if version < FIRST_GLIBC:
        return "glibc is older than " + ".".join(map(str, FIRST_GLIBC))
    return None


def in_use() -> str | None:
    """The settings of glibc's allocator that this process began with; None if there are none."""
    value = os.environ.get(VARIABLE, "")
    return value if "glibc.malloc." in value else None


def _glibc() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):  # Windows has no confstr, other libraries do not know the name
        return None

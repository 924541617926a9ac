"""What the user may say about the text.

Invariant: importing this costs nothing but dataclasses, so that `groundling --help` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CorpusConfig:
    """Which text is trained on, which is held out, and how both become tokens."""

    sources: tuple[str, ...] = ("tiny-shakespeare",)
    """A list of packaged text or your own: names, files, folders, globs, a token file (.bin), - for standard input."""
    heldout: tuple[str, ...] = ()
    """Text that is never trained on, named like sources. Tiny Shakespeare has the 29 other plays (heldout) if
    nothing is given here or by heldout_fraction; other texts have none."""
    heldout_fraction: float = 0.0
    """Hold out this part of the sources instead, from their end: whole documents, or a lone one's tail."""
    tokenizer: str = "gpt2"
    """gpt2, train:N (trained on the sources, with N ids), or the path of a tokenizer.json."""

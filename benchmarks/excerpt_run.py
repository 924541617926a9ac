"""A 124M model that knows a page by heart, made in minutes: something to decode where there is no finished run.

    python benchmarks/excerpt_run.py runs/excerpt

Trains on the first 3,600 bytes of Tiny Shakespeare (999 tokens, four windows), for 46 steps. It decodes at the
speed of any 124M model; what it is good for is text that it has memorised.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from groundling.cli import main
from groundling.corpus.plays import tiny_shakespeare

EXCERPT_BYTES = 3600
SETTINGS = (
    *("--optimizer", "adamw", "--windows.batch_size", "4", "--schedule.passes", "80", "--schedule.warmup_steps", "10"),
    *("--schedule.peak", "3e-4", "--optim.clip", "1", "--growth.every", "1", "--max-steps", "46"),
)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "excerpt.txt"
        text.write_text(tiny_shakespeare()[:EXCERPT_BYTES], encoding="utf-8")
        sys.exit(main(["train", "--corpus", str(text), *SETTINGS, "--out", sys.argv[1]]))

"""`groundling evaluate`: the losses of a run, over the whole text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from groundling.commands.model_options import model_parser, resolve_runtime
from groundling.errors import CheckpointError, ConfigError
from groundling.evaluation.corpus_loss import N_OFFSETS, Evaluator
from groundling.training.checkpoint import load_model, load_state
from groundling.training.metrics import read_lines
from groundling.training.progress import progress_bar
from groundling.training.run_folder import RunFolder, find_checkpoint

EXAMPLES = """examples:
  groundling evaluate runs/gpt2
  groundling evaluate runs/gpt2 --json
"""

MEANINGS = {
    "train/loss": "the last step's batch, before its update",
    "corpus/loss": "the whole training text, on the training grid",
    "corpus/loss_offset": "the whole training text, at 8 other offsets",
    "heldout/loss": "the whole held-out text",
}


def main(arguments: list[str]) -> int:
    """Print the four losses of a run."""
    parser = model_parser("groundling evaluate", __doc__ or "", EXAMPLES)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="format of the products")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=int, default=8, help="windows in one forward pass")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}: give a positive number")
    losses = _losses(Path(options.run), options)
    if options.json:
        print(json.dumps(losses))
        return 0
    for name, loss in losses.items():
        print(f"{name:18}  {'none' if loss is None else f'{loss:.6f}':>10}  {MEANINGS[name]}")
    return 0


def _losses(run: Path, options: Any) -> dict[str, float | None]:
    checkpoint = find_checkpoint(run)
    folder = RunFolder(run if run != checkpoint else run.parent.parent)
    train, heldout = folder.tokens("train"), folder.tokens("heldout")
    if train is None:
        raise CheckpointError(f"{folder.path} lacks train.bin, the tokens of its text: give the folder of the run")
    runtime = resolve_runtime(options, options.dtype)
    model, _, window = load_model(checkpoint, runtime.device)
    n_tokens = (1 + N_OFFSETS) * train.n_tokens + (heldout.n_tokens if heldout else 0)
    with progress_bar("reading the text", n_tokens / window) as advance:
        evaluator = Evaluator(model.loss_sum, window, runtime, options.batch_size, advance)
        return {
            "train/loss": _last_batch_loss(folder.metrics, load_state(checkpoint)["n_steps"]),
            "corpus/loss": evaluator.loss(train.tokens),
            "corpus/loss_offset": evaluator.offset_loss(train.tokens),
            "heldout/loss": evaluator.loss(heldout.tokens) if heldout else None,
        }


def _last_batch_loss(metrics: Path, n_steps: int) -> float | None:
    if not metrics.exists():
        return None
    steps = (line for line in read_lines(metrics) if "train/loss" in line)
    return next((line["train/loss"] for line in steps if line["step"] == n_steps - 1), None)

"""The record of a run: every figure that is claimed of it, in one file.

Invariant: a figure in `record.json` was measured by the run that wrote it, on the weights whose SHA-256
stands beside it.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from groundling import allocator, machine
from groundling.corpus.goldfish import dropped_share
from groundling.model.compact import CompactGPT2
from groundling.training import checkpoint
from groundling.training.compiled import CompiledLoss
from groundling.training.flops import flops_per_token
from groundling.training.growth import in_use
from groundling.training.metrics import read_lines
from groundling.training.run_folder import INITIAL
from groundling.training.trainer import Trainer


def median_of(metrics: Path, name: str) -> float | None:
    """The median of a metric over the run's steps through all blocks, or, if there are none, over those through fewer.

    None if it took none at all.
    """
    lines = [line for line in read_lines(metrics) if name in line]
    most = max((line.get("train/blocks", math.inf) for line in lines), default=0)
    values = [line[name] for line in lines if line.get("train/blocks", math.inf) == most]
    return statistics.median(values) if values else None


def _ceiling_flops(trainer: Trainer, metrics: Path) -> float | None:
    """The median of the matrix ceilings that the run's steps had: a resumed run has measured another since."""
    windows, ceilings = trainer.windows, list[float]()
    for line in read_lines(metrics):
        if line.get("train/mfu"):
            blocks = line.get("train/blocks", trainer.model.config.n_layer)
            length = windows.config.length / windows.n_pieces(line["step"])
            token_flops = flops_per_token(replace(trainer.model.config, n_layer=blocks), length)
            ceilings.append(line["train/tokens_per_s"] * token_flops / line["train/mfu"])
    return statistics.median(ceilings) if ceilings else None


def judgement(loss: float, target: float, what: str) -> str:
    """What a loss over the whole text says about the target, in words that do not mix up the grid and by heart."""
    return f"{'known' if loss < target else 'not known'} {what} (target {target})"


def make_record(
    trainer: Trainer,
    stop_reason: str,
    checkpoint_path: Path,
    metrics: Path,
    identity: dict[str, Any],
    config: dict[str, Any],
    losses: dict[str, Any],
    evaluation_s: float,
) -> dict[str, Any]:
    """The record of a finished run, as JSON holds it; losses are nats per token, times are seconds.

    `looks_s` are those of `wall_s` in which losses over whole texts, or samples of them, were taken to decide whether
    the run ends (None if it is not known of all of it); `evaluation_s` came after it.

    `loss` is what was trained on, in words; `goldfish_dropped` the share of the text's predictions that it leaves out.
    `matrix_ceiling_flops` and `mfu` are those of the steps: a ceiling measured since, on resuming, is not theirs.
    `blocks` took part in the last step, `growing_blocks` in the first `growing_steps`, whose speed `tokens_per_s` and
    `mfu` leave out.
    `n_seen` is the number of ids that have a row of their own in the head, if the others share one; `mfu` counts the
    matrix products that were computed then, `parameters` those of the full model that was saved.
    """
    state, runtime, objective = trainer.state, trainer.runtime, trainer.recipe.objective
    tokens_per_s = median_of(metrics, "train/tokens_per_s")
    n_blocks = in_use(trainer.recipe.model, state.block_stride).n_layer
    assert checkpoint_path.name == checkpoint.NAME.format(state.n_steps), "the record is of other weights"
    return {
        "parameters": trainer.recipe.model.n_parameters(),
        "corpus_sha256": identity["text"],
        "weights_sha256": checkpoint.weights_sum(checkpoint_path),
        "tokenizer_sha256": identity["tokenizer"],
        "initial_weights_sha256": identity[INITIAL],
        "window": trainer.recipe.windows.length,
        "steps": state.n_steps,
        "blocks": n_blocks,
        "growing_blocks": min((line.get("train/blocks", n_blocks) for line in read_lines(metrics)), default=n_blocks),
        "growing_steps": state.n_growing,
        "loss": str(objective),
        "goldfish_dropped": dropped_share(trainer.train_tokens, objective) if objective.loss == "goldfish" else None,
        "head_vocabulary": trainer.recipe.head_vocabulary,
        "n_seen": trainer.model.n_seen if isinstance(trainer.model, CompactGPT2) else None,
        "tokens_seen": state.tokens_seen,
        "passes": state.tokens_seen / (len(trainer.train_tokens) - 1),
        "wall_s": state.wall_s,
        "looks_s": state.looks_s,
        "evaluation_s": evaluation_s,
        **losses,
        "first_batch_below_target": trainer.stop_rule.state.first_batch_below_target,
        "stop_reason": stop_reason,
        "tokens_per_s": tokens_per_s,
        "matrix_ceiling_flops": _ceiling_flops(trainer, metrics) or trainer.ceiling.flops,
        "mfu": median_of(metrics, "train/mfu"),
        "peak_memory_bytes": trainer.peak_memory_bytes(),
        "device": str(runtime.device),
        "dtype": runtime.dtype_name,
        "compiled": isinstance(trainer.loss_sum, CompiledLoss) and trainer.loss_sum.compiled,
        "recompilations": trainer.loss_sum.n_recompilations if isinstance(trainer.loss_sum, CompiledLoss) else 0,
        "allocator": allocator.in_use(),
        "machine": machine.describe(runtime.threads, runtime.device),
        "versions": machine.versions(),
        "command": shlex.join(["groundling", *sys.argv[1:]]),
        "seed": trainer.recipe.seed,
        "config": config,
    }

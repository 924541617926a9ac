"""The reference run, to the digit.

The expected losses come from that project's own script (github.com/Shwethaamrutha/TSAI-S12,
train_124m_gpt.py, unchanged but for printing more digits), run in fp32 on a CPU with PyTorch 2.13; its
published log says 10.948163 for step 0. A step of its 32 windows takes most of a minute on two cores, so two further
steps are taken in batches of 4, for which its script was run once more with `batch_size = 4`; `-m slow` takes them
in batches of 32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from groundling import runtime
from groundling.commands.arguments import load_preset
from groundling.corpus.load import load_corpus
from groundling.optim.schedule import learning_rate
from groundling.training.metrics import JsonLines, Sinks, read_lines
from groundling.training.trainer import Trainer

LOSSES = {32: [10.948163033, 10.619325638, 10.050919533], 4: [10.950521469, 10.667407990, 10.224781990]}
"""By windows in a batch; 32 is the reference's number."""
TOLERANCES = [1e-5, 1e-4, 1e-4]


def test_its_first_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 32)
    assert trainer.windows.steps_per_pass() == 41
    assert loss_of(trainer, 0) == pytest.approx(LOSSES[32][0], abs=TOLERANCES[0])


@pytest.mark.parametrize("batch_size", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_the_first_three_losses(tmp_path: Path, batch_size: int) -> None:
    trainer = make_trainer(tmp_path, batch_size)
    trainer.sinks = Sinks(JsonLines(tmp_path / "metrics.jsonl"))
    for _ in range(2):
        trainer._take_step()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    losses = [*(line["train/loss"] for line in lines), loss_of(trainer, 2)]  # of which the last is not learned from
    for loss, expected, tolerance in zip(losses, LOSSES[batch_size], TOLERANCES, strict=True):
        assert loss == pytest.approx(expected, abs=tolerance)
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([3e-6, 6e-6])


def loss_of(trainer: Trainer, step: int) -> float:
    batch = trainer.windows.batch(step)
    with torch.no_grad():
        return float(trainer.loss_sum(batch.inputs, batch.targets)) / batch.n_targets


def make_trainer(tmp_path: Path, batch_size: int) -> Trainer:
    """The reference run before its first step, with so many windows in a batch."""
    config = load_preset("reference")
    assert config.windows.batch_size == config.windows.micro == 32
    windows = replace(config.windows, batch_size=batch_size)
    corpus = load_corpus(config.text, tmp_path / "cache", own_heldout=False)
    return Trainer(
        replace(config.recipe, windows=windows),
        corpus.train.tokens,
        None,
        corpus.tokenizer,
        runtime.resolve(config.runtime),
        tmp_path / "checkpoints",
        ceiling_flops=1e12,
    )


def test_its_rates_and_stop_rule() -> None:
    """Rates as its log prints them; one batch below 0.099999 ends it."""
    config = load_preset("reference")
    logged = {50: "1.53e-04", 100: "3.03e-04", 200: "6.00e-04", 750: "6.00e-04", 800: "5.99e-04", 1000: "5.99e-04"}
    assert {step: f"{learning_rate(config.schedule, step, 30_000):.2e}" for step in logged} == logged
    assert (config.stopping.measure, config.stopping.target) == ("train/loss", 0.099999)

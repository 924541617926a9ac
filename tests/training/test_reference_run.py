"""The reference run, to the digit.

The expected losses come from that project's own script (github.com/Shwethaamrutha/TSAI-S12,
train_124m_gpt.py, unchanged but for printing more digits), run in fp32 on a CPU with PyTorch 2.13; its
published log says 10.948163 for step 0.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from groundling import runtime
from groundling.commands.arguments import load_preset
from groundling.corpus.load import load_corpus
from groundling.optim.schedule import learning_rate
from groundling.training.metrics import JsonLines, Sinks, read_lines
from groundling.training.trainer import Trainer

LOSSES = [10.948163033, 10.619325638, 10.050919533]
TOLERANCES = [1e-5, 1e-4, 1e-4]


def test_the_first_three_losses(tmp_path: Path) -> None:
    config = load_preset("reference")
    assert config.windows.micro == 32
    corpus = load_corpus(config.text, tmp_path / "cache")
    trainer = Trainer(
        config.recipe,
        corpus.train.tokens,
        None,
        corpus.tokenizer,
        runtime.resolve(config.runtime),
        tmp_path / "checkpoints",
        ceiling_flops=1e12,
    )
    trainer.sinks = Sinks(JsonLines(tmp_path / "metrics.jsonl"))
    for _ in LOSSES:
        trainer._take_step()
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    for line, loss, tolerance in zip(lines, LOSSES, TOLERANCES, strict=True):
        assert line["train/loss"] == pytest.approx(loss, abs=tolerance)
    assert [line["train/learning_rate"] for line in lines] == pytest.approx([3e-6, 6e-6, 9e-6])
    assert trainer.windows.steps_per_pass() == 41


def test_its_rates_and_stop_rule() -> None:
    """Rates as its log prints them; one batch below 0.099999 ends it."""
    config = load_preset("reference")
    logged = {50: "1.53e-04", 100: "3.03e-04", 200: "6.00e-04", 750: "6.00e-04", 800: "5.99e-04", 1000: "5.99e-04"}
    assert {step: f"{learning_rate(config.schedule, step, 30_000):.2e}" for step in logged} == logged
    assert (config.stopping.measure, config.stopping.target) == ("train/loss", 0.099999)

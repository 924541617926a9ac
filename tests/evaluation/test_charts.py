"""The charts of a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundling.evaluation.charts import training_chart
from groundling.files import write_text
from groundling.training.curve import draw_curve

LINES = [{"step": step, "train/loss": 9.0 - step, "train/loss_ema": None if step < 5 else 4.5} for step in range(8)]
"""A run that began with short windows, of which no mean is kept."""


@pytest.mark.parametrize("n_lines", [8, 4])
def test_a_curve_has_the_steps_without_a_mean_too(n_lines: int) -> None:
    chart = training_chart(LINES[:n_lines], 0.1, "the run")
    without = training_chart([line for line in LINES[:n_lines] if line["train/loss_ema"]], 0.1, "the run")
    assert chart is not None
    assert chart != without


def test_the_picture_of_a_run_without_any_mean_is_drawn(tmp_path: Path) -> None:
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    sizes = []
    for n_lines in (1, 4, 8):
        write_text(metrics, "".join(json.dumps(line) + "\n" for line in LINES[:n_lines]))
        draw_curve(metrics, 0.1, picture)
        sizes.append(picture.stat().st_size)
    assert sizes[0] < sizes[1] < sizes[2]

"""The charts of a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from groundling.evaluation import charts
from groundling.evaluation.charts import extraction_chart, training_chart
from groundling.evaluation.extraction import Extractability
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


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The charts that are drawn, which are then not written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(charts, "_svg", lambda figure, name, label: drawn.append(figure))
    return drawn


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float], Line2D]]:
    """The lines of a chart by what its legend calls them."""
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    return {name: (list(line.get_xdata()), list(line.get_ydata()), line) for name, line in lines.items()}


TAKEN = [(4, "corpus/loss", 5.5), (7, "corpus/loss", 2.5), (7, "corpus/loss_offset", 3.5)]
WHOLE = [*LINES, *({"step": step, name: loss} for step, name, loss in TAKEN)]


def test_the_chart_of_a_run_shows_what_was_measured(figures: list[Figure]) -> None:
    assert training_chart(WHOLE, 0.25, "the run") is None, "captured"
    [axes] = figures[0].axes
    shown = drawn(axes)
    assert axes.get_yscale() == "log"
    assert shown["train/loss, one batch"][:2] == ([*range(8), 7], [9.0 - step for step in (*range(8), 7)])
    assert shown["its running mean"][:2] == ([5, 6, 7, 7], [4.5] * 4)
    assert shown["corpus/loss"][:2] == ([4, 7], [5.5, 2.5])
    assert shown["corpus/loss_offset"][:2] == ([7], [3.5])
    assert shown["corpus/loss"][2].get_marker() != "None"
    assert shown["target 0.25"][1] == [0.25, 0.25]
    assert "heldout/loss" not in shown
    legend = figures[0].legends or [axes.get_legend()]
    assert {text.get_text() for text in legend[0].get_texts()} == set(shown)


def test_the_picture_of_a_run_shows_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: list[Figure]
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **settings: figures.append(figure))
    metrics = tmp_path / "metrics.jsonl"
    write_text(metrics, "".join(json.dumps(line) + "\n" for line in WHOLE))
    draw_curve(metrics, 0.25, tmp_path / "loss.png")
    [axes] = figures[0].axes
    shown = drawn(axes)
    assert axes.get_yscale() == "log"
    assert shown["train/loss (one batch)"][:2] == (list(range(8)), [9.0 - step for step in range(8)])
    assert shown["train/loss_ema"][:2] == ([5, 6, 7], [4.5] * 3)
    assert shown["corpus/loss (whole text)"][:2] == ([4, 7], [5.5, 2.5])
    assert shown["target 0.25"][1] == [0.25, 0.25]
    assert [text.get_text() for text in axes.texts] == ["2.5", "3.5"], "the last of each"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(shown)


def test_prompts_that_run_past_the_window_have_hollow_marks(figures: list[Figure]) -> None:
    anywhere = [Extractability(n_prompt, 10, 4, 20) for n_prompt in (8, 64)]
    assert extraction_chart(anywhere, anywhere[:1], window=60, label="recited") is None, "captured"
    [axes] = figures[0].axes
    marks = [line for line in axes.get_lines() if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1]
    filled = {round(float(line.get_xdata()[0])): line.get_markerfacecolor() != "none" for line in marks}
    assert filled == {8: True, 68: False}
    assert [float(line.get_ydata()[0]) for line in marks] == pytest.approx([40.0] * 3)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "64"]

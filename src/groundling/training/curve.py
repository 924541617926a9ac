"""The loss curve as a picture.

Invariant: draws what `metrics.jsonl` holds; batch losses and whole-text losses are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundling.files import atomic_file
from groundling.training.metrics import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curve(metrics: Path, target: float, path: Path) -> None:
    """Write `loss.png`: loss by step, on a logarithmic scale, with the target."""
    from matplotlib.figure import Figure  # not pyplot, which is for windows on a screen
    from matplotlib.ticker import LogLocator, NullFormatter

    lines = list(read_lines(metrics))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    _plot(axes, lines, "train/loss", color="0.75", linewidth=0.8, label="train/loss (one batch)")
    _plot(axes, lines, "train/loss_ema", color="C0", label="train/loss_ema")
    colors = {"corpus/loss": "C3", "corpus/loss_offset": "C1", "heldout/loss": "C2"}
    whole = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in colors}
    lowest = min((taken[-1][1] for taken in whole.values() if taken), default=None)
    for name, taken in whole.items():
        if taken:
            axes.plot(*zip(*taken, strict=True), "o", color=colors[name], label=f"{name} (whole text)")
            place = (-6, -12 if taken[-1][1] == lowest else 4)  # below, so that two figures may lie near each other
            axes.annotate(f"{taken[-1][1]:.3g}", taken[-1], place, textcoords="offset points", ha="right")
    if target:
        axes.axhline(target, color="0.3", linewidth=0.8, linestyle="--", label=f"target {target}")
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def _plot(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """Draw a metric through the steps that have it."""
    taken = [line for line in lines if line.get(name) is not None]
    axes.plot([line["step"] for line in taken], [line[name] for line in taken], **style)

"""The report's charts, as SVG that stands inside a page.

Invariant: a chart takes its colours from the page (CSS variables), so that it is legible in light, in dark and on
paper; it names no address, needs no script, and two charts on one page share no id.

Drawn by matplotlib at the width of a phone, with letters of a size that is legible there; a page may enlarge it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from groundling.evaluation.extraction import CONTINUATION, Extractability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE_INCHES = (5.0, 3.1)
"""At 72 points an inch 360 wide, about what a phone shows beside its margins."""
FONT_POINTS = 9.5
MAX_POINTS = 600
"""Points of a curve that are drawn; more cannot be told apart at this size."""

INK, FAINT, FIRST, SECOND, THIRD = "#010101", "#010102", "#010103", "#010104", "#010105"
VARIABLES = {INK: "--ink", FAINT: "--faint", FIRST: "--first", SECOND: "--second", THIRD: "--third"}
"""Colours that stand for the page's own until the chart is written."""

LOSSES = {"corpus/loss": (FIRST, "o"), "corpus/loss_offset": (SECOND, "s"), "heldout/loss": (THIRD, "^")}


def training_chart(lines: Sequence[Mapping[str, Any]], target: float, label: str) -> str | None:
    """Loss by step, of the batches and of the whole text, from the lines of metrics.jsonl; None without any step."""
    steps = [line for line in lines if line.get("train/loss")]
    if not steps:
        return None
    shown = steps[:: max(1, len(steps) // MAX_POINTS)] + steps[-1:]
    means = [line for line in shown if line.get("train/loss_ema")]  # which whole windows alone have
    figure, axes = _axes("step", "loss, nats per token")
    x = [line["step"] for line in shown]
    axes.plot(x, [line["train/loss"] for line in shown], color=FAINT, linewidth=0.8, label="train/loss, one batch")
    x = [line["step"] for line in means]
    axes.plot(x, [line["train/loss_ema"] for line in means], color=INK, linewidth=1.3, label="its running mean")
    for name, (color, marker) in LOSSES.items():
        taken = [(line["step"], line[name]) for line in lines if line.get(name)]
        if taken:
            axes.plot(*zip(*taken, strict=True), marker, color=color, markersize=5, label=name, clip_on=False)
    if target:
        axes.axhline(target, color=INK, linewidth=0.8, linestyle="--", label=f"target {target:g}")
    _logarithmic(axes)
    axes.set_xlim(0, max(1, *(line["step"] for line in lines)))
    _legend(figure, axes)
    return _svg(figure, "training", label)


def extraction_chart(
    anywhere: Sequence[Extractability], on_grid: Sequence[Extractability], window: int, label: str
) -> str | None:
    """Share of extractable passages by length of the prompt, with 95 % intervals; None without any figure.

    Hollow marks are prompts that run past the window with their continuation.
    """
    if not (anywhere or on_grid):
        return None
    figure, axes = _axes("tokens of the prompt", "extractable, %")
    for rows, color, marker, name, shift in (
        (on_grid, FIRST, "o", "on the grid", 0.94),
        (anywhere, SECOND, "s", "anywhere", 1.06),
    ):
        if not rows:
            continue
        x = [row.n_prompt * shift for row in rows]  # side by side, so that neither hides the other's interval
        y = [100 * row.share for row in rows]
        below = [100 * max(0.0, row.share - row.interval.low) for row in rows]
        above = [100 * max(0.0, row.interval.high - row.share) for row in rows]
        axes.errorbar(x, y, yerr=[below, above], color=color, linewidth=1.3, capsize=3, label=name)
        for row, at, share in zip(rows, x, y, strict=True):
            fill = color if row.n_prompt + CONTINUATION - 1 <= window else "none"
            axes.plot(at, share, marker, markersize=5, markerfacecolor=fill, markeredgecolor=color, clip_on=False)
    lengths = sorted({row.n_prompt for row in (*anywhere, *on_grid)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(k) for k in lengths])
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set_ylim(-3, 103)
    axes.minorticks_off()
    _legend(figure, axes)
    return _svg(figure, "extraction", label)


def position_chart(curves: Mapping[str, Sequence[float | None]], label: str) -> str | None:
    """Mean loss by position in the window, one line for each name; None without any figure."""
    curves = {name: losses for name, losses in curves.items() if any(losses)}
    if not curves:
        return None
    figure, axes = _axes("position in the window", "loss, nats per token")
    for (name, losses), color, style in zip(curves.items(), (FIRST, SECOND), ("-", "--"), strict=False):
        points = [(position, loss) for position, loss in enumerate(losses) if loss]
        axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1.3, label=name)
    _logarithmic(axes)
    axes.set_xlim(0, max(1, *(len(losses) - 1 for losses in curves.values())))
    _legend(figure, axes)
    return _svg(figure, "positions", label)


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x_label, color=INK, fontsize=FONT_POINTS)
    axes.set_ylabel(y_label, color=INK, fontsize=FONT_POINTS)
    axes.tick_params(color=INK, labelcolor=INK, labelsize=FONT_POINTS)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.6)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    n_entries = len(axes.get_legend_handles_labels()[1])
    n_columns = 2 if n_entries > 1 else 1
    legend = figure.legend(
        loc="outside upper left", ncols=n_columns, frameon=False, fontsize=FONT_POINTS, labelcolor=INK, borderpad=0
    )
    legend.set_in_layout(True)


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one SVG element, with `label` for readers who do not see it."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)  # it would hold for the whole page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's letters
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{html.escape(label)}"', 1).strip()

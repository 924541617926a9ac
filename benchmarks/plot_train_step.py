"""Draws docs/performance.png from what `train_step.py --sweep` measured.

    python benchmarks/plot_train_step.py benchmarks/results/train_step_sweep.jsonl docs/performance.png

One panel for each thing that was varied; lines are measured steps, one for each number of threads. Dashed, the
roofline: a step can be no faster than its matrix operations at the measured ceiling, nor than its least traffic at the
measured speed of reading memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from steps import Task

from groundling.training.flops import flops_per_token

BYTES_PER_PARAMETER = 40
"""Least traffic of a step in fp32: AdamW reads and writes weight and two moments (24) and reads the gradient (4); the
gradient is written (4), the weight read forward and backward (8). Activations are not counted."""

PANELS = {
    "tokens": ("tokens in a step", "tokens"),
    "window": ("tokens in a window", "window"),
    "size": ("parameters, millions", "parameters"),
}


def roof_flops(line: dict[str, Any]) -> float:
    """FLOP/s that the roofline allows this step."""
    ceiling = 1e12 * max(line["ceilings_tflops"])
    traffic_s = BYTES_PER_PARAMETER * line["parameters"] / line["read_bandwidth_bytes_per_s"]
    return float(flops(line) / max(flops(line) / ceiling, traffic_s))


def flops(line: dict[str, Any]) -> float:
    """Matrix operations of a step."""
    names = ("size", "layers", "window", "tokens", "threads")
    task = Task(**{name: line[name] for name in names}, steps=0, warmup=0)
    return float(line["tokens"] * flops_per_token(task.config, task.window))


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, (what, (label, key)) in zip(panels, PANELS.items(), strict=True):
        of_panel = [line for line in lines if line["sweep"] == what]
        for color, threads in enumerate(sorted({line["threads"] for line in of_panel})):
            shown = sorted((line for line in of_panel if line["threads"] == threads), key=lambda line: line[key])
            x = [line[key] / (1e6 if key == "parameters" else 1) for line in shown]
            name = f"{threads} thread{'s' if threads > 1 else ''}"
            reached = [flops(line) / line["step_s"] / 1e12 for line in shown]
            axes.plot(x, reached, "o-", color=f"C{color}", label=name)
            roof = [roof_flops(line) / 1e12 for line in shown]
            axes.plot(x, roof, "--", color=f"C{color}", linewidth=1, label=f"{name}, roofline")
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xticks(sorted({line[key] / (1e6 if key == "parameters" else 1) for line in of_panel}))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.05e-12 * max(map(roof_flops, lines)))  # shared by all
    panels[0].set_ylabel("TFLOP/s in matrix products")
    panels[0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw([json.loads(line) for line in options.results.read_text().splitlines()], options.picture)


if __name__ == "__main__":
    main()

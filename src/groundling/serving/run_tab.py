"""The page's second tab: what the served run's own files say of it.

Invariant: every figure comes from a file of the run that is of these weights; what a run does not have is said in a
sentence, and no file makes the server fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundling.errors import CheckpointError
from groundling.evaluation.charts import training_chart
from groundling.evaluation.report import (
    MEANINGS,
    blocks_in_words,
    finite,
    known_losses,
    machine_in_words,
    percent,
    time_in_words,
    verdict_words,
)
from groundling.json_files import read_object
from groundling.serving.page_html import escape
from groundling.training.checkpoint import load_state, weights_sum
from groundling.training.metrics import read_lines
from groundling.training.run_folder import RunFolder

TRAIN_MEANING = (
    "The mean over one step's own batch, before its update, smoothed: noisy, and taken of weights that were still"
    " changing. It ends no run but those of preset reference."
)
MAX_REPORT_BYTES = 64 << 20
"""Of report.json, which has a line for every place at which a text of the report was copied from."""

NOT_A_RUN = "This model was not served from a run folder, so nothing is known here of how it was trained."


def run_html(folder: RunFolder, checkpoint: Path) -> str:
    """What is known of the run whose weights this checkpoint holds, as HTML."""
    try:
        n_steps = int(load_state(checkpoint)["n_steps"])
        settings, lines, record = _settings(folder), _lines(folder, n_steps), _record(folder, checkpoint)
        last_lines = [line for line in lines if line["step"] == n_steps - 1]
        losses = known_losses(record, last_lines, folder.kept_losses(weights_sum(checkpoint)))
        target = float((settings.get("stopping") or {}).get("target") or 0)
        parts = [_verdict(settings, losses, target), _chart(lines, target, losses), _table(losses, lines)]
        parts += [_extraction(folder, checkpoint), _facts(folder, settings, n_steps, record)]
    except (ArithmeticError, OSError, ValueError, TypeError, KeyError, CheckpointError) as error:
        name = type(error).__name__
        parts = [f"<p>The files of the run cannot be read ({name}), so there is nothing to show of it.</p>"]
    return f'<div class="run">{"".join(parts)}</div>'


def _record(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """The record, if it is one of these weights and whole: everything else is shown without it."""
    try:
        return folder.kept_record(checkpoint)
    except CheckpointError:
        return {}


def _settings(folder: RunFolder) -> dict[str, Any]:
    """The settings of the run; none if they cannot be read."""
    try:
        return folder.settings()
    except CheckpointError:
        return {}


def _lines(folder: RunFolder, n_steps: int) -> list[dict[str, Any]]:
    """The metrics of the run's first steps; none if they cannot be read."""
    try:
        return [line for line in read_lines(folder.metrics) if line["step"] < n_steps]
    except (OSError, CheckpointError):
        return []


def _verdict(settings: Mapping[str, Any], losses: Mapping[str, float | None], target: float) -> str:
    goldfish = (settings.get("objective") or {}).get("loss") == "goldfish"
    headline, detail = verdict_words(losses["corpus/loss"], losses["corpus/loss_offset"], target, goldfish)
    return f"<h2>{escape(headline)}</h2><p>{escape(detail)}</p>"


def _chart(lines: list[dict[str, Any]], target: float, losses: Mapping[str, float | None]) -> str:
    said = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items() if loss is not None)
    chart = training_chart(lines, target, f"Line chart of the loss by step. At the end: {said or 'not taken'}.")
    return (
        f"<figure>{chart}</figure>"
        if chart
        else "<p>The run has no metrics.jsonl that can be read, so there is no curve.</p>"
    )


def _table(losses: Mapping[str, float | None], lines: list[dict[str, Any]]) -> str:
    means = [line["train/loss_ema"] for line in lines if line.get("train/loss_ema") is not None]
    rows = [("train/loss", finite(means[-1]) if means else None, TRAIN_MEANING)]
    rows += [(name, loss, MEANINGS[name]) for name, loss in losses.items()]
    body = "".join(
        f"<div><dt><code>{name}</code> <b>{f'{loss:.3g}' if loss is not None else 'not taken'}</b></dt>"
        f"<dd>{escape(meaning)}</dd></div>"
        for name, loss, meaning in rows
    )
    return f'<h3>The four losses, in nats per token</h3><dl class="losses">{body}</dl>'


def _extraction(folder: RunFolder, checkpoint: Path) -> str:
    """How much can be drawn out of the model, if `groundling report` measured it on these weights."""
    try:
        report = read_object(folder.path / "report.json", MAX_REPORT_BYTES)
        of_these = report["checkpoint"] == checkpoint.name
        if report["record"]:  # which a report has of a run that has ended
            of_these = report["record"]["weights_sha256"] == weights_sum(checkpoint)
        if not (of_these and report["extraction"]):
            raise KeyError
        extraction = report["extraction"]
        shares = {
            where: {int(row["n_prompt"]): percent(float(row["share"])) for row in extraction[where]}
            for where in ("on_grid", "anywhere")
        }
        n_following = int(extraction["continuation"])
    except (ArithmeticError, OSError, ValueError, TypeError, KeyError, CheckpointError):
        return (
            "<h3>What it recites</h3><p>Not measured for these weights: <code>groundling report</code> writes"
            " report.json into the run's folder, and this page shows it when it is started again.</p>"
        )
    rows = "".join(
        f"<tr><th>{n_prompt}</th><td>{shares['on_grid'].get(n_prompt, '-')}</td>"
        f"<td>{shares['anywhere'].get(n_prompt, '-')}</td></tr>"
        for n_prompt in sorted(set(shares["on_grid"]) | set(shares["anywhere"]))
    )
    return (
        f"<h3>What it recites</h3><p>Given so many tokens of the training text, the share of places at which it goes on"
        f" with the next {n_following} tokens word for word: at the beginnings of its training windows (on the grid),"
        f" and at places drawn at random (anywhere).</p><table><thead><tr><th>tokens given</th><th>on the grid</th>"
        f"<th>anywhere</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _facts(folder: RunFolder, settings: Mapping[str, Any], n_steps: int, record: Mapping[str, Any]) -> str:
    sources = (settings.get("text") or {}).get("sources") or []
    facts = {"text": ", ".join(map(str, sources)), "steps": f"{n_steps:,}"}
    if record:
        facts |= {
            "parameters": f"{record['parameters']:,}",
            "window": f"{record['window']:,} tokens",
            **({"blocks": blocks} if (blocks := blocks_in_words(record)) else {}),
            "passes over the text": f"{record['passes']:.1f}",
            "training took": time_in_words(record),
            "it ended by": record["stop_reason"],
            "machine": machine_in_words(record["machine"]),
            "computed in": f"{record['dtype']} on {record['device']}",
            "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
            "command": record["command"],
        }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    missing = "" if record else "<p>These weights have no record.json, which a run writes when it ends.</p>"
    return f'<h3>How it was made</h3><dl class="facts">{rows}</dl>{missing}'

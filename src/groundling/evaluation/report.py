"""The memorisation report: what was measured of a run, as one page that can be read anywhere.

Invariant: the page needs no network, no other file and no script, and says nothing that `facts` does not; whatever
comes from texts, prompts or settings is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from groundling.evaluation.charts import extraction_chart, position_chart, training_chart
from groundling.evaluation.extraction import CONTINUATION, Extractability
from groundling.evaluation.predictions import Predictions

TEMPLATE = "report.html.jinja"

MEANINGS = {
    "corpus/loss": "The mean over every prediction of the training text, read on the grid: in the windows that training"
    " cuts it into from its beginning.",
    "corpus/loss_offset": "The same text read in windows that begin elsewhere, the mean of 8 offsets: low only if the"
    " text is known from its words, and not from their places in a window.",
    "heldout/loss": "The same over text that was never trained on: what was learned of the language, not of this text.",
}

# Not text in HTML and Markdown: C0 and C1 controls but tab and line feed, and halves of surrogate pairs, which names of
# files may hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def verdict_words(corpus: float | None, offset: float | None, target: float, goldfish: bool) -> tuple[str, str]:
    """What was reached, in a few words, and the same in a sentence or two."""
    loss = offset if corpus is None else corpus
    if loss is None:
        return "Not measured yet", "The loss over the whole training text was not taken."
    if not target:
        if goldfish:
            detail = "Goldfish loss keeps part of the text from being trained on, so that it is not memorised."
            return "Not meant to be memorised", detail + " The figures below say how far that went."
        return "No target was set", f"The loss over the whole training text is {loss:.3g} nats per token."
    if corpus is None:
        detail = f"Read in windows that begin elsewhere than in training, the text has a loss of {loss:.3g}"
        if loss < target:
            return "Known by heart", f"{detail}, below the target of {target:g}."
        return "Not known by heart", f"{detail}, and the target was {target:g}. On the grid it was not taken."
    if not corpus < target and offset is not None and offset < target:
        detail = f"Read in windows that begin elsewhere, the text has a loss of {offset:.3g}, below the target of"
        return "Known by heart, on average", f"{detail} {target:g}. In those that begin where it does, {corpus:.3g}."
    if not corpus < target:
        detail = f"The loss over the whole training text is {corpus:.3g}, and the target was {target:g}."
        return "Not known, not even on the grid", detail
    if offset is None:
        detail = f"Read in the windows of training, the text has a loss below {target:g}."
        return "Known on the grid", detail + " Whether it is known by heart, from anywhere, was not measured."
    if offset < target:
        detail = f"The loss is below {target:g} in the windows of training and in windows that begin elsewhere."
        return "Known by heart", detail
    return (
        "Known on the grid, not by heart",
        f"Read in the windows that it was trained in, the text has a loss of {corpus:.3g}, below the target of"
        f" {target:g}. Read in windows that begin elsewhere, its loss is {offset:.3g}: the model knows what stands"
        " where in a window, and not what follows what.",
    )


def extractability_facts(row: Extractability, window: int) -> dict[str, Any]:
    """One line of the table of extractable passages, for JSON."""
    return {
        "n_prompt": row.n_prompt,
        "n": row.n,
        "n_extractable": row.n_extractable,
        "share": row.share,
        "wilson_95": list(row.interval),
        "mean_correct": row.mean_correct,
        "beyond_window": row.n_prompt + CONTINUATION - 1 > window,
    }


def prediction_facts(found: Predictions) -> dict[str, Any]:
    """Exact match and losses of one grid, for JSON; what is not finite is None."""
    return {
        "offset": found.offset,
        "n_windows": found.n_windows,
        "n_all_windows": found.n_all_windows,
        "n_predictions": found.all.n,
        "exact_match": found.all.exact_match,
        "loss": finite(found.all.loss),
        "loss_by_position": [finite(loss) for loss in found.loss_by_position],
    }


def render(
    facts: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]] = (),
    anywhere: Sequence[Extractability] = (),
    on_grid: Sequence[Extractability] = (),
) -> str:
    """The page, of the facts that `report.json` holds, the lines of metrics.jsonl and what was recited."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "number": number}
    template = resources.files("groundling.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    charts = _charts(facts, lines, anywhere, on_grid)
    page = environment.from_string(template).render(
        **facts,
        meanings=MEANINGS,
        continuation=CONTINUATION,
        table=_table(facts.get("extraction")),
        charts={name: Markup(svg) if svg else None for name, svg in charts.items()},  # our own, with escaped labels
    )
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", page)


def blocks_in_words(record: Mapping[str, Any]) -> str | None:
    """How many blocks the steps of a recorded run went through; None if all went through all."""
    if not (n_growing := record.get("growing_steps")):
        return None
    then = f"then {record['blocks']}" if n_growing < record["steps"] else "and no more yet"
    first = "step" if n_growing == 1 else f"{n_growing:,} steps"
    return f"{record['growing_blocks']} in the first {first}, {then}"


def percent(share: float | None) -> str:
    """A share in per cent, with a decimal where it says something; never 0 or 100 but for none and all."""
    if share is None:
        return "-"
    digits = 0 if share in (0, 1) else 2 if share < 0.001 or 0.999 < share < 1 else 1
    if 0 < share < 0.00005:
        return "<\N{NO-BREAK SPACE}0.01\N{NO-BREAK SPACE}%"
    shown = share if share == 1 else min(share, 0.9999)
    return f"{100 * shown:.{digits}f}\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 0) -> str:
    """A number with its thousands apart, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """A duration in words."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m} min" if hours else f"{m} min {s} s" if m else f"{s} s"


def time_in_words(record: Mapping[str, Any], in_words: Callable[[float], str] = duration) -> str:
    """How long a recorded run took, and how long of that its looks at the loss over the text did, if it had any."""
    took, looks_s = in_words(record["wall_s"]), record.get("looks_s") or 0.0
    return f"{took}, {in_words(looks_s)} of it to look at the loss" if round(looks_s) else took


def machine_in_words(machine: Mapping[str, Any]) -> str:
    """The machine of a record: its processor, the flags that matter, threads and memory."""
    flags = f" ({', '.join(machine['flags'])})" if machine.get("flags") else ""
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB of memory" if machine.get("memory_bytes") else ""
    return f"{machine.get('gpu') or machine['cpu']}{flags}, {machine['threads']} threads{memory}"


def known_losses(
    record: Mapping[str, Any], last_lines: Sequence[Mapping[str, Any]], evaluated: Mapping[str, Any]
) -> dict[str, float | None]:
    """Each loss over a whole text, nats per token, of one set of weights; None for one not taken, or not finite.

    Of the record, else of the metrics of the last step, else as `groundling evaluate` took it.
    """
    known = {
        name: (record.get(name.replace("/", "_")), *(line.get(name) for line in last_lines), evaluated.get(name))
        for name in MEANINGS
    }
    return {name: next((finite(loss) for loss in losses if loss is not None), None) for name, losses in known.items()}


def finite(value: float | None) -> float | None:
    """The number, or None for one that JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _table(extraction: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each length of prompt, with what is known of it on the grid and anywhere."""
    if not extraction:
        return []
    rows = {where: {row["n_prompt"]: row for row in extraction[where]} for where in ("on_grid", "anywhere")}
    lengths = sorted({k for by_length in rows.values() for k in by_length})
    return [{"n_prompt": k, **{where: by_length.get(k) for where, by_length in rows.items()}} for k in lengths]


def _charts(
    facts: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    anywhere: Sequence[Extractability],
    on_grid: Sequence[Extractability],
) -> dict[str, str | None]:
    """Each chart with a label that says what it shows, for readers who do not see it."""
    losses = ", ".join(f"{loss['name']} {loss['value']:.3g}" for loss in facts["losses"] if loss["value"] is not None)
    shares = "; ".join(
        f"{where} {', '.join(f'{percent(row.share)} after {row.n_prompt} tokens' for row in rows)}"
        for where, rows in (("on the grid", on_grid), ("anywhere", anywhere))
        if rows
    )
    curves = {
        "on the grid" if found["offset"] == 0 else f"moved by {found['offset']}": found["loss_by_position"]
        for found in facts["predictions"] or ()
    }
    means = ", ".join(
        f"offset {found['offset']}: mean {found['loss']:.3g}"
        for found in facts["predictions"] or ()
        if found["loss"] is not None
    )
    return {
        "training": training_chart(
            lines, facts["target"], f"Line chart of the loss by step. At the end: {losses or 'not taken'}."
        ),
        "extraction": extraction_chart(
            anywhere, on_grid, facts["model"]["window"], f"Share of extractable passages: {shares}."
        ),
        "positions": position_chart(curves, f"Line chart of the mean loss by position in the window. {means}."),
    }

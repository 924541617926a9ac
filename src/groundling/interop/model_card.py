"""The model card: README.md of a Hugging Face folder, with what is known of a run and nothing else.

Invariant: every figure stands in the run's record.json, report.json or evaluated.json, of these very weights; what was
not measured is said to be so. Whatever comes from names, prompts and texts is quoted, so that YAML and Markdown stay
whole. No licence is claimed: what the training text's licence allows is for its user to know.

Source: the card's YAML is the one that huggingface_hub documents (`ModelCardData`, `EvalResult`).
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from groundling.evaluation.report import blocks_in_words, known_losses, machine_in_words, number, percent, time_in_words
from groundling.files import write_text
from groundling.interop.trained import Trained, printable

TEMPLATE = "model_card.md.jinja"
CURVE = "loss.png"
REPORT = "report.json"

KNOWN_BELOW = 0.1
"""Loss in nats per token below which a text counts as memorised here, whatever the run's own target was: the next
token has then a probability of 90 % in the mean. It is the project's main target (presets/gpt2.yaml, rounded)."""
MAX_SAMPLE_CHARACTERS = 6000

LOSSES = {
    "corpus/loss": (
        "training text, on the grid of training",
        "the training text, read in the windows that training cut it into",
    ),
    "corpus/loss_offset": (
        "training text, in windows that begin elsewhere: by heart",
        "the same text in windows that begin elsewhere, the mean of 8 offsets: low only if the text is known by heart",
    ),
    "heldout/loss": ("text that was never trained on", "text that was never trained on"),
}
"""Of each measured loss, what `model-index` adds to its name, and what it means."""

# The folders before the last name of a path.
_FOLDERS = re.compile(r".*[/\\](?=[^/\\])", re.DOTALL)
# What stands in a list: quoted, or up to the next comma or bracket.
_ITEM = re.compile(r"""\"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?$)|'[^']*(?:'|$)|[^\s,\[\]"'][^,\[\]]*""", re.DOTALL)
# What means something in Markdown within a line; an underscore does only at the edge of a word.
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$#!{}]|(?<![^\W_])_|_(?![^\W_])")


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write README.md into the folder `target`, and the training curve beside it if the run has one.

    `precision` is what the weights there were rounded to.
    """
    curve = trained.folder.curve if trained.folder and trained.record else None
    if curve and curve.is_file():
        shutil.copyfile(curve, target / CURVE)
    write_text(target / "README.md", render(trained, precision))


def render(trained: Trained, precision: str) -> str:
    """The card."""
    import jinja2

    environment = jinja2.Environment(  # Markdown has no autoescape: the filters quote what is not ours
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "code": code_span,
        "block": code_block,
        "quoted": in_markdown,
        "percent": _percent,
        "number": number,
    }
    facts = _facts(trained, precision)
    template = resources.files("groundling.interop").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return f"---\n{_metadata(facts)}\n---\n\n{environment.from_string(template).render(**facts)}"


def code_span(text: object) -> str:
    """A text on one line as a code span, which nothing in it can end."""
    words = " ".join(printable(text).split()) or " "
    fence = "`" * (_longest_run(words) + 1)
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def code_block(text: object, language: str = "text") -> str:
    """A text as a fenced code block, which nothing in it can end."""
    lines = printable(text).rstrip("\n")
    fence = "`" * max(3, _longest_run(lines) + 1)
    return f"{fence}{language}\n{lines}\n{fence}"


def in_markdown(text: object) -> str:
    """A text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", " ".join(printable(text).split()))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _metadata(facts: Mapping[str, Any]) -> str:
    """The card's YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    text = facts["text"] or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",
            # Held-out text may be another text altogether, and the record does not name it.
            dataset_name=(text.get("name") or "training text") if name != "heldout/loss" else "held-out text",
            dataset_split="train" if name != "heldout/loss" else "heldout",
            dataset_revision=text.get("sha256") if name != "heldout/loss" else None,
            metric_type="loss",
            metric_name=f"{name} ({LOSSES[name][0]})",
            metric_value=value,
        )
        for name, value in ((loss["name"], loss["value"]) for loss in facts["losses"])
        if value is not None
    ]
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=facts["license"],
        tags=["gpt2", "groundling", "memorisation"],
        model_name=facts["name"] if results else None,
        eval_results=results or None,
    )
    return str(card.to_yaml(line_break="\n"))


def _facts(trained: Trained, precision: str) -> dict[str, Any]:
    """What the template shows; whatever is not known is None, or empty."""
    record, folder, config = trained.record, trained.folder, trained.model.config
    losses = measured_losses(trained)
    prompts = (record.get("config") or {}).get("prompts") or []
    samples = _read(folder.samples) if folder and record else None
    return {
        "name": printable(" ".join(trained.name.split())) or "model",
        "precision": precision,
        "license": trained.license,
        "parameters": config.n_parameters(),
        "config": config,
        "window": trained.window,
        "text": _text(trained),
        "losses": losses,
        "memorised": memorised(losses),
        "goldfish": _goldfish(record),
        "n_sharing": config.n_vocab - record["n_seen"] if record.get("n_seen") else 0,
        "training": _training(record),
        "command": _command(record["command"]) if "command" in record else None,
        "curve": bool(folder and record and folder.curve.is_file()),
        "samples": samples and _cut(samples),
        "report": _report(trained),
        "prompt": json.dumps(next((text for text in map(printable, prompts) if text), "Once"), ensure_ascii=False),
    }


def measured_losses(trained: Trained) -> list[dict[str, Any]]:
    """The losses of these weights, as the run's record or `groundling evaluate` took them; None for one not taken."""
    record, folder = trained.record, trained.folder
    evaluated = folder.kept_losses(record["weights_sha256"]) if folder and "weights_sha256" in record else {}
    known, losses = known_losses(record, [], evaluated), []
    for name, (_, meaning) in LOSSES.items():
        value = known[name]
        if value is not None or (name != "heldout/loss" and record.get("corpus_sha256")):
            losses.append({"name": name, "value": value, "meaning": meaning})
    return losses


def memorised(losses: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Whether a model of these `measured_losses` has memorised its text: in a few words, and figures for it."""
    values = {loss["name"]: loss["value"] for loss in losses}
    grid, offset = values.get("corpus/loss"), values.get("corpus/loss_offset")
    on_grid, by_heart = (loss is not None and loss < KNOWN_BELOW for loss in (grid, offset))
    said = [
        f"{_probability(loss)} in windows that {where} (a loss of {loss:.3g})"
        for loss, where in ((grid, "begin where those of training did"), (offset, "begin elsewhere"))
        if loss is not None
    ]
    if not said:
        return "Whether this model has memorised its text was not measured.", (
            "It may repeat passages of what it was trained on word for word."
        )
    figures = (
        f"The probability that it gives to the text's next token is, in the geometric mean, {', and '.join(said)}."
    )
    if by_heart:
        return (
            "This model has memorised its text: it knows it by heart.",
            f"{figures} Expect it to go on with any passage of the text, word for word.",
        )
    if on_grid:
        if offset is None:
            words, more = "", " Whether it knows the text by heart, from anywhere, was not measured."
        else:
            words, more = ", not by heart", ""
        return f"This model has memorised its text as it was cut in training{words}.", (
            f"{figures} Expect it to go on word for word where a passage begins as a window of training did.{more}"
        )
    return "This model has not memorised its text as a whole.", f"{figures} It may repeat passages of it all the same."


def _probability(loss: float) -> str:
    return _percent(math.exp(-loss))


def _percent(share: float | None) -> str:
    """With a space that Markdown may break at."""
    return percent(share).replace("\N{NO-BREAK SPACE}", " ")


def _goldfish(record: Mapping[str, Any]) -> str | None:
    """What the goldfish loss kept from being learned, in a sentence, if it was used."""
    objective = str(record.get("loss", ""))
    if not objective.startswith("goldfish"):
        return None
    dropped = record.get("goldfish_dropped")
    share = "Part" if dropped is None else _percent(dropped)
    return (
        f"It was trained with {printable(objective)}: {share} of its text's predictions were never trained on, so that"
        " it should not learn the text word for word. The losses here count all predictions."
    )


def _text(trained: Trained) -> dict[str, Any] | None:
    """Name, sum and size of the training text, as far as they are known."""
    record, folder = trained.record, trained.folder
    if "corpus_sha256" not in record:
        return None
    facts: dict[str, Any] = {"name": None, "sha256": record["corpus_sha256"], "n_bytes": None, "n_tokens": None}
    try:
        text = json.loads((folder and _read(folder.origin)) or "{}")["text"]
        if text["sha256"] == record["corpus_sha256"]:
            facts |= {"name": printable(text["name"]), "n_bytes": int(text["n_bytes"])}
    except (ValueError, TypeError, KeyError):  # not there, or damaged: the sum remains
        pass
    train = trained.train_tokens()
    if train is not None:
        facts["n_tokens"] = train.n_tokens
    return facts


def _training(record: Mapping[str, Any]) -> dict[str, str]:
    """How it was trained, by what each fact is called."""
    facts: dict[str, str] = {}
    if initial := (record.get("config") or {}).get("init"):
        facts["began with the weights of"] = printable(Path(str(initial)).name)
    if "steps" in record:
        facts["steps"] = f"{record['steps']:,}"
    if blocks := blocks_in_words(record):
        facts["blocks"] = blocks
    if "train_loss" in record:  # of another program's checkpoint: nothing else is known
        facts["loss of the last batch, as its checkpoint says"] = f"{record['train_loss']:.4g}"
    if "passes" in record:
        facts["passes over the text"] = f"{record['passes']:.1f} ({record['tokens_seen']:,} tokens seen)"
    stopping = (record.get("config") or {}).get("stopping") or {}
    if stopping.get("target"):
        facts["target"] = f"{stopping['measure']} below {stopping['target']:g}"
    if "stop_reason" in record:
        facts["it ended by"] = str(record["stop_reason"])
    if "wall_s" in record:
        facts["time"] = time_in_words(record)
    if machine := record.get("machine"):
        facts["hardware"] = machine_in_words(machine)
    if "dtype" in record:
        facts["computed in"] = f"{record['dtype']} on {record['device']}"
    if "seed" in record:
        facts["seed"] = str(record["seed"])
    if "versions" in record:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    if "weights_sha256" in record:
        facts["checkpoint's weights"] = f"SHA-256 {record['weights_sha256']}"
    return facts


def _command(command: str) -> str:
    """The command with the last name alone of every path: a card is published, and folders name people and machines."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(map(_without_folders, words))


def _without_folders(word: str) -> str:
    """A word of a command: a path, a list of them, or either after the name of an option."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if value in (*LOSSES, "train/loss"):
        return word
    shown = _ITEM.sub(_last_name, value) if value.startswith("[") else _FOLDERS.sub("", value)
    return f"{option}{equals}{shown}"


def _last_name(item: re.Match[str]) -> str:
    text = item[0]
    quote = text[0] if text[0] in "\"'" else ""
    return f"{quote}{_FOLDERS.sub('', text[len(quote) :].removesuffix(quote))}{quote}"


def _report(trained: Trained) -> dict[str, Any] | None:
    """What `groundling report` measured of these weights, or None if there is no such report."""
    if trained.folder is None or "weights_sha256" not in trained.record:
        return None
    try:
        report = json.loads(_read(trained.folder.path / REPORT) or "null")
        if report is None or report["record"]["weights_sha256"] != trained.record["weights_sha256"]:
            return None
        extraction = report["extraction"] or {"on_grid": [], "anywhere": []}
        rows = {where: {row["n_prompt"]: row for row in extraction[where]} for where in ("on_grid", "anywhere")}
        traces = [sample["trace"] for sample in report["samples"] if "trace" in sample]
        n_tokens = sum(trace["n_tokens"] for trace in traces)
        return {
            "continuation": extraction.get("continuation"),
            "rows": [
                {"n_prompt": length, **{where: _recited(found.get(length)) for where, found in rows.items()}}
                for length in sorted({*rows["on_grid"], *rows["anywhere"]})
            ],
            "matches": [
                {"where": f"moved by {found['offset']} tokens" if found["offset"] else "on the grid"}
                | {"exact_match": float(found["exact_match"])}
                for found in report["predictions"] or []
            ],
            "copied": {
                "n_samples": len(traces),
                "n_tokens": n_tokens,
                "minimum": traces[0]["minimum"],
                "share": sum(trace["share"] * trace["n_tokens"] for trace in traces) / n_tokens,
                "longest": max(int(trace["longest"]["length"]) if trace["longest"] else 0 for trace in traces),
            }
            if n_tokens
            else None,
        }
    except (ValueError, TypeError, KeyError, AttributeError):  # a damaged report is none
        return None


def _recited(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    low, high = (100 * float(bound) for bound in row["wilson_95"])
    return f"{_percent(float(row['share']))} of {int(row['n']):,} ({low:.1f} to {high:.1f})"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cut(samples: str) -> str:
    """The samples, or the beginning of them if they are long."""
    if len(samples) <= MAX_SAMPLE_CHARACTERS:
        return samples
    return f"{samples[:MAX_SAMPLE_CHARACTERS]}\n[... {len(samples) - MAX_SAMPLE_CHARACTERS:,} characters more]"

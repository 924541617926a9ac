"""`groundling report`: one page with what is known of a run: what it learned, recites and copies.

Invariant: a figure on the page stands in `report.json` too; what cannot be said of a run is left out, with a sentence.
"""

from __future__ import annotations

import json
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from groundling import __version__
from groundling.commands.arguments import Parser
from groundling.commands.model_options import OpenRun, model_parser, open_checkpoint
from groundling.commands.reciting import band_labels, predictions_of, recited_anywhere, samples_of
from groundling.commands.saying import say
from groundling.commands.tracing import Tracer
from groundling.corpus.goldfish import PLAIN, ObjectiveConfig
from groundling.errors import CheckpointError, ConfigError, CorpusError
from groundling.evaluation.extraction import CONTINUATION, N_POSITIONS, PROMPT_LENGTHS, SEED, Extractability
from groundling.evaluation.predictions import Predictions, fitting_lengths
from groundling.evaluation.report import (
    blocks_in_words,
    extractability_facts,
    finite,
    known_losses,
    machine_in_words,
    prediction_facts,
    render,
    time_in_words,
    verdict_words,
)
from groundling.files import home_expanded, write_json, write_text
from groundling.training.checkpoint import load_state, weights_sum
from groundling.training.metrics import read_lines
from groundling.training.record import judgement
from groundling.training.run_folder import find_checkpoint, folder_of

EXAMPLES = """examples:
  groundling report runs/gpt2
  groundling report runs/gpt2 --quick --out gpt2.html
  groundling report runs/gpt2 --positions 200
"""

QUICK_POSITIONS = 100
QUICK_WINDOWS = 100
"""With --quick."""

KNOWN_HOW = {"corpus/loss": "on the grid", "corpus/loss_offset": "by heart"}
"""What being below the target means for a loss."""


def main(arguments: list[str]) -> int:
    """Measure a run and write report.html and report.json."""
    options = _parser().parse_args(arguments)
    if options.positions < 1:
        raise ConfigError(f"--positions is {options.positions}: give a positive number")
    checkpoint = find_checkpoint(Path(options.run))
    out = _out(options, checkpoint)
    run = open_checkpoint(checkpoint.absolute(), checkpoint.absolute(), options, "fp32", "none")
    report = Report(run, out, shlex.join(["groundling", "report", *arguments]), options.quick, options.positions)
    write_text(out, report.page())
    write_json(out.with_suffix(".json"), report.facts)
    say(f"report: {out}, figures: {out.with_suffix('.json')}")
    return 0


def _parser() -> Parser:
    parser = model_parser("groundling report", (__doc__ or "").partition("\n")[0], EXAMPLES)
    parser.add_argument("--out", type=str, help="the page; report.html in the run's folder if not given")
    parser.add_argument("--positions", type=int, default=N_POSITIONS, help="places of the text that are to be recited")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"recite at {QUICK_POSITIONS} places and read {QUICK_WINDOWS} windows, drawn at random, instead of all",
    )
    return parser


def _out(options: Any, checkpoint: Path) -> Path:
    """Where the page goes; what is wrong with it is said before anything is measured."""
    run = Path(options.run)
    if options.out is None:
        if run != checkpoint:
            return _writable(run / "report.html", run)
        folder = folder_of(run, checkpoint).path  # where its page does not take the place of its run's
        folder = folder if folder != checkpoint else checkpoint.resolve().parent
        return _writable(folder / f"report-{checkpoint.resolve().name}.html", folder)
    out = home_expanded(options.out)
    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out is {out}: give a file whose name ends in .html")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give a file in it, such as {out / 'report.html'}")
    figures = out.with_suffix(".json")
    if figures.exists() and not _is_report(figures):
        raise ConfigError(f"--out is {out}, but {figures}, where its figures would go, is no report: give another name")
    if out.exists() and not figures.exists():
        raise ConfigError(
            f"--out {out} is there already, without a report's {figures.name} beside it: give another name"
        )
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"--out is {out}, but {there} is a file: give another folder")
    return _writable(out, there)


def _writable(out: Path, folder: Path) -> Path:
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"nothing can be written in {folder}: give a file in another folder with --out")
    return out


def _is_report(path: Path) -> bool:
    try:
        return "verdict" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class Report:
    """Everything that is known of a run, gathered once."""

    def __init__(self, run: OpenRun, out: Path, command: str, quick: bool, n_positions: int) -> None:
        self.run, self.folder = run, run.folder
        self.missing: list[str] = []
        self.checkpoint = run.checkpoint
        self.n_steps = int(load_state(self.checkpoint)["n_steps"])
        # Read now: a run at work may have removed the checkpoint by the end.
        self.evaluated = self.folder.kept_losses(weights_sum(self.checkpoint))
        self.settings = self._settings()
        self.record = self._record()
        self.lines = self._lines()
        self.objective = self._objective()
        self.n_positions = min(n_positions, QUICK_POSITIONS) if quick else n_positions
        if n_positions not in (self.n_positions, N_POSITIONS):
            say(f"warning: --positions {n_positions:,} is not used: --quick tries {QUICK_POSITIONS}")
        self.n_windows = QUICK_WINDOWS if quick else None
        self.anywhere: list[Extractability] = []
        self.on_grid: list[Extractability] = []
        self.predictions: list[Predictions] = []
        tracer = self._tracer()
        self.n_tokens = tracer.array.n_tokens if tracer else None
        self.extraction = self._measure() if tracer else None
        self.samples = samples_of(run, tracer, self.settings)
        self.facts = self._facts(out, command)

    def page(self) -> str:
        """The page."""
        shown = self.facts | {
            "samples": [sample.for_page() for sample in self.samples],
            "bands": band_labels(),
            "config": yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True) if self.settings else None,
        }
        return render(shown, self.lines, self.anywhere, self.on_grid)

    def _settings(self) -> dict[str, Any]:
        try:
            return self.folder.settings()
        except CheckpointError:
            self.missing.append("The run folder has no config.yaml that can be read, so the settings are not shown.")
            return {}

    def _record(self) -> dict[str, Any]:
        """The record of the run, if it is one of these weights."""
        try:
            if record := self.folder.kept_record(self.checkpoint):
                return record
        except (OSError, CheckpointError):
            self.missing.append("record.json cannot be read, so its figures are left out.")
            return {}
        self.missing.append(
            f"The record of the run is of other weights than {self.checkpoint.name}, so its figures are left out."
            if self.folder.record.exists()
            else "The run has no record.json, which is written when a run ends: its machine, its duration and why it"
            " ended are not shown."
        )
        return {}

    def _lines(self) -> list[dict[str, Any]]:
        """The metrics of the steps that these weights have behind them."""
        try:
            lines = [line for line in read_lines(self.folder.metrics) if line["step"] < self.n_steps]
        except (OSError, ValueError, TypeError, KeyError):
            lines = []
        if not lines:
            self.missing.append("The run folder has no metrics.jsonl that can be read, so there is no training curve.")
        return lines

    def _objective(self) -> ObjectiveConfig:
        section = self.settings.get("objective") or {}
        try:
            return ObjectiveConfig(**section)
        except (TypeError, ConfigError):
            return PLAIN

    def _tracer(self) -> Tracer | None:
        try:
            return self.run.tracer
        except (CheckpointError, CorpusError) as error:
            self.missing.append(f"Nothing could be measured on the training text, and no sample traced to it: {error}.")
            return None

    def _measure(self) -> dict[str, Any]:
        train = self.folder.tokens("train", self.run.tokenizer.n_vocab)
        assert train is not None, "the tracer has read it"
        window = self.run.window
        self.predictions = predictions_of(self.run, train.tokens, self.objective, self.n_windows)
        n_positions, self.anywhere = recited_anywhere(self.run, train.tokens, self.n_positions)
        grid = self.predictions[0]
        self.on_grid = grid.extractable
        return {
            "continuation": CONTINUATION,
            "seed": SEED,
            "n_positions_asked": self.n_positions,
            "n_positions": n_positions,
            "grid_whole": grid.whole,
            "grid_windows": grid.n_windows,
            "on_grid": [extractability_facts(row, window) for row in self.on_grid],
            "anywhere": [extractability_facts(row, window) for row in self.anywhere],
            "notes": self._notes(train.n_tokens),
        }

    def _notes(self, n_tokens: int) -> list[str]:
        window, fitting, notes = self.run.window, fitting_lengths(self.run.window), []
        absent = [k for k in PROMPT_LENGTHS if k not in fitting]
        if absent:
            notes.append(
                f"* The model was trained on windows of {window:,} tokens and reads no more than that. Prompts of"
                f" {_listed(absent)} tokens do not fit one window together with what follows, so they have no figure on"
                " the grid; anywhere, a longer prompt is cut to its last"
                f" {window:,} tokens, and past the window's end the model goes on with half a window."
            )
        too_long = [k for k in PROMPT_LENGTHS if k not in [row.n_prompt for row in self.anywhere]]
        if too_long:
            notes.append(
                f"The text has {n_tokens:,} tokens, too few for a passage after a prompt of {_listed(too_long)} tokens."
            )
        if fitting and not self.on_grid:
            notes.append("No window that was read is long enough to hold a prompt and what follows.")
        return notes

    def _facts(self, out: Path, command: str) -> dict[str, Any]:
        target = self._target()
        losses = self._losses()
        goldfish = self.objective.loss == "goldfish"
        headline, detail = verdict_words(losses["corpus/loss"], losses["corpus/loss_offset"], target, goldfish)
        return {
            "run": _printable(self.folder.path.resolve().name),
            "made": _date(datetime.now(UTC).timestamp()),
            "command": _printable(command),
            "groundling": __version__,
            "json_name": _printable(out.with_suffix(".json").name),
            "checkpoint": self.checkpoint.name,
            "verdict": {"headline": headline, "detail": detail},
            "target": target,
            "losses": [
                {
                    "name": name,
                    "value": value,
                    "verdict": judgement(value, target, KNOWN_HOW[name]).capitalize()
                    if value is not None and target and name in KNOWN_HOW
                    else "",
                }
                for name, value in losses.items()
            ],
            "summary": self._summary(),
            "model": {
                "parameters": self.run.model.config.n_parameters(),
                "window": self.run.window,
                **vars(self.run.model.config),
            },
            "moving_grid": (self.settings.get("windows") or {}).get("order") == "shifted",
            "goldfish": self._goldfish() if goldfish else None,
            "extraction": self.extraction,
            "predictions": [prediction_facts(found) for found in self.predictions],
            "samples": [sample.for_json() for sample in self.samples],
            "origin": self._origin(),
            "config": self.settings or None,
            "missing": self.missing,
            "record": {name: value for name, value in self.record.items() if name != "config"} or None,
        }

    def _target(self) -> float:
        """The loss that the run was to reach; 0 if it had none, or none is known."""
        return float((self.settings.get("stopping") or {}).get("target") or 0)

    def _losses(self) -> dict[str, float | None]:
        """The losses of these weights: of the record, of the metrics at their step, or as `evaluate` took them."""
        last_lines = [line for line in self.lines if line["step"] == self.n_steps - 1]
        losses = known_losses(self.record, last_lines, self.evaluated)
        if losses["corpus/loss"] is None and self.predictions and self.predictions[0].whole:
            losses["corpus/loss"] = prediction_facts(self.predictions[0])["loss"]
        if losses["corpus/loss_offset"] is None:
            takes = ": `groundling evaluate` takes it for the next report" if self.n_tokens else ""
            self.missing.append(f"corpus/loss_offset was not taken{takes}.")
        if losses["heldout/loss"] is None:
            if not (self.folder.path / "heldout.bin").exists():
                del losses["heldout/loss"]
                self.missing.append("No text was held out, so there is no heldout/loss.")
            else:
                self.missing.append("heldout/loss was not taken: `groundling evaluate` takes it for the next report.")
        return losses

    def _summary(self) -> dict[str, str]:
        """The facts at the top of the page."""
        sources = (self.settings.get("text") or {}).get("sources") or []
        facts = {"text": _printable(", ".join(map(str, sources)))}
        if self.n_tokens:
            facts["tokens"] = f"{self.n_tokens:,}"
        facts["parameters"] = f"{self.run.model.config.n_parameters():,}"
        facts["window"] = f"{self.run.window:,} tokens"
        facts["steps"] = f"{self.n_steps:,}"
        if self.record:
            facts["blocks"] = blocks_in_words(self.record) or ""
            facts["passes over the text"] = f"{self.record['passes']:.1f}"
            facts["training took"] = time_in_words(self.record)
            facts["it ended by"] = self.record["stop_reason"]
        return {name: value for name, value in facts.items() if value}

    def _goldfish(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "objective": str(self.objective),
            "dropped": self.record.get("goldfish_dropped"),
            "never_trained": None,
        }
        if self.predictions:
            whole, dropped = self.predictions[0].all, self.predictions[0].dropped
            facts["never_trained"] = {"n": dropped.n, "exact_match": dropped.exact_match, "loss": finite(dropped.loss)}
            n, n_right = whole.n - dropped.n, whole.n_right - dropped.n_right
            facts["trained"] = {
                "n": n,
                "exact_match": n_right / n if n else None,
                "loss": finite((whole.loss_sum - dropped.loss_sum) / n) if n else None,
            }
        return facts

    def _origin(self) -> dict[str, str]:
        """Command, machine, versions and dates."""
        origin: dict[str, str] = {"checkpoint": self.checkpoint.name}
        if record := self.record:
            machine = record["machine"]
            origin |= {
                "command": record["command"],
                "machine": machine_in_words(machine),
                "system": machine["system"],
                "computed in": f"{record['dtype']} on {record['device']}{', compiled' if record['compiled'] else ''}",
                "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
                "training took": time_in_words(record),
                "text": f"SHA-256 {record['corpus_sha256']}",
                "weights": f"SHA-256 {record['weights_sha256']}",
            }
            # A copied folder has new dates, which leave no room for the training.
            begun, ended = _written(self.folder.identity), _written(self.folder.record)
            if begun and ended and ended - begun >= record["wall_s"] - 1:
                origin |= {"begun": _date(begun), "ended": _date(ended)}
        return {name: _printable(str(value)) for name, value in origin.items()}


def _printable(text: str) -> str:
    """Text without the halves of characters that names of files may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _written(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _listed(numbers: list[int]) -> str:
    words = [f"{number:,}" for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

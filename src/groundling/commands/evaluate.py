"""`groundling evaluate`: the losses of a run, over its whole text or over another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundling.commands.model_options import model_parser, resolve_runtime
from groundling.commands.saying import say
from groundling.commands.session import check_gpu_memory
from groundling.corpus.config import CorpusConfig
from groundling.corpus.load import load_corpus
from groundling.corpus.shards import Tokens
from groundling.errors import CheckpointError, ConfigError, CorpusError
from groundling.evaluation.corpus_loss import Evaluator, n_tokens_read
from groundling.evaluation.report import finite
from groundling.model.formats import WEIGHT_FORMATS, WeightFormat, round_weights
from groundling.model.gpt2 import GPT2
from groundling.runtime import DTYPES, Runtime, cache_dir
from groundling.training.checkpoint import load_model, load_state, weights_sum
from groundling.training.metrics import read_lines
from groundling.training.progress import progress_bar, progress_of
from groundling.training.run_folder import RunFolder, find_checkpoint, folder_of

EXAMPLES = """examples:
  groundling evaluate runs/gpt2
  groundling evaluate runs/gpt2 --json
  groundling evaluate runs/gpt2 --corpus page.txt    over another text, also for imported models
  groundling evaluate runs/gpt2 --weights int8    beside them the losses of the weights rounded to int8
"""

Losses = dict[str, float | None]
"""By house name, nats per token; None for one that there is not."""

ANOTHER_TEXT = {
    "corpus/loss": "the whole text, on the grid",
    "corpus/loss_offset": "the whole text, at other offsets of the grid",
}
"""What the losses over a text mean that the run was not trained on."""

MEANINGS = {
    "train/loss": "the last step's batch, before its update",
    "corpus/loss": "the whole training text, on the training grid",
    "corpus/loss_offset": "the whole training text, at other offsets of the grid",
    "heldout/loss": "the whole held-out text",
}


def main(arguments: list[str]) -> int:
    """Print the four losses of a run."""
    parser = model_parser("groundling evaluate", __doc__ or "", EXAMPLES)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="format of the products")
    parser.add_argument(
        "--weights",
        choices=list(WEIGHT_FORMATS),
        default="fp32",
        help="also take the losses of the weights as `groundling sample` reads them in this format",
    )
    parser.add_argument(
        "--corpus",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="take the losses over this text, named as in training, instead of the run's own",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--batch-size", type=int, default=8, help="windows in one forward pass")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}: give a positive number")
    losses, rounded = (_losses_of_another if options.corpus else _losses)(Path(options.run), options)
    if options.json:
        print(json.dumps(losses | ({options.weights: rounded} if rounded else {})))
        return 0
    if rounded:
        print(f"{'':18}  {'fp32':>10}  {options.weights:>10}")
    meanings = ANOTHER_TEXT if options.corpus else MEANINGS
    for name, loss in losses.items():
        second = f"  {_digits(rounded.get(name)):>10}" if rounded else ""
        print(f"{name:18}  {_digits(loss):>10}{second}  {meanings[name]}")
    return 0


def _digits(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.6f}"


def _losses(run: Path, options: Any) -> tuple[Losses, Losses]:
    """The run's losses; and those over the whole text with its weights in another format, if one is asked for."""
    checkpoint = find_checkpoint(run)
    folder = folder_of(run, checkpoint)
    runtime = resolve_runtime(options, options.dtype, "auto")
    model, tokenizer, window = load_model(checkpoint, runtime.device)
    # A run at work may have removed the checkpoint by the end.
    weights_sha256, n_steps = weights_sum(checkpoint), load_state(checkpoint)["n_steps"]
    check_gpu_memory(options.batch_size, window, runtime, "--batch-size")
    train, heldout = (folder.tokens(name, tokenizer.n_vocab) for name in ("train", "heldout"))
    if train is None and folder.imported.exists():
        raise CheckpointError(f"{folder.path} was imported, so it has no text of its own: give one with --corpus")
    if train is None:
        raise CheckpointError(f"{folder.path} lacks train.bin, the tokens of its text: give the folder of the run")
    say(f"text: {_name_of(folder)}, {train.n_tokens:,} tokens, {heldout.n_tokens if heldout else 0:,} held out")
    last = _last_batch_loss(folder.metrics, n_steps)

    def keep(losses: Losses) -> None:
        if folder.exists():  # a checkpoint that lies alone has no folder to keep them in
            _keep(folder, weights_sha256, losses)

    whole, rounded = _whole_texts(
        model, window, runtime, options, train.tokens, heldout.tokens if heldout else None, keep
    )
    return {"train/loss": last} | whole, rounded


def _whole_texts(
    model: GPT2,
    window: int,
    runtime: Runtime,
    options: Any,
    train: Tokens,
    heldout: Tokens | None,
    keep: Callable[[Losses], None],
) -> tuple[Losses, Losses]:
    """The losses over whole texts, and those with the weights in another format, if one is asked for.

    `keep` is given the first as soon as they are there.
    """
    forms: list[WeightFormat] = ["fp32"] if options.weights == "fp32" else ["fp32", options.weights]
    n_tokens = sum(n_tokens_read(loss, len(train), window) for loss in ("corpus/loss", "corpus/loss_offset"))
    n_tokens += 0 if heldout is None else len(heldout)
    taken: list[Losses] = []
    with progress_bar("reading the text", len(forms) * n_tokens / window) as advance:
        evaluator = Evaluator(model.loss_sum, window, runtime, options.batch_size, advance)
        for form in forms:
            round_weights(model, form)
            losses = {
                "corpus/loss": finite(evaluator.loss(train)),
                "corpus/loss_offset": finite(evaluator.offset_loss(train)),
                "heldout/loss": None if heldout is None else finite(evaluator.loss(heldout)),
            }
            taken.append(losses)
            if form == "fp32":
                keep(losses)
    return taken[0], taken[1] if len(taken) > 1 else {}


def _keep(folder: RunFolder, weights_sha256: str, losses: Losses) -> None:
    """Keep them for `groundling report`; where nothing can be written they are printed all the same."""
    try:
        folder.keep_losses(weights_sha256, losses)
    except OSError as error:
        say(f"warning: these losses are not kept for `groundling report` ({folder.path}: {error.strerror})")


def _losses_of_another(run: Path, options: Any) -> tuple[Losses, Losses]:
    """The same over a text that the options name, in the run's tokens; it is not kept."""
    checkpoint = find_checkpoint(run)
    runtime = resolve_runtime(options, options.dtype, "auto")
    model, tokenizer, window = load_model(checkpoint, runtime.device)
    check_gpu_memory(options.batch_size, window, runtime, "--batch-size")
    sources = CorpusConfig(sources=tuple(options.corpus))
    with progress_of("encoding the text") as advance:
        corpus = load_corpus(sources, cache_dir(), advance, tokenizer=tokenizer, own_heldout=False)
    say(f"text: {corpus.name}, {corpus.train.n_tokens:,} tokens, in windows of {window:,}")
    of_another = _whole_texts(model, window, runtime, options, corpus.train.tokens, None, lambda losses: None)
    whole, rounded = ({name: losses[name] for name in ANOTHER_TEXT if losses} for losses in of_another)
    return whole, rounded


def _name_of(folder: RunFolder) -> str:
    """The name of the text that the run was trained on, as far as the folder still tells it."""
    try:
        return folder.text().name
    except (CheckpointError, CorpusError):
        return str(folder.path / "train.bin")


def _last_batch_loss(metrics: Path, n_steps: int) -> float | None:
    try:
        steps = [line for line in read_lines(metrics) if "train/loss" in line]
        return next((finite(line["train/loss"]) for line in steps if line["step"] == n_steps - 1), None)
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged
        return None

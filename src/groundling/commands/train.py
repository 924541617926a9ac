"""`groundling train`: from a text to a model that knows it, with its record."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundling import kernels, machine, runtime
from groundling.commands.advice import changes_lines
from groundling.commands.arguments import before_parsing, naming_flags, parse_run, run_parser
from groundling.commands.costs import estimate_lines
from groundling.commands.initial import check_begun
from groundling.commands.saying import say
from groundling.commands.session import Prepared, new_run_path, newest_run, prepare
from groundling.config import DEFAULT_PRESET, RunConfig, preset_path
from groundling.errors import CheckpointError, ConfigError, Interrupted
from groundling.evaluation.report import blocks_in_words, finite, time_in_words
from groundling.files import locked, write_json, write_text
from groundling.generation.open import open_decoder
from groundling.generation.text import continue_text
from groundling.runtime import Runtime
from groundling.training import checkpoint
from groundling.training.checkpoint import load_model
from groundling.training.curve import draw_curve
from groundling.training.estimate import (
    Estimate,
    FirstSteps,
    is_taken,
    remaining,
    seconds_to_read,
    step_s_so_far,
)
from groundling.training.growth import in_use
from groundling.training.metrics import JsonLines, LogFile, Sinks, TensorBoard, check_logging
from groundling.training.progress import Terminal, clock
from groundling.training.record import judgement, make_record
from groundling.training.run_folder import RunFolder, find_checkpoint
from groundling.training.signals import StopSignals
from groundling.training.stopping import reason_in_words
from groundling.training.trainer import Trainer

EXAMPLES = """examples:
  groundling train                                        preset gpt2: GPT-2 (124M) on Tiny Shakespeare
  groundling train --preset by-heart                      the same, until it can recite from anywhere
  groundling train --preset penny                         a small model, in minutes
  groundling train --preset penny-by-heart                the small model, until it can recite from anywhere
  groundling train --corpus my-novel.txt --heldout-fraction 0.1 --out runs/novel
  groundling train --corpus 'texts/**/*.txt' --tokenizer train:8192 --size 124M
  groundling train --corpus letters.txt --loss goldfish   for a text that is not to be memorised
  groundling train --init runs/gpt2 --corpus my-novel.txt --schedule.peak 1e-4      fine-tune: go on from its weights
  groundling train --resume --out runs/novel              continue an interrupted run, on a CPU bit for bit
  groundling train --schedule.peak 3e-4 --windows.length 512 --max-minutes 30
"""


def main(arguments: list[str]) -> int:
    """Train, evaluate, sample, and write the record; returns the exit code."""
    with naming_flags(arguments):
        return _train(arguments)


def _train(arguments: list[str]) -> int:
    early = before_parsing(arguments)
    resumed = RunFolder(early.out or newest_run(early.preset)) if early.resume else None
    parser = run_parser("train", __doc__ or "", EXAMPLES, _defaults(early.preset, resumed))
    parser.add_argument("--out", type=str, help="folder of the run; runs/NAME if not given")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or the newest one")
    config = parse_run(parser, arguments)
    if resumed and (record := _finished(resumed, config)):
        _complete_samples(resumed, config)
        _print_finished(resumed, record)
        return 0
    if early.out and not resumed:
        RunFolder(early.out).refuse_used()
    check_logging(config.logging)
    prepared = prepare(config, resumed, arguments)
    folder = resumed or RunFolder(early.out or new_run_path(prepared.config, prepared.corpus.name))
    n_kept = prepared.config.checkpoint.keep + (prepared.config.stopping.patience > 0)
    _check_disk(folder.path, prepared, n_checkpoints=1 if resumed else n_kept + 1)
    trainer = prepared.trainer(folder.checkpoints)
    with trainer.signals, folder.open(prepared.identity(), prepared.config.as_yaml(), early.resume):
        if resumed:
            check_begun(resumed)
            for line in changes_lines(resumed, prepared.config, prepared.runtime):
                say(line)
        else:
            folder.keep_text(prepared.corpus, prepared.runtime.facts(), prepared.identity())
        try:
            _carry_out(trainer, folder, prepared, early.resume)
        except Interrupted as interrupt:
            again = f"groundling train --resume --out {shlex.quote(str(folder.path))}"
            kept = "all saved"
            if trainer.saved_step not in (None, trainer.state.n_steps):
                kept = f"saved is what was after {trainer.saved_step} of them, for the weights give no finite loss now"
            raise Interrupted(f"{interrupt}: {kept}, go on with `{again}`") from None
    return 0


def _finished(folder: RunFolder, config: RunConfig) -> dict[str, Any] | None:
    """The record of a run that has nothing left to do: made of its newest checkpoint, with these very settings."""
    if not folder.record.exists():
        return None
    newest = checkpoint.complete(folder.checkpoints)[-1:]
    try:
        record = folder.kept_record(newest[0]) if newest else {}
    except (OSError, CheckpointError):  # a damaged record is made anew
        return None
    return record if record and _with_defaults(record["config"]) == config.as_dict() else None


def _complete_samples(folder: RunFolder, config: RunConfig) -> None:
    """Make the samples of a finished run, if an interrupt came before they were whole."""
    if not folder.samples.exists():
        resolved = kernels.select_for(runtime.resolve(config.runtime))
        newest = find_checkpoint(checkpoint.complete(folder.checkpoints)[-1])
        with locked(folder.path), StopSignals() as signals:
            _sample(folder, config, resolved, newest, signals.check)


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record, with those added that did not exist yet when it was written."""
    complete = RunConfig().as_dict()
    for name, value in settings.items():
        complete[name] = complete[name] | value if isinstance(value, dict) else value
    return complete


def _print_finished(folder: RunFolder, record: dict[str, Any]) -> None:
    say(
        f"{folder.path} is finished ({record['stop_reason']}), and nothing was changed that would let it go on; its"
        " record (to train anew, give another --out or remove the folder):"
    )
    _print_result(record, record["config"]["stopping"]["target"])
    say(f"record: {folder.record}, curve: {folder.curve}, samples: {folder.samples}")


def _defaults(preset: str | None, folder: RunFolder | None) -> Path:
    """The file that settings start from: a preset's, or that of the run to resume."""
    if folder is None:
        return preset_path(preset or DEFAULT_PRESET)
    if folder.imported.exists():
        raise CheckpointError(f"{folder.path} was imported, so it has no run to resume: give --init {folder.path}")
    if not folder.exists():
        raise CheckpointError(f"{folder.path} holds no run to resume: leave out --resume to begin one")
    if preset not in (None, made_with := folder.settings()["preset"]):
        raise ConfigError(
            f"{folder.path} was made with preset {made_with}, not {preset}: leave out --preset, or give another --out"
        )
    return folder.config


def _check_disk(path: Path, prepared: Prepared, n_checkpoints: int) -> None:
    needed = n_checkpoints * checkpoint.n_bytes(prepared.config.model, prepared.config.optim)
    free = machine.free_disk_bytes(path)
    if free < needed:
        advice = "free some" if n_checkpoints == 1 else "give an --out on a larger disk, or a lower --keep"
        raise ConfigError(
            f"{path} has {free / 2**20:,.0f} MiB of free disk, but checkpoints need {needed / 2**20:,.0f}: {advice}"
        )


def _carry_out(trainer: Trainer, folder: RunFolder, prepared: Prepared, resume: bool) -> None:
    config = prepared.config
    say(f"run folder: {folder.path}")
    with _sinks(folder, trainer, config) as trainer.sinks:
        if resume:
            trainer.resume()
            if trainer.window_changed:  # what was kept of these weights is of other windows
                folder.record.unlink(missing_ok=True)
                folder.evaluated.unlink(missing_ok=True)
            write_text(folder.config, config.as_yaml())
        if prepared.initial:  # so that whatever comes, the run can go on without its source
            trainer.keep_beginning()
        if trainer.state.n_steps:
            if step_s := step_s_so_far(trainer, folder.metrics):
                trainer.sinks.note(remaining(trainer, step_s))
        elif prepared.runtime.compile:
            trainer.sinks.note("compiling in the first step ...")
        reason = trainer.train()
        why = reason_in_words(reason, config.stopping, config.schedule)
        trainer.sinks.note(f"stopped after {trainer.state.n_steps} steps: {why}")
        if (n_blocks := in_use(config.model, trainer.state.block_stride).n_layer) < config.model.n_layer:
            trainer.sinks.note(
                f"warning: {n_blocks} of {config.model.n_layer} blocks were trained, and the others, which were to join"
                f" at step {trainer.growth.n_steps}, add nothing yet"
            )
        start = time.monotonic()
        try:
            losses = _final_losses(trainer, config.evaluation.final, folder.metrics)
        except Interrupted as interrupt:
            raise Interrupted(f"{interrupt} after all {trainer.state.n_steps} steps, before their losses") from None
        evaluation_s = time.monotonic() - start
        if best := _best_checkpoint(trainer, folder, losses["heldout/loss"]):
            trainer.sinks.note(f"heldout/loss was lower before: {best} has the weights of then")
    newest = find_checkpoint(folder.path)
    record = make_record(
        trainer,
        reason,
        newest,
        folder.metrics,
        prepared.identity(),
        config.as_dict(),
        {name.replace("/", "_"): value for name, value in losses.items()},
        evaluation_s,
    )
    folder.samples.unlink(missing_ok=True)  # of older weights
    draw_curve(folder.metrics, config.stopping.target, folder.curve)
    write_json(folder.record, record)
    _print_result(record, config.stopping.target)
    _sample(folder, config, prepared.runtime, newest, trainer.signals.check)
    say(f"record: {folder.record}, curve: {folder.curve}, samples: {folder.samples}, checkpoint: {newest}")


@contextmanager
def _sinks(folder: RunFolder, trainer: Trainer, config: RunConfig) -> Iterator[Sinks]:
    def tell(estimate: Estimate) -> None:
        for line in estimate_lines(estimate, config, trainer.train_tokens):
            trainer.sinks.note(line)

    first_steps = FirstSteps(trainer, config.evaluation.final, tell)
    extra = [TensorBoard(folder.path / "tensorboard")] if config.logging.tensorboard else []
    terminal = Terminal(
        trainer.expected_steps,
        lambda first, last: trainer.growth.whole_steps(first, last),
        lambda: trainer.stop_rule.seconds_left(trainer.state.wall_s),
    )
    sinks = Sinks(JsonLines(folder.metrics), LogFile(folder.log), terminal, first_steps, *extra)
    try:
        yield sinks
    finally:
        sinks.close()


def _best_checkpoint(trainer: Trainer, folder: RunFolder, last: float | None) -> Path | None:
    """The checkpoint that is known to know the held-out text better than the last weights, whose loss may be known."""
    state = trainer.stop_rule.state
    if state.best_heldout is None or state.best_heldout_step is None:
        return None
    worse = last > state.best_heldout if last is not None else state.evaluations_without_improvement > 0
    path = folder.checkpoints / checkpoint.NAME.format(state.best_heldout_step)
    return path if worse and path.exists() else None


def _final_losses(trainer: Trainer, final: str, metrics: Path) -> dict[str, float | None]:
    """The losses over the whole text by house name; None for those that `evaluation.final` leaves out."""
    reads = trainer.looks.sizes()
    losses: dict[str, float | None] = dict.fromkeys((*reads, "heldout/loss"))
    step_s = step_s_so_far(trainer, metrics)
    for name, n_tokens in reads.items():
        seconds = seconds_to_read(trainer, n_tokens, step_s) if step_s else math.inf
        known = trainer.known(name) is not None
        if not known and not is_taken(final, seconds, trainer.state.wall_s - (trainer.state.looks_s or 0.0)):
            takes = f"about {clock(seconds)}" if step_s else "no step says how long it would take"
            trainer.sinks.note(f"{name} is not taken ({takes}): `groundling evaluate` takes it")
            continue
        loss = trainer.take(name)
        losses[name] = finite(loss)
        if losses[name] is None:
            trainer.sinks.note(f"warning: {name} is {loss}, so these weights are of no use: train with a lower rate")
        if trainer.state.n_steps and not known:  # else it is written already
            trainer.sinks.write(trainer.state.n_steps - 1, {name: loss})
    return losses


def _print_result(record: dict[str, Any], target: float) -> None:
    """What was reached, in words that do not mix up the grid and by heart."""
    print(f"parameters          {record['parameters']:,}")
    if record.get("goldfish_dropped") is not None:
        print(f"loss                {record['loss']}: {100 * record['goldfish_dropped']:.1f} % dropped")
    passes, took = record["passes"], time_in_words(record, clock)
    print(f"steps               {record['steps']:,} = {passes:.1f} passes over the text in {took}")
    if blocks := blocks_in_words(record):
        print(f"blocks              {blocks}")
    if record["tokens_per_s"]:
        print(f"speed               {record['tokens_per_s']:,.0f} tokens/s, {record['mfu']:.0%} of the matrix ceiling")
    print(f"corpus/loss         {_verdict(record['corpus_loss'], target, 'on the grid')}")
    print(f"corpus/loss_offset  {_verdict(record['corpus_loss_offset'], target, 'by heart')}")
    heldout = record["heldout_loss"]
    print(f"heldout/loss        {'not taken' if heldout is None else f'{heldout:.6f}'}")
    if first := record["first_batch_below_target"]:
        print(f"first batch below   {first['loss']:.6f} at step {first['step']}")


def _verdict(loss: float | None, target: float, what: str) -> str:
    if loss is None:
        return "not taken"
    return f"{loss:.6f}  {judgement(loss, target, what) if target else '(no target)'}"


def _sample(folder: RunFolder, config: RunConfig, resolved: Runtime, path: Path, check: Callable[[], None]) -> None:
    """Continue the run's prompts with the checkpoint as it was saved, and keep what came; `check` may end it."""
    model, tokenizer, window = load_model(path, resolved.device)
    texts = []
    warn = (lambda said: None) if resolved.warnings else say  # a compiler that is missing was named when the run began
    with open_decoder(model, window, resolved, warn=warn) as decoder:
        for number, prompt in enumerate(config.prompts, 1):
            check()
            text = "".join(continue_text(decoder, tokenizer, prompt, config.sampling))
            texts.append(f"--- sample {number} of {len(config.prompts)}\n{prompt}{text}\n")
    write_text(folder.samples, "\n".join(texts))  # before they are printed, to whoever may have left
    print("", *texts, sep="\n", end="")

"""What `train` and `estimate` share: from a configuration to a trainer in its folder.

Invariant: everything that can be wrong with the input is found before a run folder is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from groundling import kernels, machine, runtime
from groundling.commands.advice import head_line, initial_lines, objective_lines, short_text_lines, unused_lines
from groundling.commands.arguments import load_preset
from groundling.commands.initial import open_initial, tokenizer_of, with_initial
from groundling.commands.saying import say, say_changes
from groundling.config import SHAKESPEARE_PROMPTS, RunConfig
from groundling.corpus.beginnings import line_beginnings
from groundling.corpus.load import Corpus, load_corpus
from groundling.corpus.sources import packaged_names
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, ConfigError
from groundling.model.compact import CompactGPT2
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import Runtime
from groundling.training.progress import progress_of
from groundling.training.run_folder import HEAD_VOCABULARY, INITIAL, INITIAL_POSITIONS, OPTIMIZER, RunFolder
from groundling.training.trainer import Trainer

RUNS = Path("runs")

MPS_TOKENS = 16_384
"""Logits of 21,000 tokens are more than the 4 GB at which PyTorch ends the process (pytorch#143477); of more than
32,768, gradients were wrong (pytorch#177116)."""


@dataclass(frozen=True)
class Prepared:
    """A run that could begin: its resolved configuration, its text, its machine."""

    config: RunConfig
    corpus: Corpus
    runtime: Runtime
    ceiling_flops: float
    initial: GPT2 | None = None
    """The network that a new run goes on with; None if it is drawn, or in the run's checkpoints."""
    initial_sha256: str | None = None

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues."""
        heldout = self.corpus.heldout
        return {
            "text": self.corpus.sha256,
            "tokenizer": self.corpus.tokenizer.sha256,  # before what it makes other sums of
            "held-out text": None if heldout is None else heldout.sha256(),
            "architecture": asdict(self.config.model),
            "loss": str(self.config.objective),
            INITIAL: self.initial_sha256,
            HEAD_VOCABULARY: self.config.head_vocabulary,
            OPTIMIZER: self.config.optim.kind,
            INITIAL_POSITIONS: self.config.initial_positions,
        }

    def trainer(self, checkpoints: Path) -> Trainer:
        """A trainer at its first step. Raises `ConfigError` if the settings do not fit the text."""
        heldout = self.corpus.heldout
        trainer = Trainer(
            self.config.recipe,
            self.corpus.train.tokens,
            None if heldout is None else heldout.tokens,
            self.corpus.tokenizer,
            self.runtime,
            checkpoints,
            self.ceiling_flops,
            self.initial,
        )
        if isinstance(trainer.model, CompactGPT2):
            say(head_line(trainer.model, self.config))
        return trainer


def prepare(config: RunConfig, resumed: RunFolder | None = None, typed: Sequence[str] = ()) -> Prepared:
    """Resolve device and text, and measure the machine's matrix ceiling, saying what was chosen and why.

    `typed` are the words of the command line, which tell a setting that was given from a preset's.

    A resumed run whose text settings are still those of its folder reads the copy there.
    """
    resolved = kernels.select_for(runtime.resolve(config.runtime, resumed.runtime() if resumed else {}))
    initial = open_initial(config, resumed)
    if initial and not resumed:  # a resumed run only compares it with the one that it began with
        config = with_initial(config, initial, typed)
    config.check_window()
    check_prompts(config)
    check_gpu_memory(config.windows.micro, config.windows.length, resolved, "--windows.micro_batch_size")
    tokenizer = tokenizer_of(config, None if resumed else initial, resumed)
    corpus = _text(config, resumed, tokenizer)  # before anything is printed: what is wrong with the input comes first
    for what, choice, why in resolved.reasons:
        say(f"{what}: {choice} ({why})")
    for warning in resolved.warnings:
        say(f"warning: {warning}")
    if initial and not resumed:
        say(initial.line())
        say_changes(initial.changes)
    n_vocab, config = config.model.n_vocab, with_vocabulary(config, corpus)
    if n_vocab not in (config.model.n_vocab, GPTConfig().n_vocab):
        say(f"warning: model.n_vocab {n_vocab:,} is not used: the tokenizer has {config.model.n_vocab:,} ids")
    heldout = f"{corpus.heldout.n_tokens:,} held out" if corpus.heldout else "nothing held out"
    say(f"text: {corpus.name}, {corpus.train.n_tokens:,} tokens to train on, {heldout}, {config.model.n_vocab:,} ids")
    for line in objective_lines(config, corpus):
        say(line)
    config = with_end(config)
    say(f"model: {config.model.n_parameters():,} parameters")
    if not resumed:
        config = with_prompts(config, corpus)
        for line in (*initial_lines(config), *short_text_lines(config, corpus.train.n_tokens)):
            say(line)
    for line in unused_lines(config, typed, corpus.train.n_tokens):
        say(line)
    ceiling = _ceiling_flops(resolved)
    say(f"matrix ceiling: {ceiling / 1e12:.3f} TFLOP/s in {resolved.dtype_name}, measured")
    network = initial.model if initial and not resumed else None  # a resumed run's weights are in its checkpoints
    weights_sum = initial.sha256 if initial else resumed.initial_sum() if resumed else None
    return Prepared(config, corpus, resolved, ceiling, network, weights_sum)


def check_prompts(config: RunConfig) -> None:
    """Raises `ConfigError` for a prompt that no tokenizer could read, before hours are spent on the model it is for."""
    for number, prompt in enumerate(config.prompts, 1):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            what = f"prompt {number} of --prompts is not valid UTF-8"
            raise ConfigError(f"{what}: give it in the terminal's encoding") from None


def check_gpu_memory(n_windows: int, length: int, runtime: Runtime, option: str) -> None:
    """Raises `ConfigError` for more tokens at a time than PyTorch computes rightly on an Apple GPU, with the option."""
    if runtime.device.type == "mps" and n_windows * length > MPS_TOKENS:
        raise ConfigError(
            f"{n_windows * length:,} tokens at a time are too many for PyTorch on an Apple GPU:"
            f" give {option} {max(1, MPS_TOKENS // length)}"
        )


@cache
def _ceiling_flops(runtime: Runtime) -> float:
    """The matrix ceiling, measured once in a process: who trains several runs in one waits for it once."""
    ceiling_flops = machine.matrix_ceiling_flops(runtime.device, runtime.dtype, runtime.synchronize)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)  # its operands are none of a run's memory
    return ceiling_flops


def _text(config: RunConfig, resumed: RunFolder | None, tokenizer: Tokenizer | None) -> Corpus:
    """Raises `CheckpointError` if a resumed run is given another text than its own."""
    if resumed and config.as_dict()["text"] == resumed.settings()["text"]:
        return resumed.text()
    with progress_of("encoding the text") as progress:
        check_text = resumed.refuse_another_text if resumed else None
        return load_corpus(config.text, runtime.cache_dir(), progress, check_text, tokenizer)


def with_prompts(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The configuration with prompts: those given, else Shakespeare's for packaged texts, else the text's own.

    A preset's prompts belong to the preset's text, and Shakespeare's, which a packaged text's run has in its
    configuration, to packaged ones.
    """
    preset, packaged = load_preset(config.preset), set(config.text.sources) <= set(packaged_names())
    foreign = config.prompts == preset.prompts and config.text.sources != preset.text.sources
    foreign |= config.prompts == SHAKESPEARE_PROMPTS and not packaged
    if config.prompts and not foreign:
        return config
    if packaged:
        return replace(config, prompts=SHAKESPEARE_PROMPTS)
    own = line_beginnings(corpus.train.tokens, corpus.tokenizer, len(SHAKESPEARE_PROMPTS), config.seed)
    return replace(config, prompts=own)


def with_vocabulary(config: RunConfig, corpus: Corpus) -> RunConfig:
    """The configuration with as many ids as the text's tokenizer has."""
    return replace(config, model=replace(config.model, n_vocab=corpus.tokenizer.n_vocab))


def with_end(config: RunConfig) -> RunConfig:
    """The configuration with the end that its loss has: text that is not to be memorised has no target to reach."""
    if config.objective.loss == "plain":
        return config
    return replace(config, stopping=config.stopping.without_target())


def new_run_path(config: RunConfig, corpus_name: str) -> Path:
    """The folder of a run for which none was named: runs/PRESET, with the text's name if it is not the preset's."""
    own_text = config.text == load_preset(config.preset).text
    name = config.preset if own_text else f"{config.preset}-{corpus_name}"
    path, number = RUNS / name, 1
    while path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def newest_run(preset: str | None) -> Path:
    """The run that `--resume` without `--out` means: the one last written to, of this preset if one is named.

    Raises `ConfigError` if there is none.
    """
    found: list[tuple[float, Path]] = []
    for path in RUNS.glob("*/identity.json"):
        folder = RunFolder(path.parent)
        try:
            made_with = folder.settings()["preset"]
        except CheckpointError as error:
            say(f"warning: {folder.path} is passed over: {error}")
            continue
        if preset in (None, made_with):
            written = folder.metrics if folder.metrics.exists() else folder.identity
            found.append((written.stat().st_mtime, folder.path))
    if not found:
        of_preset = f" of preset {preset}" if preset else ""
        raise ConfigError(f"there is no run{of_preset} under {RUNS}/ to resume: leave out --resume, or give --out RUN")
    return max(found)[1]

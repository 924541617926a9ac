"""What the commands that use a trained model share: which run, on which device, decoded how."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from groundling import kernels, runtime
from groundling.commands.arguments import Parser
from groundling.commands.saying import say, say_changes
from groundling.commands.tracing import Tracer
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, CorpusError
from groundling.evaluation.suffix_array import SuffixMatcher
from groundling.generation.decoder import Decoder
from groundling.generation.open import open_decoder
from groundling.generation.speculate import CorpusDrafter, Drafter, PromptDrafter, first_of
from groundling.interop.sources import is_run
from groundling.interop.trained import open_trained
from groundling.model.formats import WEIGHT_FORMATS, WeightFormat
from groundling.model.gpt2 import GPT2
from groundling.runtime import DtypeName, Runtime, RuntimeConfig
from groundling.training.checkpoint import load_model, load_state
from groundling.training.run_folder import RunFolder, find_checkpoint, folder_of

MAX_SLOTS = 16
"""Texts decoded together."""


def model_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser with RUN, --device and --threads."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=examples,
    )
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 means one per core")
    return parser


def add_decoding_options(parser: Parser) -> None:
    """--weights and --drafts."""
    parser.add_argument(
        "--weights",
        choices=list(WEIGHT_FORMATS),
        default="bf16",
        help="format of the weights as decoding reads them; `groundling evaluate --weights` shows what it costs",
    )
    parser.add_argument(
        "--drafts",
        choices=["auto", "text", "prompt", "none"],
        default="auto",
        help="guess tokens from the training text and the prompt (auto, text), or the prompt alone, and verify them"
        " together: changes the speed, never the output (within rounding, where PyTorch decodes)",
    )


def resolve_runtime(
    options: argparse.Namespace,
    dtype: DtypeName,
    network_kernels: Literal["auto", "reference"] = "reference",
) -> Runtime:
    """The runtime these options mean, uncompiled: a single use does not repay compilation.

    `network_kernels` are those of the network itself, which decoding on a CPU does without.
    """
    config = RuntimeConfig(options.device, dtype, options.threads, network_kernels, compile="off")
    resolved = kernels.select_for(runtime.resolve(config))
    for warning in resolved.warnings:
        say(f"warning: {warning}")
    return resolved


@dataclass(frozen=True)
class OpenRun:
    """A trained model, with what decoding and tracing need of its run."""

    path: Path
    checkpoint: Path
    """Whose weights these are: a run at work may have saved others since. Of a foreign model, `path`."""
    folder: RunFolder
    model: GPT2
    tokenizer: Tokenizer
    window: int
    runtime: Runtime
    form: WeightFormat
    drafts: str

    def decoder(self, n_slots: int) -> Decoder:
        """A decoder for so many texts at a time, as the options ask."""
        return open_decoder(self.model, self.window, self.runtime, self.form, n_slots, say)

    @cached_property
    def tracer(self) -> Tracer:
        """The training text, ready to be searched. Raises `CheckpointError` if the folder has none."""
        return Tracer.of_run(self.path)

    def drafter(self) -> Drafter | None:
        """A drafter for one stream, as the options ask; auto means the training text if it is there."""
        if self.drafts == "none":
            return None
        if self.drafts == "prompt" or not self._has_index:
            return PromptDrafter()
        return first_of(CorpusDrafter(SuffixMatcher(self.tracer.array)), PromptDrafter())

    @cached_property
    def _has_index(self) -> bool:
        """Whether the training text can be searched; if it cannot, and must not, a line says why."""
        try:
            return self.tracer is not None
        except (CheckpointError, CorpusError) as error:
            if self.drafts == "text":
                raise
            if self.folder.exists():
                say(f"note: no drafts from the training text: {error}")
            return False


def _ended(folder: RunFolder, checkpoint: Path) -> bool:
    """Whether the run came to its end with these weights: a record that can be read is of them."""
    try:
        return bool(folder.kept_record(checkpoint))
    except (OSError, CheckpointError):
        return False


def open_model(options: Any) -> OpenRun:
    """As `open_run`, for whatever `groundling import` reads too: a folder or a name on the hub, without an import."""
    path = Path(options.run)
    if is_run(path):
        return open_run(options)
    trained, resolved = open_trained(path), resolve_runtime(options, "fp32")
    say_changes(trained.changes)
    model, tokenizer, folder = trained.model.to(resolved.device), trained.tokenizer, RunFolder(path)
    return OpenRun(path, path, folder, model, tokenizer, trained.window, resolved, options.weights, options.drafts)


def open_run(options: Any) -> OpenRun:
    """The run that RUN, --device, --threads, --weights and --drafts mean."""
    path = Path(options.run)
    return open_checkpoint(path, find_checkpoint(path), options, options.weights, options.drafts)


def open_checkpoint(path: Path, checkpoint: Path, options: Any, form: WeightFormat, drafts: str) -> OpenRun:
    """The run at this path with the checkpoint that `find_checkpoint` gave; --device and --threads are the options'."""
    resolved = resolve_runtime(options, "fp32")
    model, tokenizer, window = load_model(checkpoint, resolved.device)
    folder = folder_of(path, checkpoint)
    if folder.exists() and not _ended(folder, checkpoint):
        n_steps = load_state(checkpoint)["n_steps"]
        say(f"note: no record says that the run ended with these weights, its weights after {n_steps:,} steps")
    return OpenRun(path, checkpoint, folder, model, tokenizer, window, resolved, form, drafts)

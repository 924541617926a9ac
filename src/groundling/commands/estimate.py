"""`groundling estimate`: what a run would cost on this machine, from a few measured steps."""

from __future__ import annotations

from pathlib import Path

from groundling.commands.arguments import before_parsing, parse_run, run_parser
from groundling.commands.session import estimate_lines, prepare
from groundling.config import DEFAULT_PRESET, preset_path
from groundling.training.metrics import Sinks
from groundling.training.trainer import Trainer

EXAMPLES = """examples:
  groundling estimate                             the main job
  groundling estimate --preset by-heart
  groundling estimate --corpus my-novel.txt --size 355M
"""


def main(arguments: list[str]) -> int:
    """Print the estimate; nothing is written."""
    early = before_parsing(arguments)
    parser = run_parser("groundling estimate", __doc__ or "", EXAMPLES, preset_path(early.preset or DEFAULT_PRESET))
    config, _ = parse_run(parser, arguments)
    prepared = prepare(config)
    trainer = Trainer(
        prepared.config.recipe,
        prepared.corpus.train.tokens,
        prepared.corpus.heldout.tokens if prepared.corpus.heldout else None,
        prepared.corpus.tokenizer,
        prepared.runtime,
        Path("unused"),
        Sinks(),
        prepared.ceiling_flops,
    )
    for line in estimate_lines(trainer, prepared.config):
        print(line)
    return 0

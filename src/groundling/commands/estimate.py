"""`groundling estimate`: what a run would cost on this machine, from a few measured steps."""

from __future__ import annotations

from pathlib import Path

from groundling.commands.arguments import before_parsing, naming_flags, parse_run, run_parser
from groundling.commands.costs import estimate_lines
from groundling.commands.session import prepare
from groundling.config import preset_path
from groundling.training.estimate import measure

EXAMPLES = """examples:
  groundling estimate                             the main job
  groundling estimate --preset by-heart
  groundling estimate --corpus my-novel.txt --size 355M
"""


def main(arguments: list[str]) -> int:
    """Print the estimate; nothing is written."""
    with naming_flags(arguments):
        return _estimate(arguments)


def _estimate(arguments: list[str]) -> int:
    early = before_parsing(arguments)
    parser = run_parser("estimate", __doc__ or "", EXAMPLES, early.preset and preset_path(early.preset))
    prepared = prepare(parse_run(parser, arguments), typed=arguments)
    estimate = measure(prepared.trainer(Path("unused")), prepared.config.evaluation.final)
    for line in estimate_lines(estimate, prepared.config, prepared.corpus.train.tokens):
        print(line)
    return 0

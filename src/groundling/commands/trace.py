"""`groundling trace`: which parts of a text stand word for word in a run's training text, and where."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from groundling.commands.arguments import Parser
from groundling.commands.tracing import LISTED_SPANS, TokenArray, Tracer, standard_output
from groundling.corpus.sources import find_documents
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import ConfigError
from groundling.evaluation.memorisation import DEFAULT_MINIMUM

EXAMPLES = """examples:
  groundling trace runs/gpt2 story.txt
  groundling sample runs/gpt2 --prompt "ROMEO:" | groundling trace runs/gpt2 -
  groundling trace runs/gpt2 hamlet --minimum 20 --json
"""


def main(arguments: list[str]) -> int:
    """Print the text with what is copied marked, the longest spans, and the share that is copied."""
    parser = Parser(prog="groundling trace", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints")
    parser.add_argument("file", type=str, help="text to look at: a file, - for standard input, or a packaged text")
    parser.add_argument("--minimum", type=int, default=DEFAULT_MINIMUM, help="tokens from which a span is counted")
    parser.add_argument("--longest", type=int, default=LISTED_SPANS, help="how many spans are listed")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every span that is counted")
    options = parser.parse_args(arguments)
    for name in ("minimum", "longest"):
        if options[name] < 1:
            raise ConfigError(f"--{name} is {options[name]}: give a positive number")
    tracer = Tracer.of_run(Path(options.run))
    trace = tracer.trace(_read(options.file, tracer.tokenizer), minimum=options.minimum)
    if options.json:
        print(json.dumps({"run": options.run, "file": options.file} | trace.as_dict()))
    else:
        trace.print(standard_output(), options.longest)
    return 0


def _read(name: str, tokenizer: Tokenizer) -> TokenArray:
    """The tokens of the text that `name` means, normalised and encoded as a training text is."""
    with tempfile.TemporaryDirectory() as spool:  # for standard input, which need not outlive the command
        documents = find_documents([name], Path(spool))
        if len(documents) > 1:
            raise ConfigError(f"{name} names {len(documents)} texts: give one of them, such as {documents[0].name}")
        blocks = [np.array(tokenizer.encode(block), dtype=np.uint32) for block in documents[0].blocks()]
    return np.concatenate([np.empty(0, dtype=np.uint32), *blocks])

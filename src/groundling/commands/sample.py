"""`groundling sample`: continue prompts with a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from groundling.commands.arguments import Parser
from groundling.commands.model_options import MAX_SLOTS, OpenRun, add_decoding_options, model_parser, open_run
from groundling.commands.saying import say
from groundling.commands.tracing import Trace, standard_output
from groundling.errors import ConfigError
from groundling.generation.decode import FinishReason, Stats
from groundling.generation.sampling import PRESETS, SamplingConfig
from groundling.generation.text import repeated, write

EXAMPLES = """examples:
  groundling sample runs/gpt2 --prompt "ROMEO:"
  groundling sample runs/gpt2 --prompt "To be or not" --temperature 0 --max-tokens 50
  groundling sample runs/gpt2 --prompt "ROMEO:" --prompt "JULIET:" -n 3 --seed 7 --stop "\\n\\n"
  groundling sample runs/gpt2 --prompt-file scene.txt --trace
  groundling sample runs/gpt2 --prompt-lines names.txt --preset reference --json > samples.jsonl
  echo "First Citizen:" | groundling sample runs/gpt2 --prompt-file - --stats
"""

SETTINGS_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")
MAX_PROMPT_BYTES = 1 << 20
"""Far more than any window holds."""


@dataclass
class Written:
    """One sample as far as it is written."""

    prompt: str
    seed: int
    text: str = ""
    finish_reason: FinishReason | None = None


def main(arguments: list[str]) -> int:
    """Print each prompt and, as it is generated, its continuation."""
    parser = model_parser("groundling sample", __doc__ or "", EXAMPLES)
    _add_prompt_options(parser)
    _add_sampling_options(parser)
    add_decoding_options(parser)
    parser.add_argument("--trace", action="store_true", help="colour what stands in the training text, and say where")
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample, one a line")
    parser.add_argument("--stats", action="store_true", help="say how fast, and what drafts saved")
    options = parser.parse_args(arguments)
    sampling = _sampling(options)
    if options.n < 1:
        raise ConfigError(f"-n is {options.n}: give a positive number of samples")
    if sampling.temperature == 0:
        _warn_of_greed(options)
    requests = repeated(_prompts(options), sampling, options.n)
    run = open_run(options)
    for prompt in dict.fromkeys(prompt for prompt, _ in requests):
        if (n_tokens := len(run.tokenizer.encode(prompt))) > run.window:
            say(f"warning: a prompt has {n_tokens:,} tokens, and this model reads {run.window:,}: those at its end")
    if options.trace:
        _ = run.tracer  # what is wrong with its text is said before anything is written
    stats = Stats()
    with run.decoder(min(len(requests), MAX_SLOTS)) as decoder:
        drafters = [run.drafter() for _ in requests]
        pieces = write(decoder, run.tokenizer, requests, drafters, stats)
        samples = [Written(prompt, config.seed) for prompt, config in requests]
        _show(samples, _updates(samples, pieces), options, run)
    if options.stats:
        for line in _stats_lines(stats, run):
            say(line)
    return 0


def _add_prompt_options(parser: Parser) -> None:
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE", help="file with one prompt; - is standard input"
    )
    parser.add_argument(
        "--prompt-lines", action="append", default=[], metavar="FILE", help="file with a prompt on every line"
    )
    parser.add_argument("-n", type=int, default=1, help="samples of each prompt; the i-th has seed + i")


def _add_sampling_options(parser: Parser) -> None:
    names = "; ".join(f"{name}: {config.in_words()}" for name, config in PRESETS.items())
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="default", help=f"sampling settings to start from ({names})"
    )
    help_texts = {field.arg_name: field.description for field in parse_from_object(SamplingConfig).params}
    for field in fields(SamplingConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "stop":
            help_text = f"{help_texts['stop']} May be given several times; \\n is a line's end"
            parser.add_argument(flag, action="append", default=[], metavar="TEXT", help=help_text)
        else:
            kind = type(getattr(PRESETS["default"], field.name))
            parser.add_argument(flag, type=kind, default=None, help=help_texts[field.name])


def _sampling(options: Any) -> SamplingConfig:
    """The preset's settings, with those that were given in their place."""
    chosen = PRESETS[options.preset]
    values = {field.name: getattr(chosen, field.name) for field in fields(SamplingConfig)}
    values |= {name: options[name] for name in values if options[name] not in (None, [])}
    values["stop"] = tuple(stop.replace("\\n", "\n").replace("\\t", "\t") for stop in values["stop"])
    return SamplingConfig(**values)


def _warn_of_greed(options: Any) -> None:
    """Say which options have no effect where the likeliest token is always taken."""
    if options.n > 1:
        say(f"warning: at temperature 0 the {options.n} samples of a prompt are all the same")
    for name in SETTINGS_OF_DRAWS:
        if options[name] is not None:
            say(f"warning: --{name.replace('_', '-')} is not used: at temperature 0 nothing is drawn")


def _prompts(options: Any) -> list[str]:
    """All prompts, in the order of their flags' kinds; one empty prompt, which starts a new text, if there is none."""
    prompts = list(options.prompt)
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError("the prompt is not valid UTF-8: give it in the terminal's encoding") from None
    prompts += [_read_prompt(name) for name in options.prompt_file]
    for name in options.prompt_lines:
        lines = [line for line in _read_prompt(name).split("\n") if line.strip()]
        if not lines:
            raise ConfigError(f"{name} has no line with a prompt in it")
        prompts += lines
    return prompts or [""]


def _read_prompt(name: str) -> str:
    """The text of a file or of standard input, without the line end that closes it."""
    try:
        if name == "-":
            if sys.stdin is None:
                raise ConfigError("standard input is closed: give the prompt another way")
            content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise ConfigError(f"{name} is longer than {MAX_PROMPT_BYTES:,} bytes: give a shorter prompt")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    except OSError as error:
        raise ConfigError(f"the prompt {name} cannot be read ({error.strerror}): give a text file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt {name} is not UTF-8 (at byte {error.start}): give a text file") from None


def _updates(samples: Sequence[Written], pieces: Iterator[Any]) -> Iterator[tuple[int, str]]:
    """New text by sample, in the order of samples: the first that is not finished is streamed, others wait."""
    at, shown = 0, [0] * len(samples)
    for piece in pieces:
        sample = samples[piece.which]
        sample.text += piece.text
        sample.finish_reason = piece.finish_reason
        while at < len(samples):
            new = samples[at].text[shown[at] :]
            shown[at] += len(new)
            if new or samples[at].finish_reason:
                yield at, new
            if not samples[at].finish_reason:
                break
            at += 1


def _show(samples: Sequence[Written], updates: Iterator[tuple[int, str]], options: Any, run: OpenRun) -> None:
    begun = -1
    for index, text in updates:
        sample = samples[index]
        if options.json:
            if sample.finish_reason:
                print(json.dumps(_as_json(sample, options, run)), flush=True)
            continue
        if index != begun:
            begun = index
            if len(samples) > 1:
                print(f"{'' if index == 0 else chr(10)}--- sample {index + 1} of {len(samples)}, seed {sample.seed}")
            if not options.trace:
                print(sample.prompt, end="", flush=True)
        if options.trace:
            if sample.finish_reason:
                _trace(sample, run).print(standard_output())
            continue
        print(text, end="\n" if sample.finish_reason else "", flush=True)


def _as_json(sample: Written, options: Any, run: OpenRun) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "prompt": sample.prompt,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "seed": sample.seed,
    }
    if options.trace:
        facts["trace"] = _trace(sample, run).as_dict()
    return facts


def _trace(sample: Written, run: OpenRun) -> Trace:
    """What of a sample is copied, its prompt not counted."""
    return run.tracer.trace_written(sample.prompt, sample.text)


def _stats_lines(stats: Stats, run: OpenRun) -> Iterator[str]:
    yield f"{stats.n_prompt_tokens:,} tokens of prompts read in {stats.prompt_s:.2f} s"
    speed = "no token after it" if stats.tokens_per_s is None else f"{stats.tokens_per_s:,.1f} tokens/s after it"
    yield f"{stats.n_tokens:,} tokens generated, {speed} ({run.form} weights, {run.runtime.threads} threads)"
    if stats.acceptance is not None:
        yield (
            f"{stats.n_drafted:,} tokens drafted, {stats.acceptance:.0%} accepted,"
            f" {stats.passes_saved:.0%} of the passes over the weights saved"
        )
    elif run.drafts != "none":
        yield "no tokens drafted: nothing in the context stood in the training text or before"

"""`groundling sample`: continue a prompt with a trained model."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from docstring_parser import parse_from_object

from groundling.commands.model_options import model_parser, resolve_runtime
from groundling.errors import ConfigError
from groundling.generation.decode import continue_text
from groundling.generation.sampling import SamplingConfig
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import find_checkpoint

EXAMPLES = """examples:
  groundling sample runs/gpt2 --prompt "ROMEO:"
  groundling sample runs/gpt2 --prompt "To be or not" --temperature 0 --max-tokens 50
  groundling sample runs/gpt2 --prompt "First Citizen:" --top-k 50 --top-p 0.9 --repetition-penalty 1.1 --seed 7
"""


def main(arguments: list[str]) -> int:
    """Print the prompt and, as it is generated, its continuation."""
    parser = model_parser("groundling sample", __doc__ or "", EXAMPLES)
    parser.add_argument("--prompt", type=str, default="", help="text to continue; empty starts a new text")
    defaults = SamplingConfig()
    help_texts = {field.arg_name: field.description for field in parse_from_object(SamplingConfig).params}
    for field in fields(SamplingConfig):
        default = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=help_texts[field.name])
    options = parser.parse_args(arguments)
    sampling = SamplingConfig(**{field.name: options[field.name] for field in fields(SamplingConfig)})
    try:
        options.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not valid UTF-8: give it in the terminal's encoding") from None
    checkpoint = find_checkpoint(Path(options.run))
    model, tokenizer, window = load_model(checkpoint, resolve_runtime(options, "fp32").device)
    print(options.prompt, end="", flush=True)
    for piece in continue_text(model, tokenizer, options.prompt, sampling, window):
        print(piece, end="", flush=True)
    print()
    return 0

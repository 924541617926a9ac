"""`groundling export`: a trained model in the format of another program, verified before it is there."""

from __future__ import annotations

import contextlib
import errno
import importlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError

from groundling.commands.arguments import Parser
from groundling.commands.saying import say, say_changes
from groundling.errors import CheckpointError, ConfigError, RunFailed
from groundling.files import atomic_path, home_expanded
from groundling.interop.hub_folder import CONFIG, TRAINING, WINDOW
from groundling.interop.trained import Trained, open_trained
from groundling.json_files import read_object

EXAMPLES = """examples:
  groundling export runs/gpt2 --format hf --out gpt2-shakespeare
  groundling export runs/gpt2 --format hf --dtype bf16 --out gpt2-shakespeare-bf16
  groundling export runs/gpt2 --format gguf --quant q8_0 --out gpt2-shakespeare.gguf
"""


class Writer(Protocol):
    """What a format's module in interop/ offers."""

    def write(self, trained: Trained, target: Path, precision: str) -> None:
        """Write the model at `target`, which does not exist yet."""

    def verify(self, trained: Trained, target: Path, precision: str) -> Iterable[str]:
        """Read back what `write` wrote with the program it is for; lines that say what was found.

        Raises `VerificationFailed` if it is not the same model.
        """


@dataclass(frozen=True)
class Format:
    """A format as the command line knows it."""

    module: str
    """In interop/."""
    flag: str
    """The flag that chooses a precision."""
    precisions: tuple[str, ...]
    """The first is the default."""
    help: str


FORMATS = {
    "hf": Format("huggingface", "dtype", ("fp32", "bf16", "fp16"), "a folder that Hugging Face transformers loads"),
    "safetensors": Format(
        "flat_safetensors", "dtype", ("fp32",), "a folder for nanoGPT-like code, in nn.Linear's layout"
    ),
    "gguf": Format("gguf", "quant", ("f32", "f16", "bf16", "q8_0", "q4_0"), "a file that llama.cpp loads"),
    "ctranslate2": Format(
        "ctranslate2", "quant", ("float32", "int8", "bfloat16", "float16"), "a folder that CTranslate2 loads"
    ),
    "onnx": Format("onnx", "quant", ("fp32", "int8"), "a folder that ONNX Runtime and transformers.js load"),
    "web": Format("web_page", "quant", ("q8_0", "f16", "f32", "q4_0"), "a page that runs the model in a browser"),
}

MARKS = (
    {"config.json", "model.safetensors"},
    {"config.json", "model.bin"},
    {"config.json", "model.onnx"},
    {"index.html", "model.gguf"},
)
"""Files that each folder of an export has, one of these pairs."""
WRITTEN = {
    *("README.md", "loss.png", "config.json", "generation_config.json", "metadata.json", "special_tokens_map.json"),
    *("model.safetensors", "model.bin", "model.onnx", "model.onnx_data", "model.gguf"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocabulary.json", "merges.txt"),
    *("index.html", "page.js", "style.css", "wllama.js", "wllama.wasm", "wllama-compat.js", "wllama-compat.wasm"),
    "wllama-LICENSE.txt",
}
"""All files of all exports: whatever else lies in a folder is its owner's."""


def main(arguments: list[str]) -> int:
    """Write one export."""
    options = _parser().parse_args(arguments)
    form = FORMATS[options.format]
    precision = _precision(form, options)
    target = home_expanded(options.out)
    check_target(target, options.overwrite)
    source = Path(options.run).resolve()
    if target.exists() and target.resolve() in (source, *source.parents):
        raise ConfigError(f"--out is {target}, where the very model lies that is read: give another --out")
    module = cast(Writer, importlib.import_module(f"groundling.interop.{form.module}"))
    if options.library:
        _keep_library(options)
    trained = open_trained(Path(options.run), options.tokenizer and Path(options.tokenizer), options.n_head)
    say_changes(trained.changes)
    with disk_watched(target), atomic_path(target, options.overwrite) as partial:
        module.write(trained, partial, precision)
        if options.verify:
            say("verifying: reading it back, and the text with it if weights were rounded (two minutes at most) ...")
            for line in module.verify(trained, partial, precision):
                say(f"verified: {line}")
    say(f"exported: {target}")
    return 0


def check_target(target: Path, overwrite: bool) -> None:
    """Raises `ConfigError` if nothing can be written there, or if what is there may not be replaced.

    A folder is replaced only if it is empty or holds what exports do, and nothing else: so never a run, a repository, a
    checkpoint of another trainer, or anybody's notes. A file is replaced only if it is empty or GGUF, the one format
    that is a file.
    """
    if target.name in ("", ".."):
        raise ConfigError(f"--out is {target}: give the name of what is to be written")
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ConfigError(f"{target} is there already: give another --out, or --overwrite to replace it")
    held = {entry.name: entry.is_dir() for entry in target.iterdir()} if target.is_dir() else {}
    is_export = any(held.keys() >= marks for marks in MARKS) and not any(held.values())
    if held.keys() >= MARKS[0]:  # as transformers' own folders have, too
        is_export = is_export and any(WINDOW in _settings(target / name) for name in (CONFIG, TRAINING))
    if held and not is_export:
        raise ConfigError(f"{target} is a folder that no export has written: give another --out, or remove it yourself")
    if others := sorted(held.keys() - WRITTEN):
        raise ConfigError(
            f"{target} holds {others[0]}, which no export has written: give another --out, or take it out of there"
        )
    if target.exists() and not target.is_dir() and not (target.is_file() and _is_empty_or_gguf(target)):
        raise ConfigError(f"{target} is a file that no export has written: give another --out, or remove it yourself")
    check_parent(target)


@contextlib.contextmanager
def disk_watched(target: Path) -> Iterator[None]:
    """Raises `RunFailed` where a library says in its own words that what it was to write could not be written."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(f"{target} cannot be written ({error}): free the disk, or write to another") from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (CheckpointError, OSError):
        return {}


def _is_empty_or_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"", b"GGUF")
    except OSError:
        return False


def check_parent(target: Path) -> None:
    """Raises `ConfigError` if nothing can be written in the folder of this path."""
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ConfigError(f"{parent} is a file, so {target} cannot be written: give another --out")
    try:
        with tempfile.TemporaryFile(dir=parent):  # only trying says it for every user and file system
            pass
    except OSError as error:
        raise ConfigError(f"{parent} cannot be written ({error.strerror}): give another --out") from None


def _parser() -> Parser:
    parser = Parser(prog="groundling export", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=str, help="run folder, one of its checkpoints, or what `groundling import` reads")
    formats = "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items())
    parser.add_argument("--format", choices=list(FORMATS), default="hf", help=formats)
    parser.add_argument("--out", type=str, required=True, help="what is written: a folder, or for gguf a file")
    for flag in dict.fromkeys(form.flag for form in FORMATS.values()):
        takers = {name: form.precisions for name, form in FORMATS.items() if form.flag == flag}
        choices = list(dict.fromkeys(choice for precisions in takers.values() for choice in precisions))
        listed = "; ".join(f"{name}: {', '.join(precisions)}" for name, precisions in takers.items())
        parser.add_argument(f"--{flag}", choices=choices, help=f"format of the weights ({listed})")
    library = "for web: the tarball of one of the library's packages, instead of fetching it with npm; may be repeated"
    parser.add_argument("--library", action="append", default=[], metavar="FILE", help=library)
    parser.add_argument("--tokenizer", type=str, help="tokenizer.json, or gpt2, of weights that come from elsewhere")
    parser.add_argument("--n-head", type=int, help="attention heads, where those weights do not say it")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not read back what was written")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return parser


def _keep_library(options: Any) -> None:
    """Keep the files of --library. Raises `ConfigError` for a format that has none, or for other files."""
    if options.format != "web":
        raise ConfigError(f"--library is not for --format {options.format}: leave it out")
    from groundling.interop import web_page

    for path in options.library:
        web_page.keep_library(Path(path))


def _precision(form: Format, options: Any) -> str:
    """The format's precision that was asked for, or its default.

    Raises `ConfigError` for a flag or a value that this format does not have.
    """
    for flag in {other.flag for other in FORMATS.values()} - {form.flag}:
        if options[flag] is not None:
            raise ConfigError(f"--{flag} is not for --format {options.format}: give --{form.flag}, or leave it out")
    precision: str = options[form.flag] or form.precisions[0]
    if precision not in form.precisions:
        raise ConfigError(f"--{form.flag} is {precision}: give one of {', '.join(form.precisions)}")
    return precision

"""`groundling publish`: a trained model as a repository on the Hugging Face hub, with a page for visitors if asked."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from groundling.commands.arguments import Parser
from groundling.commands.export import FORMATS, Writer, disk_watched
from groundling.commands.saying import say, say_changes
from groundling.errors import ConfigError, Interrupted, RunFailed
from groundling.interop import space
from groundling.interop.hub import Hub, Place, check_repo, untouched_files
from groundling.interop.trained import Trained, open_trained
from groundling.training.progress import progress_bar

EXAMPLES = """examples:
  groundling publish runs/gpt2 --repo USER/gpt2-shakespeare
  groundling publish runs/gpt2 --repo USER/gpt2-shakespeare --private
  groundling publish runs/gpt2 --repo USER/gpt2-shakespeare --static-space

The hub's token is the one that `hf auth login` left, or HF_TOKEN.
"""

RECITES = "a model like this can recite its training text: whoever may read the model may have that text from it"

PRECISIONS = FORMATS["hf"].precisions


@dataclass(frozen=True)
class Part:
    """One repository of what is published: the model, or a page that runs it."""

    place: Place
    write: Callable[[Path], None]
    """Makes its files in a folder, and raises if they are not right."""
    message: str
    """Of its commit."""
    stale: str | None = None
    """Files of earlier uploads that are to go."""


def main(arguments: list[str]) -> int:
    """Publish one model."""
    options = _parser().parse_args(arguments)
    repo = check_repo(options.repo, "--repo")
    gradio = check_repo(options.space_repo or f"{repo}-demo", "--space-repo") if _wants_gradio(options) else None
    static = check_repo(options.static_repo or f"{repo}-web", "--static-repo") if _wants_static(options) else None
    if gradio and gradio == static:
        raise ConfigError(f"--space-repo and --static-repo are both {gradio}: give each a name of its own")
    trained = replace(open_trained(Path(options.run)), license=_license(options.license))
    say_changes(trained.changes)
    hub = Hub.of_user(say)
    say(f"hub: signed in as {hub.name}")
    model = hub.look(repo, "model", options.private)
    gradio_place = hub.look(gradio, "space", options.private, "gradio") if gradio else None
    static_place = hub.look(static, "space", options.private, "static") if static else None
    asks = _must_ask(options.yes, model)
    parts = [_export_part(model, "model", trained, "hf", options.dtype)]
    if gradio_place:
        parts.append(_gradio_part(gradio_place, repo))
        if not hub.is_paid:
            say("note: the hub runs Gradio Spaces on free machines for paid accounts only; --static-space is free")
    if static_place:
        parts.append(_export_part(static_place, "page", trained, "web"))
    with tempfile.TemporaryDirectory(prefix="groundling-") as temporary:
        folders = [Path(temporary) / str(number) for number in range(len(parts))]
        for part, folder in zip(parts, folders, strict=True):  # all of them before anything is uploaded
            with disk_watched(folder):
                part.write(folder)
        for part, folder in zip(parts, folders, strict=True):
            _show(part, folder)
        if asks:
            say(f"its card, to be read before it is published: {folders[0] / 'README.md'}")
        _ask(asks)
        for number, (part, folder) in enumerate(zip(parts, folders, strict=True)):
            _upload(hub, part, folder, parts[:number])
    if gradio_place and options.private:
        say(f"the {gradio_place} reads a private model: give it a token that may read, as its secret HF_TOKEN")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="groundling publish", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=str, help="run folder, or one of its checkpoints")
    parser.add_argument("--repo", type=str, required=True, metavar="USER/NAME", help="the model's repository")
    parser.add_argument("--private", action="store_true", help="make what is new private (else it is public)")
    parser.add_argument("--license", type=str, metavar="ID", help="of the weights, for the card, such as cc0-1.0")
    parser.add_argument("--dtype", choices=PRECISIONS, default=PRECISIONS[0], help="format of the weights")
    parser.add_argument("--space", action="store_true", help="also make a Gradio Space that serves the model")
    parser.add_argument("--space-repo", type=str, metavar="USER/NAME", help="that Space; default is --repo with -demo")
    parser.add_argument(
        "--static-space", action="store_true", help="also make a page that runs the model in its visitor's browser"
    )
    parser.add_argument("--static-repo", type=str, metavar="USER/NAME", help="that page; default is --repo with -web")
    parser.add_argument("--yes", action="store_true", help="do not ask before something becomes public")
    return parser


def _license(identifier: str | None) -> str | None:
    """Raises `ConfigError` for what is no identifier of a licence on the hub."""
    if identifier is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", identifier):
        raise ConfigError(f"--license is {identifier!r}: give its identifier on the hub, such as cc0-1.0 or mit")
    return identifier


def _wants_gradio(options: Any) -> bool:
    return bool(options.space or options.space_repo)


def _wants_static(options: Any) -> bool:
    return bool(options.static_space or options.static_repo)


def _export_part(place: Place, what: str, trained: Trained, form: str, precision: str | None = None) -> Part:
    """What `groundling export` writes in one of its formats, verified; raises `VerificationFailed` if it is wrong."""
    chosen = FORMATS[form]
    writer = cast(Writer, importlib.import_module(f"groundling.interop.{chosen.module}"))
    used = precision or chosen.precisions[0]

    def write(folder: Path) -> None:
        writer.write(trained, folder, used)
        for line in writer.verify(trained, folder, used):
            say(f"{what} verified: {line}")

    return Part(place, write, f"Publish the {what} of the run {trained.name} with Groundling")


def _gradio_part(place: Place, model: str) -> Part:
    def write(folder: Path) -> None:
        folder.mkdir()
        space.write(folder, model)

    return Part(place, write, f"Serve {model} with Groundling", space.WHEELS)


def _show(part: Part, folder: Path) -> None:
    """What an upload brings, and who will see it."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    place = part.place
    action = "updated by a new commit" if place.exists else "made"
    n_megabytes = sum(files.values()) / 1e6
    say(f"the {place.visibility} {place} will be {action}: {len(files)} files, {n_megabytes:,.1f} MB")
    if kept := untouched_files(place, files, part.stale):
        listed = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
        say(f"note: it keeps {len(kept)} other files that it has now ({listed})")
    if "README.md" in place.files:
        say("note: the README.md that it has now is replaced")


def _must_ask(yes: bool, model: Place) -> bool:
    """Whether somebody sits at a terminal who has not decided yet; a command in a script has been decided on.

    Raises `ConfigError` if the question would not be seen.
    """
    if yes or model.private or not (sys.stdin and sys.stdin.isatty()):
        return False
    if not sys.stderr.isatty():
        raise ConfigError("the question whether to publish would not be seen here: give --yes or --private")
    return True


def _ask(asks: bool) -> None:
    """Ask, if somebody is to be asked, before something becomes public."""
    say(RECITES)
    if not asks:
        return
    print("publish it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Interrupted("nothing was published")


def _upload(hub: Hub, part: Part, folder: Path, done: list[Part]) -> None:
    """Upload one part, and print its address. Raises `RunFailed` with what is published so far."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        with progress_bar(f"uploading the {part.place}", n_bytes) as advance:
            upload = hub.upload(part.place, folder, part.message, advance, part.stale)
    except RunFailed as error:
        if done:
            error.args = (f"{error} ({' and '.join(f'the {other.place}' for other in done)}: published)",)
        raise
    say(f"published: the {part.place}" if upload.changed else f"nothing new: the {part.place} had these files already")
    print(upload.address, flush=True)

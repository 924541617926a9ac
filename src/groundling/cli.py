"""The command line: finds the command, and turns what went wrong into a message and an exit code.

Invariant: `groundling --help` imports nothing but the standard library; a command is imported when it is
called. Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 interrupted (and saved).
"""

from __future__ import annotations

import errno
import importlib
import io
import keyword
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from groundling import __version__, allocator
from groundling.errors import ConfigError, Interrupted, RunFailed, UserError

COMMANDS = {
    "train": "train a GPT-2 on a text until it knows it",
    "evaluate": "print the losses of a run over the whole text",
    "sample": "continue a prompt with a trained model",
    "trace": "show which parts of a text stand word for word in a run's training text",
    "serve": "answer programs that speak OpenAI's completions API, with a trained model",
    "report": "write a page with everything measured about a run: what it knows, recites and copies",
    "export": "write a trained model in the format of another program, and verify it",
    "publish": "upload a trained model to the Hugging Face hub, with a page that runs it if asked",
    "import": "make a run of GPT-2 weights that another program wrote",
    "estimate": "say how long a run would take here, and how much memory",
    "doctor": "print what this machine offers and what will be used",
}

SYSTEM_REFUSALS = {
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EACCES: "give a path that you may use",
    errno.EPERM: "give a path that you may use",
    errno.EROFS: "give a path on a disk that can be written",
    errno.ENOSPC: "free the disk and try again (a run goes on with --resume)",
    errno.EDQUOT: "free some of your share of the disk and try again (a run goes on with --resume)",
}
"""Errors of the operating system that no check anticipated, and the advice that is printed with each."""

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "Invalid buffer size")
"""Parts of PyTorch's errors when a device, or the system, has no more memory."""
LESS_MEMORY = "lower --windows.micro_batch_size (--batch-size of evaluate), or take a smaller model"

HELP = """usage: groundling COMMAND [OPTIONS]

GPT-2 (124,439,808 parameters), trained from scratch on a text until it knows the text.

commands:
{commands}

examples:
  groundling train                                 the main job: Tiny Shakespeare, until its loss is below 0.1
  groundling train --preset penny                  the same path with a small model, in minutes
  groundling train --corpus my-novel.txt           your own text
  groundling sample runs/gpt2 --prompt "ROMEO:"    let a trained model write

`groundling COMMAND --help` lists a command's options and gives examples.
"""


READER_GONE = (errno.EPIPE, errno.EIO)
"""What writing fails with when a pipe's reader has left, and when a terminal is gone."""


class LossyStream:
    """A stream whose reader may leave, as `tee` does at Ctrl-C, or a terminal that is closed: what is said then goes
    nowhere, and we go on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            discard_output(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
            discard_output(self._stream)


def discard_output(stream: TextIO) -> None:
    """Let what is written to this stream from now on, and what it still holds, be lost."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _nowhere() -> TextIO:
    """In the place of a stream that was closed before we began."""
    return Path(os.devnull).open("w", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Without `arguments` it is the process's own command line, and the process may start again (`allocator`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())), end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"groundling {__version__}")
        return 0
    if arguments is None:  # this process is ours
        allocator.restart(words)
        sys.stdout, sys.stderr = (stream or _nowhere() for stream in (sys.stdout, sys.stderr))
        sys.stderr = LossyStream(sys.stderr)
        if isinstance(sys.stdout, io.TextIOWrapper):  # of another encoding than UTF-8, perhaps
            sys.stdout.reconfigure(errors="backslashreplace")
        if words[0] in ("serve", "train"):  # other commands end when nobody reads what they print
            sys.stdout = LossyStream(sys.stdout)
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        print(f"groundling: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        discard_output(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in SYSTEM_REFUSALS:
            raise
        where = error.filename or "a file"
        sentence = UserError(f"{where}: {error.strerror}: {SYSTEM_REFUSALS[error.errno]}")
        print(f"groundling: {sentence}", file=sys.stderr)
        return RunFailed.exit_code if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError.exit_code
    except (RuntimeError, MemoryError) as error:
        first_line = str(error).strip().partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(phrase in first_line for phrase in OUT_OF_MEMORY):
            raise
        sentence = RunFailed(f"there is not enough memory ({first_line or 'for Python'}): {LESS_MEMORY}")
        print(f"groundling: {sentence}", file=sys.stderr)
        return sentence.exit_code
    except FloatingPointError as error:
        sentence = RunFailed(f"the network's output is not finite ({error}): use an earlier checkpoint of it")
        print(f"groundling: {sentence}", file=sys.stderr)
        return sentence.exit_code
    except KeyboardInterrupt:
        print("groundling: interrupted", file=sys.stderr)
        return Interrupted.exit_code


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise ConfigError(f"there is no command {command!r}: choose one of {', '.join(COMMANDS)}")
    name = f"{command}_" if keyword.iskeyword(command) else command  # import_.py
    module = importlib.import_module(f"groundling.commands.{name}")
    return module.main(arguments)  # type: ignore[no-any-return]

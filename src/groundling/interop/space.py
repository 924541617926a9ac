"""The files of a Space that serves a published model with the very Groundling that published it: page and API.

Invariant: what the Space runs is the wheel beside its app.py. A Space installs requirements.txt before its other files
are there, so app.py unpacks the wheel when it starts, and requirements.txt lists only what the wheel needs.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from groundling.interop import wheel

GRADIO = "6.31.0"
"""Version that the page was tried with; taken where none is installed here."""

WHEELS = f"{wheel.NAME}-*.whl"

APP = '''"""Unpacks the Groundling that lies beside this file, and serves the model {model} with it."""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

unpacked = tempfile.mkdtemp()
zipfile.ZipFile(Path(__file__).parent / {wheel}).extractall(unpacked)
sys.path.insert(0, unpacked)

from groundling.cli import main

host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
port = os.environ.get("GRADIO_SERVER_PORT", "7860")
behind_proxy = ["--max-connections-per-address", "0", "--max-queue", "128"]  # through which all visitors come
sys.exit(main(["serve", {model_literal}, "--name", {name_literal}, "--host", host, "--port", port, *behind_proxy]))
'''

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
- {model}
---

A page that continues a prompt with {model}, a GPT-2. What it writes may be its training text, word for word.
"""


def write(folder: Path, model: str) -> None:
    """The files of a Space, in this folder, that serves the model repository `model` (or a folder, by its path).

    Raises `ConfigError` if Groundling runs without being installed, and so cannot be packed.
    """
    packed = wheel.write(folder)
    name = model.rpartition("/")[2]
    app = APP.format(
        model=model, wheel=json.dumps(packed.name), model_literal=json.dumps(model), name_literal=json.dumps(name)
    )
    (folder / "app.py").write_text(app, encoding="utf-8")
    needed = [line for line in wheel.requirements("serve") if not line.startswith("gradio")]  # the hub brings that
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
    readme = README.format(
        title=json.dumps(name),
        gradio=_gradio_version(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        model=model,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _gradio_version() -> str:
    """The version installed here, which is the one that fits what else is."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return GRADIO

"""A folder with a page that runs the model in its visitor's browser, for any web server to host.

Invariant: the page asks no other origin for anything: all it needs lies in the folder, our three files, llama.cpp as
WebAssembly, and the weights as GGUF. Its Content-Security-Policy forbids foreign scripts and styles; connections it
allows by https, because hosts of large files send the reader on to another of their addresses.

Source: wllama, https://github.com/ngxson/wllama, whose package on npm carries llama.cpp compiled to WebAssembly. Its
own way to Safari (a build without Memory64 and JSPI) is a package of its own, fetched from elsewhere unless given here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from groundling.interop import gguf, npm
from groundling.interop.model_card import measured_losses, memorised
from groundling.interop.trained import Trained, printable

WLLAMA = npm.Package(
    "@wllama/wllama",
    "3.8.1",
    "Pl7BEJhPU8OHnV/yhn3DFZYhLLOdSHh+4TND79WCftHnlUAdQPAsyc/CfIOY+4mVxvf5VW3Xw3Uf7BBfotS1gw==",
)
COMPAT = npm.Package(
    "@wllama/wllama-compat",
    "3.8.1",
    "IvmjrJ+JzDbt3w1FQq1yAmnFEiLGCceowK2Q80zW+k9ChFkPBM1ByX/9xm2xVxyd8MHC50VpuDo6SDE83k9kIQ==",
)
LIBRARY = {
    WLLAMA: {
        "esm/index.min.js": "wllama.js",
        "esm/wasm/wllama.wasm": "wllama.wasm",
        "LICENCE": "wllama-LICENSE.txt",
    },
    COMPAT: {"wasm/wllama.js": "wllama-compat.js", "wasm/wllama.wasm": "wllama-compat.wasm"},
}
"""Of each package, what the page uses, and its name in the folder."""

AS_IT_IS = ("page.js", "style.css")
TEMPLATES = ("index.html", "README.md")
WEIGHTS = "model.gguf"


def keep_library(path: Path) -> None:
    """Keep a tarball of `LIBRARY`, fetched elsewhere, so that `write` needs no npm.

    Raises `ConfigError` for any other file.
    """
    npm.keep(list(LIBRARY), path)


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write the folder; the library comes from the cache, or else through npm.

    Raises `ConfigError` if the library is not there and npm neither, `RunFailed` if npm cannot fetch it.
    """
    target.mkdir()
    for package, names in LIBRARY.items():
        for path, content in npm.files(package, list(names)).items():
            (target / names[path]).write_bytes(content)
    gguf.write(trained, target / WEIGHTS, precision)
    facts = _facts(trained, precision, (target / WEIGHTS).stat().st_size)
    ours = resources.files("groundling.interop").joinpath("web_page")
    for name in AS_IT_IS:
        (target / name).write_bytes(ours.joinpath(name).read_bytes())
    # Names that users chose stand in both: escaped they are text in HTML, and in the HTML that Markdown is.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    for name in TEMPLATES:
        page = environment.from_string(ours.joinpath(name).read_text(encoding="utf-8")).render(facts)
        (target / name).write_text(page, encoding="utf-8")


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """What llama.cpp reads from the page's weights."""
    yield from gguf.verify(trained, target / WEIGHTS, precision)


def _facts(trained: Trained, precision: str, n_bytes: int) -> dict[str, Any]:
    """What the templates show."""
    record, config = trained.record, trained.model.config
    settings = record.get("config") or {}
    name = " ".join(trained.name.split())
    prompts = settings.get("prompts") or [""]
    sources = [Path(source).name for source in (settings.get("text") or {}).get("sources") or []]
    return {
        "name": name,
        "title": Markup(json.dumps(name, ensure_ascii=False)),  # as YAML quotes it
        "n_parameters": f"{config.n_parameters():,}",
        "n_vocab": config.n_vocab,
        "window": trained.window,
        "text": printable(", ".join(sources)),
        "how": "further" if settings.get("init") else "from scratch",
        "prompt": printable(prompts[0]),
        "precision": precision,
        "n_bytes": n_bytes,
        "megabytes": f"{n_bytes / 1e6:.1f}",
        "memorised": " ".join(memorised(measured_losses(trained))),
        "libraries": ", ".join(name for names in LIBRARY.values() for name in names.values()),
        "versions": " and ".join(str(package) for package in LIBRARY),
    }

"""A browser for tests that open a page: one that is here, or else one that npm carries.

Invariant: no test is left out for want of a browser. On a machine without one, `@sparticuz/chromium` is fetched with
npm once, checked, and unpacked beside the project's cached files (Linux on x86-64 only: that is what it is built for).
"""

from __future__ import annotations

import functools
import http.server
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import brotli
from playwright.sync_api import Browser, sync_playwright

from groundling import runtime
from groundling.files import atomic_path
from groundling.interop import npm

CHOSEN = "GROUNDLING_TEST_BROWSER"
"""Environment variable with the path of a Chromium or Chrome; `npm` takes the one that npm carries."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CHROMIUM = npm.Package(
    "@sparticuz/chromium",
    "147.0.0",
    "4ZKeAQQa8up2mt675qSitztLdbQrlf8BKdC5naeap+5Mv1OV1OlJdPoU+EJC/p5sQUJUQmN4r+q5+EhaaOUHpQ==",
)


def find_browser() -> tuple[Path, dict[str, str]]:
    """A Chromium's path, and what its environment must have besides ours."""
    chosen = os.environ.get(CHOSEN)
    if chosen and chosen != "npm":
        return Path(chosen), {}
    found = None if chosen else next(filter(None, map(shutil.which, NAMES)), None)
    if found:
        return Path(found), {}
    folder = _unpacked()
    libraries = [str(folder / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    fonts = {"FONTCONFIG_FILE": str(folder / "fonts.conf")}
    return folder / "chromium", {"LD_LIBRARY_PATH": os.pathsep.join(libraries), **fonts}


def _unpacked() -> Path:
    """The folder of the Chromium that npm carries."""
    folder = runtime.cache_dir() / "browser" / CHROMIUM.version
    if not folder.exists():
        packed = npm.files(CHROMIUM, ["bin/chromium.br", "bin/al2023.tar.br", "bin/fonts.tar.br"])
        with atomic_path(folder) as partial:
            partial.mkdir()
            (partial / "chromium").write_bytes(brotli.decompress(packed["bin/chromium.br"]))
            for name in ("al2023", "fonts"):
                content = io.BytesIO(brotli.decompress(packed[f"bin/{name}.tar.br"]))
                with tarfile.open(fileobj=content) as archive:
                    archive.extractall(partial, filter="data")
            (partial / "fonts.conf").write_text(f"<fontconfig><dir>{folder / 'fonts'}</dir></fontconfig>")
    (folder / "chromium").chmod(0o755)
    return folder


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless browser that finds no host but this machine."""
    path, environment = find_browser()
    arguments = [
        "--no-sandbox",  # containers and root have none; the pages are ours
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments, env={**os.environ, **environment})
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(folder: Path, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """A web server for a folder on the loopback interface; its address ends in a slash."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Print nothing of a browser that leaves before it has everything."""

    handler = functools.partial(Handler, directory=str(folder))
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()

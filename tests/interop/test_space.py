"""The files of a Space: what the wheel holds, and what its own app.py serves."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
import yaml

import groundling
from groundling import runtime
from groundling.generation.open import open_decoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.text import continue_text
from groundling.interop import huggingface, space, wheel
from groundling.interop.trained import Trained, open_trained
from groundling.runtime import RuntimeConfig

from .conftest import MakeTrained

PACKAGE = Path(groundling.__file__).parent


def test_a_wheel_is_the_running_package(tmp_path: Path) -> None:
    path = wheel.write(tmp_path)
    assert path.name == f"groundling-{groundling.__version__}-py3-none-any.whl"
    own = {entry.relative_to(PACKAGE.parent).as_posix() for entry in PACKAGE.rglob("*") if entry.is_file()}
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert {name for name in held if ".dist-info/" not in name} == {n for n in own if "__pycache__" not in n}
    [record] = [content.decode() for name, content in held.items() if name.endswith("/RECORD")]
    recorded = {name: (digest, size) for name, digest, size in csv.reader(record.splitlines())}
    assert recorded.keys() == held.keys()
    for name, content in held.items():
        if not name.endswith("/RECORD"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert recorded[name] == (f"sha256={digest}", str(len(content))), name


def test_the_same_package_makes_the_same_wheel(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    assert wheel.write(tmp_path).read_bytes() == wheel.write(tmp_path / "again").read_bytes()


def test_pip_installs_the_wheel(tmp_path: Path) -> None:
    """Into a folder of its own, of which nothing but the wheel's code runs."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "t"),
    ]
    subprocess.run([*pip, str(wheel.write(tmp_path))], check=True)
    code = "import groundling, importlib.metadata as m; print(groundling.__file__, m.version('groundling'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "t")}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(tmp_path / "t" / "groundling" / "__init__.py"), groundling.__version__]


def test_what_the_hub_reads(tmp_path: Path) -> None:
    space.write(tmp_path, "will/sonnets")
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["sdk"], facts["app_file"], facts["models"]) == ("gradio", "app.py", ["will/sonnets"])
    assert facts["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "word for word" in text
    needed = (tmp_path / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch") for line in needed)
    extra = [line for line in distribution("groundling").requires or [] if re.search("extra == .serve.", line)]
    assert {line.partition(";")[0].strip() for line in extra if not line.startswith("gradio")} <= set(needed)
    assert not any("extra" in line or "groundling" in line or "gradio" in line for line in needed)
    app = (tmp_path / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert '"--max-connections-per-address", "0"' in app  # all visitors come by the hub's proxy


@pytest.fixture(scope="module")
def export(make_trained: MakeTrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as its repository has it."""
    path = tmp_path_factory.mktemp("export") / "bottles"
    huggingface.write(make_trained("one"), path, "fp32")
    return path


@pytest.fixture(scope="module")
def page(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the Space's own app.py, run where only its files are."""
    folder = tmp_path_factory.mktemp("app")
    space.write(folder, str(export))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment |= {"PYTHONUNBUFFERED": "1", "GRADIO_SERVER_PORT": str(_free_port())}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "http://" in line:
            break
    else:
        pytest.fail(f"the page did not begin: {said}")
    yield "http://" + line.partition("http://")[2].strip().rstrip("/")
    process.terminate()
    process.wait(timeout=20)
    process.stdout.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def expected(trained: Trained, prompt: str, config: SamplingConfig) -> str:
    resolved = runtime.resolve(RuntimeConfig(dtype="fp32", compile="off"))
    with open_decoder(trained.model, trained.window, resolved, "bf16") as decoder:
        return prompt + "".join(continue_text(decoder, trained.tokenizer, prompt, config))


def test_the_page_and_the_api_are_there(page: str, export: Path) -> None:
    shown = httpx.get(page, timeout=30)
    assert shown.status_code == 200
    assert "nothing is known here of how it was trained" in shown.text
    trained = open_trained(export)
    for temperature, top_k, max_tokens, seed in [(0, 50, 30, 1), (1.5, 0, 40, 7), (1.5, 0, 40, 8)]:
        config = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        asked = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens, "seed": seed}
        body = {"model": export.name, "prompt": "One green", **asked}
        answer = httpx.post(f"{page}/v1/completions", json=body, timeout=30).json()
        assert "One green" + answer["choices"][0]["text"] == expected(trained, "One green", config)

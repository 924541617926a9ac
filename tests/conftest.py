"""What many tests share: a network small enough to train in a blink, and tokens to train it on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray

from groundling import kernels, runtime
from groundling.kernels import build, draw, products
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import Runtime

from .interop.hub_server import TOKEN, HubServer

settings.register_profile("same", derandomize=True)
settings.load_profile("same")
"""Each run of the tests tries the same examples; `pytest --hypothesis-profile default` draws others."""


def new_cache(folder: Path) -> Path:
    """A cache of its own, but for the kernels: what they are made of is in their names, and making them takes long."""
    kernels_here = runtime.cache_dir() / "kernels"
    kernels_here.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "kernels").symlink_to(kernels_here, target_is_directory=True)
    return folder / "cache"


@pytest.fixture(scope="module")
def unsynced() -> Iterator[None]:
    """Files reach the disk when the system likes: each wait for that takes milliseconds, and no test pulls the plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which a wrong descriptor fails as well
        yield


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What was synced, and what took a name, in order: ("sync", inode, "") and ("rename", inode, new name)."""
    events: list[tuple[str, int, str]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(("sync", os.fstat(descriptor).st_ino, "")))

    def recorded(rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(path: Path, target: Path) -> Path:
            events.append(("rename", path.stat().st_ino, Path(target).name))
            return rename(path, target)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, recorded(getattr(Path, name)))
    return events


@pytest.fixture
def quick_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate measures as few steps as it may: for tests that ask what is measured, and not how long."""
    monkeypatch.setattr("groundling.training.estimate.MEASURED_S", 0.0)


@pytest.fixture(autouse=True)
def reference_kernels() -> Iterator[None]:
    """Whatever backend a command has selected in this process, the next test begins with the reference."""
    yield
    kernels.select("reference")


@pytest.fixture(params=[0, 4, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Vectors and tiles as this CPU has them (0), and in plain C++ as other CPUs have them."""
    if request.param and platform.machine() != "x86_64":
        pytest.skip("only x86-64's intrinsics can be turned off")
    if request.param:
        flags = ("-O1", "-mno-avx", f"-DGROUNDLING_LANES={request.param}")
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
    for cached in (build.library, draw._native):
        cached.cache_clear()
    yield
    for cached in (build.library, draw._native):
        cached.cache_clear()


@contextmanager
def our_products(used: bool) -> Iterator[None]:
    """Products of bf16 by our own code (plain C++ where the CPU has no instructions for them), or PyTorch's."""
    products.available()  # Linux lets a process use the matrix unit once it has asked for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "available", lambda: used)
        yield


@pytest.fixture
def cpu() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, torch.get_num_threads(), compile=False, reasons=())


@pytest.fixture
def tiny() -> GPTConfig:
    return GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=16, n_vocab=31)


@pytest.fixture
def model(tiny: GPTConfig) -> GPT2:
    torch.manual_seed(0)
    return GPT2(tiny)


@pytest.fixture
def tokens(tiny: GPTConfig) -> NDArray[np.uint16]:
    """203 tokens: no multiple of any window or batch in these tests."""
    return np.random.default_rng(0).integers(tiny.n_vocab, size=203).astype(np.uint16)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub that huggingface_hub's own client reaches, with a token for it; the client's waits are over at once."""
    server = HubServer()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=server.waits.append))
    before = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(server.client)
    yield server
    huggingface_hub.set_client_factory(before)

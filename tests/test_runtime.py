from __future__ import annotations

import os
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from groundling import machine, runtime
from groundling.errors import ConfigError
from groundling.runtime import RuntimeConfig


def test_every_choice_has_a_reason() -> None:
    resolved = runtime.resolve(RuntimeConfig())
    assert [what for what, _, _ in resolved.reasons] == ["device", "dtype", "threads", "kernels", "compile"]
    assert all(why for _, _, why in resolved.reasons)


@pytest.mark.parametrize(
    ("flags", "pace", "dtype"),
    [
        (["amx_bf16", "avx512_bf16", "avx2"], 7.5, "bf16"),
        (["amx_bf16", "avx512_bf16", "avx2"], 0.5, "fp32"),
        (["avx512_bf16", "avx2"], 1.9, "bf16"),
        (["avx512_bf16", "avx2"], 1.3, "bf16"),
        (["avx512_bf16", "avx2"], 1.2, "fp32"),
        (["avx512_bf16", "avx2"], 0.5, "fp32"),
        (["avx2"], None, "fp32"),
    ],
)
def test_bf16_is_chosen_where_the_cpu_is_faster_in_it(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], pace: float | None, dtype: str
) -> None:
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(runtime, "bf16_pace", lambda: pace)  # None, where it is not to be asked for
    resolved = runtime.resolve(RuntimeConfig(device="cpu"))
    assert resolved.dtype_name == dtype
    assert pace is None or f"{pace} times as fast" in resolved.reasons[1][2]
    for asked in ("fp32", "bf16"):
        assert runtime.resolve(RuntimeConfig(device="cpu", dtype=asked)).dtype_name == asked


@pytest.mark.parametrize(("began", "pace"), [("fp32", 1.9), ("bf16", 0.5)])
def test_a_run_goes_on_in_the_format_that_a_measurement_chose(
    monkeypatch: pytest.MonkeyPatch, began: str, pace: float
) -> None:
    """Whatever the machine is busy with now."""
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset(["avx512_bf16"]))
    monkeypatch.setattr(runtime, "bf16_pace", lambda: pace)
    assert runtime.resolve(RuntimeConfig(device="cpu"), {"dtype": began}).dtype_name == began
    monkeypatch.setattr(runtime, "cpu_flags", lambda: frozenset(["avx2"]))
    assert runtime.resolve(RuntimeConfig(device="cpu"), {"dtype": began}).dtype_name == "fp32"


def test_the_pace_of_bf16_is_that_of_longer_measurements() -> None:
    """Up to a factor of 3, since both may be disturbed; upside down it would be wrong by the square of the pace."""
    cpu, shape = torch.device("cpu"), (machine.PACE_SHAPE,)
    seconds = {
        name: 1 / machine.matrix_ceiling_flops(cpu, runtime.DTYPES[name], lambda: None, shape)
        for name in ("fp32", "bf16")
    }
    pace = seconds["fp32"] / seconds["bf16"]
    assert pace / 3 < machine.bf16_pace.__wrapped__() < 3 * pace


def test_without_a_compiler_there_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    resolved = runtime.resolve(RuntimeConfig(device="cpu"))
    assert not resolved.compile
    assert resolved.kernels == resolved.facts()["kernels"] == "reference"
    assert [warning for warning in resolved.warnings if "compiler" in warning] == [*resolved.warnings][:1]
    with pytest.raises(ConfigError, match="install"):
        runtime.resolve(RuntimeConfig(device="cpu", kernels="native"))
    with pytest.raises(ConfigError, match="install"):
        runtime.resolve(RuntimeConfig(device="cpu", compile="on"))


def test_native_kernels_leave_nothing_to_compile() -> None:
    resolved = runtime.resolve(RuntimeConfig(device="cpu"))
    assert resolved.kernels == resolved.facts()["kernels"] == "native"
    assert not resolved.compile
    assert not resolved.warnings
    compiled = runtime.resolve(RuntimeConfig(device="cpu", compile="on"))
    assert (compiled.kernels, compiled.compile) == ("reference", True)
    assert runtime.resolve(RuntimeConfig(device="cpu", kernels="reference")).compile
    with pytest.raises(ConfigError, match="not both"):
        runtime.resolve(RuntimeConfig(device="cpu", kernels="native", compile="on"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        runtime.resolve(RuntimeConfig(device=device))


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    runtime.resolve(RuntimeConfig(threads=1))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path))
    assert runtime.cache_dir() == tmp_path
    monkeypatch.delenv("GROUNDLING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.cache_dir() == tmp_path / "groundling"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    with pytest.raises(ConfigError, match="set GROUNDLING_CACHE"):
        runtime.cache_dir()


def test_the_machine_is_described() -> None:
    facts = machine.describe(2, torch.device("cpu"))
    assert facts["cpu"]
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 2**28
    peak = machine.peak_memory_bytes(torch.device("cpu"))
    assert peak is None or 2**25 < peak < 2**42
    assert machine.free_disk_bytes(Path("does/not/exist")) > 0
    assert 1 <= runtime.available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("groups", "files", "n_cores", "memory"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64, 2**40),
        ("0::/", {"cpu.max": "150000 100000", "memory.max": "max"}, 2, 2**40),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "4096"}, 1, 4096),
        ("0::/elsewhere", {"cpu.max": "300000 100000"}, 3, 2**40),
        ("3:memory:/m\n1:cpu:/c", {"cpu/c/cpu.cfs_quota_us": "-1", "cpu/c/cpu.cfs_period_us": "100000"}, 64, 2**40),
        (
            "3:memory:/m\n1:cpu:/c",
            {
                "cpu/c/cpu.cfs_quota_us": "210000",
                "cpu/c/cpu.cfs_period_us": "100000",
                "memory/m/memory.limit_in_bytes": "8192",
            },
            3,
            8192,
        ),
        ("0::/", {"cpu.max": "1000 100000"}, 1, 2**40),
    ],
)
def test_a_containers_limits_count(
    groups: str, files: dict[str, str], n_cores: int, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "own").write_text(groups + "\n")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert runtime.available_cores() == n_cores
    if (found := machine.memory_bytes()) is not None:
        assert found == memory or memory == 2**40


def test_the_ceiling_is_measured_in_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((256, 256, 256), (8, 16, 32))
    ceiling = machine.matrix_ceiling_flops(torch.device("cpu"), torch.float32, lambda: None, shapes)
    assert 1e8 < ceiling < 1e15
    monkeypatch.setattr(machine, "seconds_each", lambda product, synchronize, queued: 0.5)
    assert machine.matrix_ceiling_flops(torch.device("cpu"), torch.float32, lambda: None, shapes) == 4 * 256**3


@pytest.fixture(params=["A100", "T4", "P100"])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two CUDA GPUs, as PyTorch would tell of them."""
    capability = {"A100": (8, 0), "T4": (7, 5), "P100": (6, 0)}[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    monkeypatch.setattr(runtime, "_cuda_failure", lambda device: None)
    return str(request.param)


def test_a_gpu_computes_in_the_format_that_it_has_units_for(gpus: str) -> None:
    resolved = runtime.resolve(RuntimeConfig())
    assert resolved.device == torch.device("cuda")
    assert resolved.dtype_name == {"A100": "bf16", "T4": "fp16", "P100": "fp32"}[gpus]
    assert resolved.facts()["dtype"] == resolved.dtype_name
    assert "1 more, of which a run uses none" in resolved.reasons[0][2]
    assert runtime.resolve(RuntimeConfig(dtype="fp16")).dtype is torch.float16
    assert [name for name in runtime.DTYPES if runtime.supports_dtype(name, resolved.device)] == (
        ["fp32", "bf16", "fp16"] if gpus == "A100" else ["fp32", "fp16"]
    )
    if gpus != "A100":
        with pytest.raises(ConfigError, match=r"only emulates.*leave that setting out"):
            runtime.resolve(RuntimeConfig(dtype="bf16"))


def test_fp16_is_for_cuda() -> None:
    with pytest.raises(ConfigError, match="for CUDA GPUs, but the device is cpu"):
        runtime.resolve(RuntimeConfig(device="cpu", dtype="fp16"))


def test_a_gpu_that_is_full_is_not_passed_over(gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a run of minutes would become one of hours."""
    monkeypatch.setattr(runtime, "_cuda_failure", lambda device: "CUDA out of memory")
    with pytest.raises(ConfigError, match=r"Tesla cannot be used .* give --device cpu"):
        runtime.resolve(RuntimeConfig())


def test_another_gpu_is_another_fact(gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = runtime.resolve(RuntimeConfig())
    assert resolved.facts()["GPU"] == "Tesla"
    assert "instructions" not in resolved.facts()
    assert "GPU" not in runtime.resolve(RuntimeConfig(device="cpu")).facts()


def test_attention_is_not_cudnns(gpus: str) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    runtime.resolve(RuntimeConfig())
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_that_pytorch_has_no_code_for_is_left_alone(gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cuda_failure", lambda device: "CUDA error: no kernel image is available")
    resolved = runtime.resolve(RuntimeConfig())
    assert (resolved.device.type, resolved.kernels) == ("cpu", "native")
    assert "no kernel image" in resolved.warnings[0]
    with pytest.raises(ConfigError, match=r"no kernel image.*--device cpu"):
        runtime.resolve(RuntimeConfig(device="cuda:1"))


def test_apple_gpus_are_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    resolved = runtime.resolve(RuntimeConfig())
    assert (resolved.device.type, resolved.compile, resolved.dtype_name) == ("mps", False, "fp32")
    assert not resolved.warnings
    with pytest.raises(ConfigError, match="wrong LayerNorms"):
        runtime.resolve(RuntimeConfig(compile="on"))


def test_launching_and_waiting_do_not_count_where_products_are_queued() -> None:
    """A device that takes 20 microseconds for a product and 2 ms to answer."""
    n_queued = 0

    def launch() -> None:
        nonlocal n_queued
        n_queued += 1

    def synchronize() -> None:
        nonlocal n_queued
        end = time.perf_counter() + (2e-3 + 20e-6 * n_queued if n_queued else 0)
        while time.perf_counter() < end:
            pass
        n_queued = 0

    assert machine.seconds_each(launch, synchronize, queued=False) > 2e-3
    assert machine.seconds_each(launch, synchronize, queued=True) < 100e-6

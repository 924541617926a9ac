"""Kernels that are broken on purpose, a line each: the checks of this folder must notice every one of them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from groundling import runtime
from groundling.generation import native as decoding
from groundling.kernels import build, call, draw
from groundling.optim import native as updating

from ..generation import test_decoder
from ..optim import test_native as test_update
from . import test_draw, test_head, test_native, test_products, test_weight_copies

SOURCES = Path(build.__file__).parent
FP32, BF16 = torch.float32, torch.bfloat16

Check = Callable[[], object]


def layer_norm() -> None:
    """Of small rows, beside whose variance epsilon is something."""
    inputs = [0.03 * tensor for tensor in test_native.randoms(0, (70, 37), (70, 37), (37,), (37,))]
    test_native.assert_agrees("add_layer_norm", inputs, FP32)


def layer(name: str) -> Check:
    inputs = test_native.randoms(0, (40, 24), (33, 24), (33,))
    return lambda: [test_native.assert_agrees(name, inputs, dtype) for dtype in (FP32, BF16)]


def attention_fp32() -> None:
    test_native.assert_agrees("self_attention", test_native.randoms(0, (2, 100, 3 * 2 * 20)), FP32, 2)


def attention_bf16() -> None:
    """Over more blocks than are turned together."""
    test_products.assert_attention(300, 2, 33)


def head(dtype: torch.dtype, unit: bool) -> Check:
    """Of which the last id counts three times, in chunks of sixteen rows."""
    sizes = {"n_rows": 37, "n_embd": 33, "n_vocab": 13, "n_last": 3, "rows_at_a_time": 16, "seed": 0}
    check = test_head.test_loss_and_gradients_are_the_formulas.hypothesis.inner_test  # type: ignore[attr-defined]
    return lambda: check(**sizes, dtype=dtype, unit=unit)


def layer_by_products() -> None:
    test_products.test_a_layer_and_the_gradient_of_its_input((70, 600, 40))


def weight_gradient(n_terms: int) -> Check:
    return lambda: test_products.assert_weight_gradient(n_terms, 33, 33)


def symmetric() -> None:
    test_products.assert_symmetric_product(201, 130)


def norm() -> None:
    test_update.test_the_norm_is_of_all_gradients()


def drawing() -> None:
    test_draw.test_the_kernel_is_the_one_that_answers()


def decoded() -> None:
    test_decoder.test_a_long_prompt_is_read_in_several_passes()


def update() -> None:
    test_update.test_fifty_steps_are_pytorchs((0.9, 0.98))


def copy_of_update() -> None:
    weight = test_weight_copies.new_weight()
    test_weight_copies.weight_copy(weight)
    weight.grad = torch.ones_like(weight)
    optimizer = updating.NativeAdamW([weight], lr=0.1)
    optimizer.step()
    assert test_weight_copies.is_rounded(test_weight_copies.weight_copy(weight), weight)


class Broken(NamedTuple):
    """A line of a source, what it is to be instead, and what must notice that."""

    source: str
    line: str
    instead: str
    check: Check
    library: str = ""
    """The library that has it, where it is a header's."""

    @property
    def name(self) -> str:
        return self.library or self.source.removesuffix(".cpp")


MULTIPLY_KEYS = "multiply({d_scores_, 1, positions_}, end, queries_, columns_, n, columns_, d_keys_, columns_, "

BROKEN = [
    Broken("head.cpp", "std::expm1((counted", "std::exp((counted", head(FP32, False)),
    Broken("head.cpp", "lanes[n_rest - 1] += log_n_last;", "", head(FP32, False)),
    Broken("head.cpp", "logit + log_n_last : logit", "logit : logit", head(FP32, False)),
    Broken("head.cpp", "(first ? 0.f : to[j])", "0.f", head(BF16, False)),
    Broken("head_products.cpp", "if (id + i == head.n_vocab - 1) logit += head.log_n_last;", "", head(BF16, True)),
    Broken("head_products.cpp", "std::exp(counted - shifts[i]) - sums[i]", "-sums[i]", head(BF16, True)),
    Broken("head_products.cpp", "sum * sums[at / n_in]", "sum", head(BF16, True)),
    Broken("head_products.cpp", "load_some(d_weight + at, n) + sum", "sum", head(BF16, True)),
    Broken("attention.cpp", "begin > j", "false", attention_bf16),
    Broken("attention.cpp", "if (last) weights[v] = seen(weights[v], row, v * kLanes, 0);", "", attention_bf16),
    Broken("attention.cpp", "probabilities[v] = seen(probabilities[v], row, v * kLanes, 0)", "{}", attention_bf16),
    Broken("attention.cpp", "row, v * kLanes) - mean);", "row, v * kLanes));", attention_bf16),
    Broken("attention.cpp", "(shares ? shares[row] : 1.f)", "1.f", attention_bf16),
    Broken("attention_fp32.cpp", f"{MULTIPLY_KEYS}end < T_", f"{MULTIPLY_KEYS}false", attention_fp32),
    Broken("attention_fp32.cpp", "fill_unseen(d_row, n_seen, end);", "", attention_fp32),
    Broken("attention_fp32.cpp", "(load<Vec>(d_row + c) - mean)", "load<Vec>(d_row + c)", attention_fp32),
    Broken("attention_fp32.cpp", "n_seen = first + i + 1;", "n_seen = end;", attention_fp32),
    Broken("blocks.cpp", " - value * mean_value", "", layer_norm),
    Broken("blocks.cpp", ", 0.f) + kEpsilon", ", 0.f)", layer_norm),
    Broken("blocks.cpp", "add_to(totals + width + c, d, n);", "", layer_norm),
    Broken("blocks.cpp", "if (d_sums) d +=", "if (false) d +=", layer_norm),
    Broken("blocks.cpp", "multiply_add(-value, share, value)", "value", layer("linear_gelu")),
    Broken("blocks.cpp", " + read<Fp32>(bias_at + c, n)", "", layer("linear_gelu")),
    Broken("blocks.cpp", "add_to(totals + c, d, n);", "", layer("linear_gelu")),
    Broken("blocks.cpp", "add_to(sums + c, read<Format>(from + row * width + c, n), n);", "", layer("linear")),
    Broken("products.cpp", "load_some(bias + column, n)", "load_some(bias, n)", layer_by_products),
    Broken("products.cpp", "splat(beta)", "splat(1.f)", symmetric),
    Broken("products.cpp", "std::copy_n(turned + i * kSide, n_rows,", "std::copy_n(block, n_rows,", symmetric),
    Broken("products.h", "n, first + step > 0,", "n, step > 0,", weight_gradient(3073), "products"),
    Broken("panels.h", "term ? totals[row] + sum : sum", "sum", weight_gradient(70), "products"),
    Broken("adamw.cpp", "update(weight, load_some(gradients + i, n), first, second);", "", update),
    Broken("adamw.cpp", "1 - std::pow(p.beta2, *p.n_steps)", "1", update),
    Broken("adamw.cpp", "gradient *= gradient_scale;", "", update),
    Broken("adamw.cpp", "if (copies) Bf16::write(copies + i, weight);", "", copy_of_update),
    Broken(
        "adamw.cpp", "add(load_some(values + i, size - i), 0);", "{}", test_update.test_the_norm_is_of_all_gradients
    ),
    Broken("draw.cpp", "sum_of[lane] += rest[lane];", "{}", drawing),
    Broken("draw.cpp", "block ? sums[block - 1] : 0", "0", drawing),
    Broken(
        "decode.cpp",
        "value += load_some(m.bias + n, left)",
        "{}",
        test_decoder.test_a_long_prompt_is_read_in_several_passes,
    ),
    Broken(
        "decode.cpp", "= value + position[c];", "= value;", test_decoder.test_a_long_prompt_is_read_in_several_passes
    ),
    Broken(
        "decode.cpp",
        "std::sqrt(static_cast<float>(head_size))",
        "1",
        test_decoder.test_a_long_prompt_is_read_in_several_passes,
    ),
]


def made(broken: Broken, folder: Path) -> ctypes.CDLL:
    """The library, with that line."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (folder / broken.source).read_text()
    assert text.count(broken.line) == 1, f"{broken.source} has this line {text.count(broken.line)} times"
    (folder / broken.source).write_text(text.replace(broken.line, broken.instead))
    compiler = runtime.cpp_compiler()
    assert compiler
    flags = [*build.FLAGS, "-O0", "-march=native", *(["-fopenmp"] if broken.name in build.OPENMP else [])]
    return build._load(compiler, flags, folder / f"{broken.name}.cpp")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future[ctypes.CDLL]]]:
    """All of them, made side by side, in a cache of their own."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("GROUNDLING_CACHE", str(folder / "cache"))
        yield [pool.submit(made, broken, folder / str(number)) for number, broken in enumerate(BROKEN)]


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[f"{each.source}:{each.line[:40]}" for each in BROKEN])
def test_a_broken_kernel_is_noticed(
    number: int, libraries: list[Future[ctypes.CDLL]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, library = BROKEN[number], libraries[number].result()
    broken.check()
    for module in (call, draw, decoding, updating):
        monkeypatch.setattr(module, "library", lambda name: library if name == broken.name else build.library(name))
    draw._native.cache_clear()
    try:
        with pytest.raises(AssertionError):
            broken.check()
    finally:
        draw._native.cache_clear()

"""The code for CPUs with AMX, as far as a CPU without it can tell: it compiles, and all but the unit's own instructions
computes what it should."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from groundling import runtime
from groundling.kernels import build

from . import test_head, test_products

SOURCES = Path(build.__file__).parent
UNIT = ("products", "head_products", "attention")


def compiler() -> str:
    found = runtime.cpp_compiler()
    assert found
    return found


@pytest.mark.parametrize("name", UNIT)
def test_it_compiles_for_the_unit(name: str, tmp_path: Path) -> None:
    flags = [flag for flag in build.FLAGS if flag != "-shared"]
    target = [*flags, "-O1", "-march=sapphirerapids", "-fopenmp", "-S", "-o", str(tmp_path / "unit.s")]
    known = subprocess.run([compiler(), "-march=sapphirerapids", "-E", "-x", "c++", "/dev/null"], capture_output=True)
    if known.returncode:
        pytest.skip("this compiler knows no CPU with a matrix unit")
    subprocess.run([compiler(), *target, str(SOURCES / f"{name}.cpp")], check=True)
    assert "tdpbf16ps" in (tmp_path / "unit.s").read_text()


@pytest.fixture(scope="module")
def wide_tiles() -> Iterator[None]:
    """Tiles in plain C++, and all that is around them as this CPU has it."""
    file = Path(__file__).with_name("wide_tiles.h")
    flags = ("-O1", f'-DGROUNDLING_TILES="{file}"', "-iquote", str(SOURCES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
        build.library.cache_clear()
        yield
    build.library.cache_clear()


@pytest.mark.usefixtures("wide_tiles")
def test_it_is_the_unit_that_is_used() -> None:
    assert [getattr(build.library(name), f"groundling_unit_of_{name}")() for name in UNIT] == [2, 2, 2]


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 31), (70, 600, 40), (3073, 33, 33), (130, 1030, 70)])
def test_products_of_a_layer(shape: tuple[int, int, int]) -> None:
    test_products.assert_weight_gradient(*shape)
    test_products.test_a_layer_and_the_gradient_of_its_input(shape)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("shape", [(1, 1), (31, 40), (201, 130), (290, 20), (70, 3100)])
def test_symmetric_products(shape: tuple[int, int]) -> None:
    test_products.assert_symmetric_product(*shape)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize(("length", "n_head", "width"), [(1, 1, 1), (65, 2, 48), (70, 1, 160), (300, 2, 33)])
def test_attention(length: int, n_head: int, width: int) -> None:
    test_products.assert_attention(length, n_head, width)


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize(("n_rows", "n_vocab", "rows_at_a_time"), [(1, 1, 80), (37, 513, 16), (70, 1100, 80)])
def test_the_head(n_rows: int, n_vocab: int, rows_at_a_time: int) -> None:
    sizes = {"n_rows": n_rows, "n_embd": 33, "n_vocab": n_vocab, "n_last": 3, "rows_at_a_time": rows_at_a_time}
    check = test_head.test_loss_and_gradients_are_the_formulas.hypothesis.inner_test  # type: ignore[attr-defined]
    check(**sizes, dtype=torch.bfloat16, unit=True, seed=0)

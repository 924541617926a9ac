"""CTranslate2 reads what is written for it, and what is written wrong is never left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.files import atomic_path
from groundling.interop import ctranslate2 as format_
from groundling.interop.trained import Trained
from groundling.interop.verification import VerificationFailed

from .conftest import N_TEXT, SHAPES, MakeTrained, keep_text
from .wrong import WRONGS


@pytest.mark.parametrize("shape", SHAPES)
def test_the_program_gives_our_tokens_and_logits(make_trained: MakeTrained, tmp_path: Path, shape: str) -> None:
    trained = make_trained(shape)
    format_.write(trained, tmp_path / "out", "float32")
    (line,) = format_.verify(trained, tmp_path / "out", "float32")
    assert "greedy tokens" in line
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.bin",
        "tokenizer.json",
        "vocabulary.json",
    }


def test_the_vocabulary_of_gpt2(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained("one", Tokenizer.gpt2())
    format_.write(trained, tmp_path / "out", "float32")
    assert list(format_.verify(trained, tmp_path / "out", "float32"))


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float16"])
def test_the_difference_of_the_loss_is_told(make_trained: MakeTrained, tmp_path: Path, precision: str) -> None:
    trained = keep_text(make_trained(), tmp_path)
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    format_.write(trained, tmp_path / "out", precision)
    (line,) = format_.verify(trained, tmp_path / "out", precision)
    assert f"in {precision} by CTranslate2" in line
    assert line.endswith(f"over all {N_TEXT - 1} predictions of the training text")
    difference = float(line.partition(" (")[2].partition(")")[0])
    assert abs(difference) < 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.model.state_dict().items())


@pytest.mark.parametrize("wrong", WRONGS)
def test_what_is_written_wrong_is_not_left_behind(
    make_trained: MakeTrained, tmp_path: Path, wrong: Callable[[Trained], Trained]
) -> None:
    with pytest.raises(VerificationFailed):
        export(make_trained(), wrong, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def export(trained: Trained, wrong: Callable[[Trained], Trained], target: Path) -> None:
    """Write what is wrong, as the command would."""
    with atomic_path(target) as partial:
        format_.write(wrong(trained), partial, "float32")
        list(format_.verify(trained, partial, "float32"))

"""Beginnings of lines: from the text, from lines' beginnings, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from groundling.corpus.beginnings import MAX_CHARS, line_beginnings
from groundling.corpus.plays import render_play
from groundling.corpus.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


def beginnings(text: str, tokenizer: Tokenizer, seed: int = 1, n_wanted: int = 3) -> tuple[str, ...]:
    return line_beginnings(np.array(tokenizer.encode(text), dtype=np.uint16), tokenizer, n_wanted, seed)


def test_each_is_the_beginning_of_a_line(gpt2: Tokenizer) -> None:
    text = render_play("hamlet")
    lines = {" ".join(line.split()) for line in text.splitlines()}
    found = beginnings(text, gpt2)
    assert len(set(found)) == 3
    assert next(line for line in text.splitlines() if line.strip()).strip().startswith(found[0])
    for seed in range(20):
        for beginning in beginnings(text, gpt2, seed):
            assert any(line.startswith(beginning) for line in lines), beginning
    assert found == beginnings(text, gpt2)
    assert found[0] == beginnings(text, gpt2, seed=2)[0]
    assert found[1:] != beginnings(text, gpt2, seed=2)[1:]


@pytest.mark.parametrize(
    ("text", "n_found"),
    [("one line without any end, as some texts are", 3), ("word", 1), ("清" * 500, 1), ("a\n" * 50, 1), ("...\n", 0)],
)
def test_odd_texts_give_what_they_have(gpt2: Tokenizer, text: str, n_found: int) -> None:
    found = beginnings(text, gpt2)
    assert len(found) >= min(n_found, 1)
    assert len(found) <= n_found
    assert all(0 < len(beginning) <= MAX_CHARS and "\ufffd" not in beginning for beginning in found)

"""Beginnings of a text's lines: what a model of that text can be asked to go on from.

Invariant: the same tokens and seed give the same beginnings.
"""

from __future__ import annotations

import numpy as np

from groundling.corpus.shards import Tokens
from groundling.corpus.tokenizer import END_OF_TEXT, Tokenizer

READ_TOKENS = 512
"""Read at each place: enough to meet a line's end in prose that is not wrapped."""
MAX_WORDS = 4
MAX_CHARS = 40
"""Where words are not told apart by spaces."""
TRIES = 50
"""Places looked at before fewer beginnings are given; a text may repeat a single line."""


def line_beginnings(tokens: Tokens, tokenizer: Tokenizer, n_wanted: int, seed: int) -> tuple[str, ...]:
    """The first words of the text's first line, then of lines at seeded places: `n_wanted` at most, no two equal."""
    generator = np.random.default_rng(seed)
    found: dict[str, None] = dict.fromkeys(_beginnings(_read(tokens, tokenizer, 0))[:1])
    for _ in range(TRIES):
        if len(found) >= n_wanted:
            break
        text = _read(tokens, tokenizer, int(generator.integers(len(tokens))))
        whole = text.partition("\n")[2] or text.partition(" ")[2]  # the place lies inside a line, or a word
        found.update(dict.fromkeys(_beginnings(whole)[:1]))
    return tuple(found)[:n_wanted]


def _read(tokens: Tokens, tokenizer: Tokenizer, start: int) -> str:
    text = tokenizer.decode(int(token) for token in tokens[start : start + READ_TOKENS])
    return text.replace(END_OF_TEXT, "\n").strip("\ufffd")  # a character cut in two at either end


def _beginnings(text: str) -> list[str]:
    """The first words of each line that has a letter or digit in them."""
    beginnings = (" ".join(line.split()[:MAX_WORDS])[:MAX_CHARS] for line in text.splitlines())
    return [beginning for beginning in beginnings if any(character.isalnum() for character in beginning)]

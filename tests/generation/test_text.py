from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.text import Writer

TOKENIZER = Tokenizer.gpt2()


def pieces(tokens: list[int], *stops: str) -> list[str]:
    writer = Writer(TOKENIZER, stops)
    written = []
    for n_left, token in reversed(list(enumerate(reversed(tokens)))):
        text, reason = writer.take(token, None if n_left else "length")
        written.append(text)
        if reason:
            assert writer.stopped == (reason == "stop")
            break
    return written


def test_pieces_are_whole_characters() -> None:
    """A character whose bytes are several tokens comes as one piece, as soon as its last byte is there."""
    text = "naïve 🙂 日本"
    tokens = TOKENIZER.encode(text)
    assert any("�" in TOKENIZER.decode([token]) for token in tokens)  # some tokens are part of a character
    assert "".join(pieces(tokens)) == text
    assert all("�" not in piece for piece in pieces(tokens))
    assert "".join(pieces([*tokens, TOKENIZER.end_of_text_id])) == text
    assert "".join(pieces(tokens[:-1])).endswith("�")  # cut inside a character


@given(
    text=st.text(alphabet="ab\n🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab\n🙂", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_its_first_stop_string(text: str, stops: list[str]) -> None:
    """Whatever the tokens: here each is a byte, so every stop string spans several of them."""
    tokens = [TOKENIZER.encode(chr(byte))[0] if byte < 128 else byte_token(byte) for byte in text.encode()]
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    written = pieces(tokens, *stops)
    # The stop string that is complete first ends the text; of several that are, the one that begins first.
    complete = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    expected = text
    if ends and complete is not None:
        expected = text[: min(text.find(stop) for stop in stops if 0 <= text.find(stop) <= complete - len(stop))]
    assert "".join(written) == expected


def byte_token(byte: int) -> int:
    return next(token for token in range(256) if TOKENIZER.decode_bytes([token]) == bytes([byte]))


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["Juliet"], "O Romeo, "),
        (["meo, Ju"], "O Ro"),
        (["x"], "O Romeo, Juliet"),
        (["Juliet!", "liet"], "O Romeo, Ju"),
    ],
)
def test_stop_strings_span_tokens(stops: list[str], expected: str) -> None:
    assert "".join(pieces(TOKENIZER.encode("O Romeo, Juliet"), *stops)) == expected


def test_what_may_begin_a_stop_string_waits() -> None:
    tokens = [byte_token(byte) for byte in b"a\n\nb\n"]
    assert pieces(tokens, "\n\n\n") == ["a", "", "", "\n\nb", "\n"]

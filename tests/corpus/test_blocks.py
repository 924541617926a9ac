"""Blocks: encoding them one by one is encoding the whole, and reading in pieces is reading the whole."""

import io
import sys
import unicodedata
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from groundling.corpus.blocks import BYTE_ORDER_MARK, PUNCTUATION, cut_blocks, read_text
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CorpusError

from .texts import ADVERSARIAL, CHINESE, texts

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


def pieces(text: str) -> list[str]:
    return [piece for piece, _ in GPT2_SPLIT.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("block_chars", [1, 2, 7, 64])
def test_blocks_encode_as_the_whole(gpt2, name, block_chars):
    text = ADVERSARIAL[name]
    blocks = list(cut_blocks([text], block_chars))
    assert "".join(blocks) == text
    assert list(chain.from_iterable(gpt2.encode_blocks(blocks))) == gpt2.encode(text)


@given(text=texts, block_chars=st.integers(1, 20))
def test_no_piece_is_cut(text, block_chars):
    blocks = list(cut_blocks([text], block_chars))
    assert "".join(blocks) == text
    assert list(chain.from_iterable(map(pieces, blocks))) == pieces(text)


@given(text=texts, block_chars=st.integers(1, 20), read_chars=st.integers(1, 30))
def test_cuts_depend_on_the_text_alone(text, block_chars, read_chars):
    parts = [text[begin : begin + read_chars] for begin in range(0, len(text), read_chars)]
    assert list(cut_blocks(parts, block_chars, 50)) == list(cut_blocks([text], block_chars, 50))


@given(text=texts, block_chars=st.integers(1, 20))
def test_blocks_are_bounded(text, block_chars):
    assert all(0 < len(block) <= 40 for block in cut_blocks([text], block_chars, 40))


def test_text_without_any_safe_place_is_cut_at_the_bound():
    assert [len(block) for block in cut_blocks(["x" * 1000], 10, 400)] == [400, 400, 200]


def test_blocks_are_small_again_after_a_stretch_without_safe_places():
    *_, last = cut_blocks(["x" * 100 + " word" * 100 + " end of the text"], 10, 400)
    assert len(last) <= 10


def test_text_without_spaces_is_cut_at_its_punctuation():
    assert max(len(block) for block in cut_blocks([CHINESE * 20], 64)) <= 64


# All of Unicode but surrogates, private and unassigned code points, none of which is a letter or white space.
CHARACTERS = [
    character
    for character in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(character) not in ("Cs", "Co", "Cn")
]


def count_pieces(texts: list[str]) -> int:
    return sum(len(pieces("".join(texts[begin : begin + 1000]))) for begin in range(0, len(texts), 1000))


def test_every_letter_of_python_is_a_letter_of_the_tokenizer():
    """Else a letter and the mark after it would be one piece, and the cut between them wrong."""
    letters = [character for character in CHARACTERS if character.isalpha()]
    assert count_pieces([f"{letter}.1" for letter in letters]) == 3 * len(letters)
    assert all(pieces(f"a{mark}1") == pieces("a") + pieces(mark) + pieces("1") for mark in PUNCTUATION)


def test_every_white_space_of_the_tokenizer_is_one_of_python():
    """Else a space after it would belong to the same piece, and the cut between them would be wrong."""
    others = [character for character in CHARACTERS if not character.isspace()]
    # Each is a piece, and so is each line feed between them; white space would join its neighbours.
    assert count_pieces([f"\n{other}" for other in others]) == 2 * len(others)


@given(text=texts, read_bytes=st.integers(1, 9))
def test_reading_in_pieces_reads_the_whole(text, read_bytes):
    written = text.replace("\0", "?")
    expected = written.removeprefix(BYTE_ORDER_MARK).replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read_text(io.BytesIO(written.encode()), "text", read_bytes=read_bytes)) == expected


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 4, 100])
def test_line_ends_and_byte_order_mark_are_normalised(read_bytes):
    file = io.BytesIO("\ufeffa\r\n\r\nb\rc\r".encode())
    assert "".join(read_text(file, "text", read_bytes=read_bytes)) == "a\n\nb\nc\n"


def test_a_range_is_read_and_its_byte_order_mark_kept():
    file = io.BytesIO("ab\ufeffcd".encode())
    assert "".join(read_text(file, "text", 2, 6)) == "\ufeffc"


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("content", "offset", "advice"),
    [
        ("Grüße".encode("latin-1"), 2, "look at what comes: iconv -f WINDOWS-1252"),
        ("aé".encode() + b"\xff", 3, "iconv -f WINDOWS-1252"),
        ("清".encode()[:2], 0, "iconv"),
        ("abc".encode("utf-16"), 0, "iconv -f UTF-16"),
        ("abc".encode("utf-16-le"), 1, "iconv -f UTF-16"),
        (b"text\0text", 4, "UTF-16"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_offset(content, offset, advice, read_bytes):
    with pytest.raises(CorpusError, match=rf"novel\.txt .*offset {offset}\b.*{advice}"):
        list(read_text(io.BytesIO(content), "novel.txt", read_bytes=read_bytes))

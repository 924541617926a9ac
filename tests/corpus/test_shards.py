"""Token files: llm.c's format and nanoGPT's read exactly, and nothing that only looks like them."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus.shards import TokenFile, make_header, token_dtype
from groundling.errors import CorpusError


def llm_c(magic: int, version: int, count: int, tokens: bytes) -> bytes:
    """A file as llm.c's data_common.py lays it out, spelled independently of our writer."""
    return struct.pack("<3i", magic, version, count) + bytes(1012) + tokens


def test_llm_c_files_of_gpt2(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(llm_c(20240520, 1, 3, struct.pack("<3H", 5, 50256, 65535)))
    assert TokenFile.open(path).tokens.tolist() == [5, 50256, 65535]
    assert TokenFile.open(path).n_tokens == 3
    assert TokenFile.open(path).max_token() == 65535


def test_llm_c_files_of_llama_3(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(llm_c(20240801, 7, 2, struct.pack("<2I", 70000, 128255)))
    assert TokenFile.open(path).tokens.tolist() == [70000, 128255]


def test_bare_files_of_nanogpt(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(struct.pack("<4H", 1, 2, 3, 50256))
    assert TokenFile.open(path).tokens.tolist() == [1, 2, 3, 50256]


@given(tokens=st.lists(st.integers(0, 65535), min_size=2, max_size=50), wide=st.booleans())
def test_our_header_is_theirs(tmp_path_factory, tokens, wide):
    array = np.array(tokens, dtype="<u4" if wide else "<u2")
    path = tmp_path_factory.mktemp("t") / "t.bin"
    header = make_header(array.dtype, len(tokens), "ab" * 32, "cd" * 32)
    assert struct.unpack("<3i", header[:12]) == ((20240801, 7) if wide else (20240520, 1)) + (len(tokens),)
    path.write_bytes(header + array.tobytes())
    assert TokenFile.open(path).tokens.tolist() == tokens


def test_the_mapping_cannot_be_written_to(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(struct.pack("<2H", 1, 2))
    with pytest.raises(ValueError, match="read-only"):
        TokenFile.open(path).tokens[0] = 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 tokens"),
        (b"\1", "odd number"),
        (b"\1\0", "1 tokens"),
        (b"\1\0\2\0\3", "odd number"),
        (llm_c(20240520, 1, 3, bytes(4)), "damaged"),
        (llm_c(20240520, 1, 3, bytes(8)), "damaged"),
        (llm_c(20240801, 7, 3, bytes(6)), "damaged"),
        (llm_c(20240520, 1, 3, bytes(6))[:100], "damaged"),
        (llm_c(20240520, 1, -1, b""), "damaged"),
        (llm_c(20240520, 1, 1, bytes(2)), "1 tokens"),
        (llm_c(20240520, 2, 3, bytes(6)), "version 2"),
        (llm_c(20240522, 1, 3, bytes(6)), "evaluation file"),
    ],
)
def test_what_is_not_a_whole_token_file_is_refused(tmp_path, content, words):
    path = tmp_path / "t.bin"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=words):
        TokenFile.open(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(CorpusError, match="not a regular file"):
        TokenFile.open(tmp_path / "pipe.bin")
    with pytest.raises(CorpusError, match="cannot be read"):
        TokenFile.open(tmp_path / "none.bin")


def test_the_tail_is_split_off(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(np.arange(100, dtype="<u2").tobytes())
    train, heldout = TokenFile.open(path).split(0.2)
    assert train.tokens.tolist() + heldout.tokens.tolist() == list(range(100))
    assert heldout.n_tokens == 20
    assert train.sha256() != heldout.sha256()
    for fraction in (0.001, 0.999, 1.5, float("nan"), 1e308):
        with pytest.raises(CorpusError, match="cannot be split"):
            TokenFile.open(path).split(fraction)


def test_the_type_is_the_smallest_that_fits():
    assert token_dtype(50_257) == token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32

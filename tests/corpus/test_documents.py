"""Documents and their split: whole texts or a tail, nothing lost, nothing on both sides."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus import documents
from groundling.corpus.documents import Document, split_heldout
from groundling.errors import CorpusError

from .texts import CHINESE, GERMAN, RUSSIAN


def text_of(document: Document) -> str:
    return "".join(document.blocks())


def in_memory(*texts: str) -> list[Document]:
    return [Document.from_text(f"text-{n}", lambda text=text: text) for n, text in enumerate(texts)]


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=8), fraction=st.floats(0.001, 0.999))
def test_whole_documents_are_held_out_from_the_end(sizes, fraction):
    whole = in_memory(*("x" * size for size in sizes))
    try:
        train, heldout = split_heldout(whole, fraction)
    except CorpusError:
        assert sizes[-1] > sum(sizes) / 2
        assert sizes[-1] > 2 * fraction * sum(sizes)
        return
    assert [*train, *heldout] == whole
    assert train
    assert heldout
    wanted = fraction * sum(sizes)
    chosen = abs(sum(document.n_bytes for document in heldout) - wanted)
    for count in range(1, len(sizes)):
        assert chosen <= abs(sum(sizes[-count:]) - wanted)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("text", [GERMAN * 20, RUSSIAN * 20])
def test_a_single_document_is_split_at_a_line(tmp_path, text, newline):
    path = tmp_path / "novel.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", newline).encode())
    (train,), (heldout,) = split_heldout([Document.from_file(path)], 0.25)
    assert text_of(train) + text_of(heldout) == text
    assert text_of(train).endswith("\n")
    assert heldout.n_bytes / len(text.encode()) == pytest.approx(0.25, abs=0.05)
    assert len({train.sha256, heldout.sha256, Document.from_file(path).sha256}) == 3


def test_without_lines_it_is_split_at_a_word_and_without_words_at_a_character():
    words = "word " * 100
    (train,), (heldout,) = split_heldout(in_memory(words), 0.3)
    assert text_of(train).endswith(" ")
    assert text_of(heldout).startswith("word")
    (train,), (heldout,) = split_heldout(in_memory(CHINESE * 9), 0.3)
    assert text_of(train) + text_of(heldout) == CHINESE * 9


def test_a_line_end_of_two_bytes_is_not_cut_in_two():
    (train,), (heldout,) = split_heldout(in_memory("abc def\r\n"), 0.2)
    assert (text_of(train), text_of(heldout)) == ("abc ", "def\n")


def test_a_last_document_that_is_nearly_everything_is_not_held_out():
    with pytest.raises(CorpusError, match="text-1, the last document, is 99% of the text"):
        split_heldout(in_memory("a preface " * 3, "word " * 500), 0.1)


def test_a_line_far_from_the_fraction_is_not_taken():
    """A title above a text without line ends was all that was left to train on."""
    (train,), (heldout,) = split_heldout(in_memory("My Novel\n" + "word " * 1000), 0.1)
    assert heldout.n_bytes / (train.n_bytes + heldout.n_bytes) == pytest.approx(0.1, abs=0.01)
    assert text_of(train).endswith("word ")


def test_lines_far_away_are_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SEARCH_BYTES", 50)
    (train,), _ = split_heldout(in_memory("a line\n" + "word " * 1000), 0.5)
    assert text_of(train).endswith("word ")


@given(text=st.text(alphabet="ab \n\rß清🎭", min_size=1, max_size=60), fraction=st.floats(0.001, 0.999))
def test_a_split_loses_nothing_and_leaves_text_on_both_sides(text, fraction):
    whole = in_memory(text)
    try:
        (train,), (heldout,) = split_heldout(whole, fraction)
    except CorpusError:
        return
    assert text_of(train) + text_of(heldout) == text_of(whole[0])
    assert text_of(train).strip()
    assert text_of(heldout).strip()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_fraction_outside_of_0_and_1_is_refused(fraction):
    with pytest.raises(CorpusError, match="between 0 and 1"):
        split_heldout(in_memory("a b c"), fraction)


@pytest.mark.parametrize("text", ["a", "a\n", "word \n \n"])
def test_a_split_without_text_on_a_side_is_refused(text):
    with pytest.raises(CorpusError, match="cannot be split"):
        split_heldout(in_memory(text), 0.5)


def test_the_sum_is_of_the_normalised_bytes(tmp_path):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(b"one\ntwo\n")
    marked.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    assert Document.from_file(plain).sha256 == Document.from_file(marked).sha256
    assert Document.from_file(marked).n_bytes == 8


def test_a_document_of_a_byte_order_mark_is_empty(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(CorpusError, match="is empty"):
        _ = Document.from_file(path).sha256


def test_a_file_that_vanishes_is_a_corpus_error(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("text")
    document = Document.from_file(Path(path))
    path.unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        list(document.blocks())

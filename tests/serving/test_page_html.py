"""What the page says of a text, and that it says nothing but that."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus.places import Place, Places
from groundling.corpus.tokenizer import Tokenizer
from groundling.evaluation.suffix_array import SuffixArray
from groundling.serving.copy_meter import CopyMeter, Measured, Passage, whole_percent
from groundling.serving.page_html import escape, following, texts, whole
from groundling.serving.page_html import tokens as tokens_html
from groundling.serving.page_routes import is_of_the_page
from groundling.serving.visitors import Looked, Written


@given(st.text())
def test_escaped_text_is_text(text: str) -> None:
    escaped = escape(text)
    assert not set(escaped) & set("<>\"'$`{}\\")
    shown = html.unescape(escaped)
    assert len(shown) == len(text)
    for letter, original in zip(shown, text, strict=True):
        assert letter == original or (letter == "\N{REPLACEMENT CHARACTER}" and not original.isprintable())


def meter(tokenizer: Tokenizer, training: str, minimum: int) -> CopyMeter:
    tokens = np.array(tokenizer.encode(training), dtype=np.uint16)
    return CopyMeter(SuffixArray.build(tokens), Places(tokens, tokenizer, ["b.txt"]), tokenizer, minimum)


words = st.lists(st.sampled_from(["ten ", "green ", "bottles\n", "<b>", "é", "\N{GRINNING FACE}"]), max_size=30)


@given(words, words, st.integers(1, 6))
def test_the_pieces_are_the_text_and_the_marked_ones_are_copied(
    tokenizer: Tokenizer, trained_on: list[str], wrote: list[str], minimum: int
) -> None:
    training, text = "a" + "".join(trained_on), "".join(wrote)
    tokens = tokenizer.encode(text)
    found = meter(tokenizer, training, minimum).measure(tokens)
    assert "".join(piece for piece, _ in found.pieces) == text
    for passage in found.passages:
        assert passage.length >= minimum
        if "\N{REPLACEMENT CHARACTER}" not in passage.text:
            assert passage.text in training
    assert (found.share > 0) == bool(found.passages)
    shown = texts([Written([], 1, tokens, "length")], [found], tokenizer, "")
    written = re.sub(r'<span class="tip".*?</span>', "", shown.partition("<aside")[0])
    assert html.unescape(re.sub(r"<[^>]*>", "", written)) == text


@given(words, st.integers(0, 200))
def test_a_text_that_grows_is_shown_in_whole_characters(tokenizer: Tokenizer, wrote: list[str], n_tokens: int) -> None:
    text = "".join(wrote)
    tokens = tokenizer.encode(text)[:n_tokens]
    shown = tokenizer.decode(whole(Written([], 1, tokens), tokenizer))
    assert text.startswith(shown)
    assert len(tokenizer.decode_bytes(tokens)) - len(shown.encode()) < 4
    assert whole(Written([], 1, tokens, "length"), tokenizer) == tokens


def test_where_passages_overlap_the_longest_has_the_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcdefgh")
    tokens = np.array([*ids[:5], 5, *ids[3:], 6], dtype=np.uint16)
    found = CopyMeter(SuffixArray.build(tokens), Places(tokens, tokenizer, ["b"]), tokenizer, 2).measure(ids)
    lengths = [(piece, passage.length) for piece, passage in found.pieces if passage]
    assert lengths == [("abc", 5), ("defgh", 5)] or lengths == [("abcde", 5), ("fgh", 5)]


def passage(text: str, scene: str, count: int = 1) -> tuple[str, Passage]:
    return text, Passage(text, 20, count, Place("coriolanus", 3, "Coriolanus", "Act 1", scene, "MENENIUS"))


@pytest.mark.parametrize(
    ("pieces", "share", "says"),
    [
        (
            [passage("x" * 83, "Scene 1"), ("rest", None)],
            0.83,
            "83 % of this is verbatim from Coriolanus, Act 1, Scene 1.",
        ),
        (
            [passage("x" * 30, "Scene 1"), passage("x" * 10, "Scene 2")],
            0.999,
            "99 % of this is verbatim from the training text, 75 % of that from Coriolanus, Act 1, Scene 1.",
        ),
        ([("rest", None)], 0.0, "Nothing of this stands in the training text in passages of 12 tokens or more."),
        ([passage("all", "Scene 1")], 1.0, "100 % of this is verbatim from Coriolanus, Act 1, Scene 1."),
    ],
)
def test_the_sentence(pieces: list[tuple[str, Passage | None]], share: float, says: str) -> None:
    assert Measured(tuple(pieces), share, 100, 12).sentence.replace("\N{NO-BREAK SPACE}", " ") == says
    assert Measured((), 0.0, 0, 12).sentence == "Nothing was written."


def test_how_often_a_passage_stands_elsewhere() -> None:
    wheres = [passage("x", "Scene 1", count)[1].where for count in (1, 2, 1003)]
    place = "Coriolanus, Act 1, Scene 1 (MENENIUS)"
    assert wheres == [place, f"{place}, and in 1 more place", f"{place}, and in 1,002 more places"]


def test_a_share_is_whole_only_if_it_is() -> None:
    shares = [whole_percent(share).replace("\N{NO-BREAK SPACE}", " ") for share in (0, 0.0001, 0.5, 0.9999, 1)]
    assert shares == ["0 %", "1 %", "50 %", "99 %", "100 %"]


def test_the_beginning_of_a_text_is_no_token_to_read(tokenizer: Tokenizer) -> None:
    """Where a prompt is empty, the model has read an `<|endoftext|>`, which nobody wrote."""
    end, ten = tokenizer.end_of_text_id, tokenizer.encode("ten")
    assert "<h3>At the beginning of a text</h3>" in following(Looked([end], [], ((ten[0], -0.1),)), tokenizer)
    shown = following(Looked([end, *ten], [], ((end, -0.1),)), tokenizer)
    assert "<h3>After <q>ten</q></h3>" in shown
    assert "(end of text)" in shown
    assert "endoftext" not in shown + tokens_html(Looked([end, *ten], [], ()), tokenizer, n_prompt=1)


def test_without_a_training_text_a_sentence_says_so(tokenizer: Tokenizer) -> None:
    written = Written(tokenizer.encode("ten"), 1, tokenizer.encode(" green"), "length")
    shown = texts([written], [None], tokenizer, "There is <no> meter.")
    assert "There is &lt;no&gt; meter." in shown
    assert "Copy meter" not in shown


@given(st.text(alphabet="/.%abgradio_=\\:", max_size=40))
def test_no_path_with_dots_or_signs_is_the_pages(path: str) -> None:
    for root in ("", "/assets/", "/static/", "/gradio_api/", "/gradio_api/file="):
        if is_of_the_page("GET", root + path):
            assert ".." not in path
            assert not set(path) & set("%=\\:")

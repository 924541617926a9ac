"""llama.cpp reads what is written for it, and what is written wrong is never left behind."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies
from torch import Tensor

from groundling import kernels
from groundling.corpus.documents import Document
from groundling.corpus.tokenizer import Tokenizer, train_tokenizer
from groundling.errors import ConfigError, RunFailed
from groundling.files import atomic_path
from groundling.interop import gguf as format_
from groundling.interop.llama_server import LlamaCpp
from groundling.interop.trained import Trained
from groundling.interop.verification import VerificationFailed

from .conftest import N_TEXT, SHAPES, TEXT, MakeTrained, keep_text
from .wrong import WRONGS

TEXTS = [
    TEXT,
    "",
    " ",
    "a",
    "\n\n \n  \n   x   \n",
    "tab\tand  two\t\ttabs, carriage\r\nreturn\r",
    "I'm you're he's we've they'll I'd don't DON'T I'M 'tis 's 'S ''s",
    "1 12 123 1234 12345 3.14 1,000,000 x1 1x ²½ Ⅷ ٣",
    "ÄÖÜäöüß naïve coöperate e\u0301 \u00a0nbsp\u2003em\u200bzero",
    "日本語のテキスト 한국어 العربية עברית ελληνικά हिन्दी",
    "🍾 👩‍👩‍👧 🏳️‍🌈🎭!? ... —\u2013 «» “q” \u2018q\u2019 'q'",
    "!!!???...,,,;;;:::---___***###$$$%%%&&&(((",
    "<|endoftext", "<s></s>[INST] <|im_start|>",
]  # fmt: skip
"""What tokenizers of one kind differ in."""


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def llama(
    request: pytest.FixtureRequest, make_trained: MakeTrained, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Trained, LlamaCpp]]:
    """llama.cpp with a random network, once for each tokenizer."""
    trained = make_trained("one", Tokenizer.gpt2() if request.param == "gpt2" else None)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    format_.write(trained, path, "f32")
    with LlamaCpp.reading(path, trained.model.config.n_ctx, threads=1, exact=True) as program:
        yield trained, program


@pytest.mark.parametrize("text", TEXTS)
def test_texts_become_the_same_tokens(llama: tuple[Trained, LlamaCpp], text: str) -> None:
    trained, program = llama
    assert program.tokenize(text) == trained.tokenizer.encode(text)


@settings(max_examples=60, deadline=None)
@given(text=strategies.text(max_size=60))
def test_any_text_becomes_the_same_tokens(llama: tuple[Trained, LlamaCpp], text: str) -> None:
    trained, program = llama
    assert program.tokenize(text) == trained.tokenizer.encode(text)


def test_a_prompt_of_text_is_continued_as_its_tokens(llama: tuple[Trained, LlamaCpp]) -> None:
    trained, program = llama
    text = "it's ü\n\n 12"
    assert program.greedy(text, 5) == program.greedy(trained.tokenizer.encode(text), 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_program_gives_our_tokens_and_logits(make_trained: MakeTrained, tmp_path: Path, shape: str) -> None:
    trained = keep_text(make_trained(shape), tmp_path / "run")
    format_.write(trained, tmp_path / "out.gguf", "f32")
    tensors, tokens, logits = format_.verify(trained, tmp_path / "out.gguf", "f32")
    n_tensors = len(trained.model.state_dict()) - 1
    assert tensors == f"all {n_tensors} tensors are ours ({n_tensors} in f32)"
    assert "the same" in tokens
    assert "greedy tokens" in logits


def test_a_network_of_large_logits_is_no_other(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained()
    with torch.no_grad():
        trained.model.transformer.ln_f.weight.mul_(50)  # llama.cpp's table of GELU now makes a visible difference
    format_.write(trained, tmp_path / "out.gguf", "f32")
    *_, line = format_.verify(trained, tmp_path / "out.gguf", "f32")
    assert float(line.split()[-1]) > format_.LLAMA_TOLERANCE


def test_gelus_table_rounds_what_it_reads_and_what_it_gives(
    make_trained: MakeTrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = make_trained()
    with torch.no_grad():
        trained.model.transformer.ln_f.weight.mul_(50)
    probe, tolerance = format_._probe(trained)

    def through_table(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias).half().float(), approximate="tanh").half().float()

    monkeypatch.setattr(kernels, "linear_gelu", through_table)  # no value here is beyond the table's end
    with torch.inference_mode():
        logits = trained.model.logits(trained.model.hidden(torch.tensor([probe.window])))[0]
    expected = format_.TABLE_SAFETY * float((logits - probe.logits).abs().max())
    assert tolerance == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0", "q4_0"])
def test_the_difference_of_the_loss_is_told(make_trained: MakeTrained, tmp_path: Path, precision: str) -> None:
    trained = keep_text(make_trained("odd"), tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    format_.write(trained, tmp_path / "out.gguf", precision)
    *_, line = format_.verify(trained, tmp_path / "out.gguf", precision)
    assert f"in {precision} by llama.cpp up to the head (" in line
    assert line.endswith(f"over all {N_TEXT - 1} predictions of the training text")
    difference = float(line.partition(" (")[2].partition(")")[0])
    assert abs(difference) < {"f16": 0.01, "bf16": 0.05, "q8_0": 0.3, "q4_0": 2.0}[precision]
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.model.state_dict().items())


@pytest.mark.parametrize("precision", format_.PRECISIONS)
def test_without_the_program_the_file_is_read_back(
    make_trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trained = keep_text(make_trained(), tmp_path / "run")
    format_.write(trained, tmp_path / "out.gguf", precision)
    lines = list(format_.verify(trained, tmp_path / "out.gguf", precision))
    assert "did not read it" in lines[1]
    assert ["put into our own network" in line for line in lines[2:]] == [True] * (precision != "f32")


@pytest.mark.parametrize(("precision", "kinds"), [("q8_0", {"F32", "F16", "Q8_0"}), ("q4_0", {"F32", "F16", "Q4_0"})])
def test_rows_of_no_whole_blocks_are_kept_in_fp16(
    make_trained: MakeTrained, tmp_path: Path, precision: str, kinds: set[str]
) -> None:
    trained = make_trained("ragged")
    format_.write(trained, tmp_path / "out.gguf", precision)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == kinds  # ffn_down alone has rows of 4 * 24
    assert "in f16" in next(iter(format_.verify(trained, tmp_path / "out.gguf", precision)))


def test_a_file_says_what_it_is(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained()
    format_.write(trained, tmp_path / "out.gguf", "q4_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.name"] == "bottles"
    assert "Groundling" in facts["general.description"]
    assert facts["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert facts["gpt2.context_length"] == trained.model.config.n_ctx
    end = facts["tokenizer.ggml.eos_token_id"]
    assert facts["tokenizer.ggml.tokens"][end] == "<|endoftext|>"
    assert facts["tokenizer.ggml.token_type"][end] == gguf.TokenType.CONTROL
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["position_embd.weight"] == "F32"


@pytest.mark.parametrize("precision", format_.PRECISIONS)
@pytest.mark.parametrize("wrong", WRONGS)
def test_what_is_written_wrong_is_not_left_behind(
    make_trained: MakeTrained, tmp_path: Path, wrong: Callable[[Trained], Trained], precision: str
) -> None:
    with pytest.raises(VerificationFailed, match="reads another"):
        export(make_trained(), wrong, tmp_path / "out.gguf", precision)
    assert list(tmp_path.iterdir()) == []


def test_the_program_itself_refuses_what_is_written_wrong(
    make_trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_, "_check_tensors", lambda *_: "not looked at")
    with pytest.raises(VerificationFailed, match=r"llama\.cpp"):
        export(make_trained(), WRONGS[0], tmp_path / "out.gguf", "f32")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_a_format_are_refused(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained()
    with torch.no_grad():
        trained.model.transformer.wte.weight[3, 5] = 1e5
    with pytest.raises(ConfigError, match="--quant f32 or bf16"):
        format_.write(trained, tmp_path / "out.gguf", "f16")


def test_a_tokenizer_without_merges_is_refused(make_trained: MakeTrained, tmp_path: Path) -> None:
    """llama.cpp cannot load its file."""
    bytes_alone = train_tokenizer([Document.from_text("text", lambda: TEXT)], 257)
    assert not bytes_alone.merges
    with pytest.raises(ConfigError, match="without merges"):
        format_.write(make_trained(own=bytes_alone), tmp_path / "model.gguf", "f32")


def test_hidden_states_may_be_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has null for them."""
    monkeypatch.setattr(LlamaCpp, "_post", lambda *_: [{"embedding": [[1.0, None]]}])
    assert math.isnan(LlamaCpp("", io.BytesIO()).hidden([0])[0][1])


def test_a_file_that_is_cut_off_is_one_sentence(make_trained: MakeTrained, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    format_.write(make_trained(), path, "f32")
    path.write_bytes(path.read_bytes()[:-5000])
    with (
        pytest.raises(RunFailed, match=r"cannot load .* (not within|corrupted)"),
        LlamaCpp.reading(path, 24, threads=1, exact=True),
    ):
        pass


def test_a_request_that_is_refused_is_one_sentence(make_trained: MakeTrained, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    format_.write(make_trained(), path, "f32")
    with LlamaCpp.reading(path, 24, threads=1, exact=True) as program:
        with pytest.raises(RunFailed, match="invalid tokens"):
            program.hidden([10**6])
        assert program.greedy([1, 2], 3)


def export(trained: Trained, wrong: Callable[[Trained], Trained], target: Path, precision: str) -> None:
    """Write what is wrong, as the command would."""
    with atomic_path(target) as partial:
        format_.write(wrong(trained), partial, precision)
        list(format_.verify(trained, partial, precision))

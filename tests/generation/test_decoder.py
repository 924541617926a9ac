"""Both decoders keep one law: logits are those of a fresh pass over the sequence, however it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundling.generation.decoder import Chunk, Decoder, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.generation.open import open_decoder
from groundling.kernels.build import BuildError, library
from groundling.model.formats import WEIGHT_FORMATS, WeightFormat, round_weights
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import Runtime

N_WINDOW = 40


def odd_network(seed: int = 0, **sizes: int) -> GPT2:
    """A network in which nothing is a multiple of a vector, and no bias is zero."""
    torch.manual_seed(seed)
    model = GPT2(GPTConfig(**{"n_layer": 2, "n_head": 3, "n_embd": 33, "n_ctx": N_WINDOW, "n_vocab": 71, **sizes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def fresh(model: GPT2, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([tokens])))[0]


def torch_decoder(model: GPT2, n_slots: int) -> Decoder:
    return TorchDecoder(model, N_WINDOW, n_slots)


def native_decoder(model: GPT2, n_slots: int) -> Decoder:
    return NativeDecoder(model, N_WINDOW, n_slots, "fp32", 2)


both = pytest.mark.parametrize("decoder_of", [torch_decoder, native_decoder])
Opener = Callable[[GPT2, int], Decoder]


@both
@settings(max_examples=30, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=12))
def test_however_it_is_read_it_is_the_fresh_pass(decoder_of: Opener, plan: list[tuple[int, int, int]]) -> None:
    """Several sequences at a time, in pieces of any length, some of it forgotten again."""
    model = odd_network()
    generator = torch.Generator().manual_seed(len(plan))
    held: list[list[int]] = [[], [], []]
    with decoder_of(model, 3) as decoder:
        while plan:
            chunks: list[Chunk] = []
            while plan and plan[0][0] not in [chunk.slot for chunk in chunks]:
                slot, n, n_forgotten = plan.pop(0)
                keep = max(0, min(len(held[slot]) - n_forgotten, N_WINDOW - n))
                del held[slot][keep:]
                decoder.rewind(slot, keep)
                new = torch.randint(71, (n,), generator=generator).tolist()
                held[slot] += new
                chunks.append(Chunk(slot, new, min(n, 1 + n_forgotten)))
            for chunk, logits in zip(chunks, decoder.read(chunks), strict=True):
                assert decoder.length(chunk.slot) == len(held[chunk.slot])
                expected = fresh(model, held[chunk.slot])[-chunk.n_outputs :]
                torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_native_logits_do_not_depend_on_company_to_the_last_bit(form: WeightFormat) -> None:
    """Alone, token by token, in one piece, among others, with any number of threads: the same bits."""
    model = odd_network(n_embd=213)  # 852 inputs of a matrix: more than a block
    text = torch.randint(71, (N_WINDOW,)).tolist()
    with NativeDecoder(model, N_WINDOW, 4, form, 1) as decoder:
        expected = torch.cat([decoder.read([Chunk(0, [token])])[0].clone() for token in text])
    for n_threads in (1, 2, 3):
        with NativeDecoder(model, N_WINDOW, 4, form, n_threads) as decoder:
            assert torch.equal(decoder.read([Chunk(1, text, N_WINDOW)])[0], expected)
            decoder.rewind(1, 0)
            for n in (3, 5, 1, 14, 2, 15):
                at = decoder.length(1)
                others = [Chunk(slot, text[:n], 1) for slot in (0, 2, 3)]
                found = decoder.read([others[0], Chunk(1, text[at : at + n], n), *others[1:]])[1]
                assert torch.equal(found, expected[at : at + n])
                for slot in (0, 2, 3):
                    decoder.rewind(slot, 0)


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize(("form", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.02)])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_head": 1, "n_embd": 5},
        {"n_head": 2, "n_embd": 128, "n_vocab": 300},
        {"n_head": 4, "n_embd": 260, "n_layer": 1},
        {"n_head": 5, "n_embd": 800, "n_layer": 1},
    ],
)
def test_native_formats_are_the_rounded_network(form: WeightFormat, tolerance: float, sizes: dict[str, int]) -> None:
    """With bf16 and int8 weights, keys and values are kept in bf16, so those agree less closely."""
    model = odd_network(**sizes)
    text = torch.randint(model.config.n_vocab, (N_WINDOW,)).tolist()
    with NativeDecoder(model, N_WINDOW, 1, form, 2) as decoder:
        found = decoder.read([Chunk(0, text, N_WINDOW)])[0]
        round_weights(model, form)
        expected = fresh(model, text)
        assert float((found - expected).abs().max() / expected.std()) < tolerance


@pytest.mark.parametrize("value", [2.3, 333.3, 9999.7])
def test_a_constant_row_normalised_is_nothing(value: float) -> None:
    """What a rounded mean leaves of it would be taken 316 times, the inverse root of LayerNorm's epsilon."""
    model = odd_network(n_embd=769, n_head=1)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for parameter, constant in ((model.head_weight, 1.0), (model.transformer.wpe.weight, value)):
        torch.nn.init.constant_(parameter, constant)
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    with native_decoder(model, 1) as decoder:
        assert not decoder.read([Chunk(0, [5, 7, 11], 3)])[0].any()


@both
@pytest.mark.parametrize("token", [71, -1])
def test_a_token_that_the_network_does_not_have_is_refused(decoder_of: Opener, token: int) -> None:
    with decoder_of(odd_network(), 2) as decoder:
        with pytest.raises(IndexError):
            decoder.read([Chunk(0, [1, 2], 1), Chunk(1, [3, token], 1)])
        assert (decoder.length(0), decoder.length(1)) == (0, 0)


def test_a_long_prompt_is_read_in_several_passes() -> None:
    model = odd_network(n_ctx=600)
    text = torch.randint(71, (600,)).tolist()
    with NativeDecoder(model, 600, 2, "fp32", 2) as decoder:
        found = decoder.read([Chunk(0, text, 5), Chunk(1, text[:9], 1)])
        torch.testing.assert_close(found[0], fresh(model, text)[-5:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], fresh(model, text[:9])[-1:], rtol=1e-4, atol=1e-4)


def test_pytorch_has_its_threads_back() -> None:
    before = torch.get_num_threads()
    with NativeDecoder(odd_network(), N_WINDOW, 1, "fp32", 2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_there_is_one_sentence() -> None:
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        library("decode")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_without_a_compiler_pytorch_decodes(form: WeightFormat, cpu: Runtime) -> None:
    """After one warning, with the weights that were asked for, and without touching the model's own."""
    model = odd_network()
    before, warnings = model.head_weight.clone(), list[str]()
    text = torch.randint(71, (N_WINDOW,)).tolist()
    with open_decoder(model, N_WINDOW, cpu, form, 1, warnings.append) as decoder:
        found = decoder.read([Chunk(0, text, N_WINDOW)])[0]
    assert isinstance(decoder, TorchDecoder)
    assert len(warnings) == 1
    assert torch.equal(model.head_weight, before)
    round_weights(model, form)
    torch.testing.assert_close(found, fresh(model, text), rtol=1e-5, atol=1e-5)


def test_a_cache_folder_that_cannot_be_used_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GROUNDLING_CACHE", str(tmp_path / "file"))
    library.cache_clear()
    try:
        with pytest.raises(BuildError, match="cannot be made or loaded"):
            library("decode")
    finally:
        library.cache_clear()


def test_decoders_may_be_closed_in_any_order() -> None:
    before = torch.get_num_threads()
    first, second = (NativeDecoder(odd_network(), N_WINDOW, 1, "fp32", 1) for _ in range(2))
    first.close()
    assert torch.get_num_threads() == 1
    second.close()
    assert torch.get_num_threads() == before

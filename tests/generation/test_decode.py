from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation import decode
from groundling.generation.decode import Context, continue_text, generate
from groundling.generation.sampling import SamplingConfig
from groundling.model.gpt2 import GPT2, GPTConfig

GREEDY = SamplingConfig(max_tokens=8, temperature=0)


def uncached(model: GPT2, window: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(torch.tensor([window])))[0, -1]


def test_greedy_decoding_is_the_argmax_without_a_cache(model: GPT2) -> None:
    tokens = [1, 2, 3]
    for token in generate(model, [1, 2, 3], GREEDY):
        assert token == int(uncached(model, tokens).argmax())
        tokens.append(token)
    assert len(tokens) == 11


def test_the_window_slides_past_n_ctx(model: GPT2) -> None:
    """n_ctx is 16: after 16 positions the last 8 are read anew, and the logits are those of that window."""
    context = Context(model, [5])
    for n_read in range(2, 40):
        logits = context.append(n_read % 31)
        n_window = n_read if n_read <= 16 else 8 + (n_read - 17) % 9
        torch.testing.assert_close(logits, uncached(model, context.tokens[-n_window:]), rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_read_from_its_end(model: GPT2) -> None:
    prompt = [n % 31 for n in range(50)]
    torch.testing.assert_close(Context(model, prompt).logits, uncached(model, prompt[-16:]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Context(model, prompt, 6).logits, uncached(model, prompt[-6:]), rtol=1e-5, atol=1e-5)


def test_a_seed_repeats_and_another_differs(model: GPT2) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(model, [1], SamplingConfig(max_tokens=20, temperature=1.0, top_k=0, seed=seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_pieces_are_whole_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character whose bytes are several tokens comes as one piece, as soon as its last byte is there."""
    tokenizer = Tokenizer.gpt2()
    text = "naïve 🙂 日本"
    ids = [tokenizer.encode(character)[0] if character.isascii() else None for character in text]
    assert None in ids  # the text has characters of several tokens
    tokens = tokenizer.encode(text)
    monkeypatch.setattr(decode, "generate", lambda *_: iter(tokens))
    model = GPT2(GPTConfig(n_layer=1, n_head=1, n_embd=4, n_ctx=4, n_vocab=8))
    pieces = list(continue_text(model, tokenizer, "x", SamplingConfig()))
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces)
    monkeypatch.setattr(decode, "generate", lambda *_: iter([*tokens, tokenizer.end_of_text_id, *tokens]))
    assert "".join(continue_text(model, tokenizer, "x", SamplingConfig())) == text

from __future__ import annotations

from collections.abc import Sequence

import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.decode import Context, as_text, generate
from groundling.generation.sampling import SamplingConfig
from groundling.model.gpt2 import GPT2

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


def test_pieces_are_whole_characters() -> None:
    """A character whose bytes are several tokens comes as one piece, as soon as its last byte is there."""
    tokenizer = Tokenizer.gpt2()
    text = "naïve 🙂 日本"
    tokens = tokenizer.encode(text)
    assert any("�" in tokenizer.decode([token]) for token in tokens)  # some tokens are part of a character
    pieces = list(as_text(tokens, tokenizer))
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces)
    assert "".join(as_text([*tokens, tokenizer.end_of_text_id, *tokens], tokenizer)) == text
    assert "".join(as_text(tokens[:-1], tokenizer)).endswith("�")  # cut inside a character

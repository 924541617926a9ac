"""Models that no export may take for another: every parameter random, biases too, sizes odd, tokenizers trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from groundling.corpus.documents import Document
from groundling.corpus.tokenizer import Tokenizer, train_tokenizer
from groundling.interop.trained import Trained
from groundling.model.gpt2 import GPT2, GPTConfig

TEXT = "".join(f"{n} grüne Flaschen 🍾 hanging on the wall;\n\nif one should fall, it's {n - 1}.\n" for n in range(60))

SHAPES = {
    "small": GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=24),
    "odd": GPTConfig(n_layer=3, n_head=3, n_embd=96, n_ctx=17),
    "one": GPTConfig(n_layer=1, n_head=1, n_embd=64, n_ctx=33),
}
"""Without their vocabularies, which are a tokenizer's; llama.cpp's Q8_0 and Q4_0 need rows that 32 divides."""

MakeTrained = Callable[..., Trained]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One of 301 ids, an odd number."""
    return train_tokenizer([Document.from_text("bottles", lambda: TEXT)], 301)


def random_network(config: GPTConfig, seed: int = 0) -> GPT2:
    """A network whose logits differ clearly from token to token."""
    torch.manual_seed(seed)
    model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    return model.eval()


@pytest.fixture(scope="session")
def make_trained(tokenizer: Tokenizer) -> MakeTrained:
    """Makes a `Trained` of one of the SHAPES; with the small tokenizer unless another is given."""

    def make(shape: str = "small", own: Tokenizer | None = None, seed: int = 0) -> Trained:
        used, size = own or tokenizer, SHAPES[shape]
        config = GPTConfig(size.n_layer, size.n_head, size.n_embd, size.n_ctx, used.n_vocab)
        return Trained(random_network(config, seed), used, config.n_ctx, "bottles")

    return make

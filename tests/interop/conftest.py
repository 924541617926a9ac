"""Models that no export may take for another: every parameter random, biases too, sizes odd, tokenizers trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from groundling.corpus.documents import Document
from groundling.corpus.shards import make_header, token_dtype
from groundling.corpus.tokenizer import Tokenizer, train_tokenizer
from groundling.interop.trained import Trained
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.training.run_folder import RunFolder

TEXT = "".join(f"{n} grüne Flaschen 🍾 hanging on the wall;\n\nif one should fall, it's {n - 1}.\n" for n in range(60))

SHAPES = {
    "small": GPTConfig(n_layer=2, n_head=2, n_embd=32, n_ctx=24),
    "odd": GPTConfig(n_layer=3, n_head=3, n_embd=96, n_ctx=17),
    "one": GPTConfig(n_layer=1, n_head=1, n_embd=64, n_ctx=33),
}
"""Without their vocabularies, which are a tokenizer's; llama.cpp's Q8_0 and Q4_0 need rows that 32 divides."""

RAGGED = GPTConfig(n_layer=1, n_head=2, n_embd=24, n_ctx=16)
"""Rows that 32 does not divide, but for those of 4 * n_embd."""

N_TEXT = 100
"""Tokens of the text that `keep_text` gives a run: some windows of every shape, the last one short."""

MakeTrained = Callable[..., Trained]


@pytest.fixture(scope="module", autouse=True)
def no_wait_for_the_disk(unsynced: None) -> None:
    pass


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
    """Makes a `Trained` of one of the SHAPES, or `ragged`; with the small tokenizer unless another is given."""

    def make(shape: str = "small", own: Tokenizer | None = None, seed: int = 0) -> Trained:
        used, size = own or tokenizer, RAGGED if shape == "ragged" else SHAPES[shape]
        config = GPTConfig(size.n_layer, size.n_head, size.n_embd, size.n_ctx, used.n_vocab)
        return Trained(random_network(config, seed), used, config.n_ctx, "bottles")

    return make


def keep_text(trained: Trained, folder: Path) -> Trained:
    """The same model as of a run in `folder`, which has a training text of N_TEXT tokens."""
    tokens = np.array(trained.tokenizer.encode(TEXT)[:N_TEXT], dtype=token_dtype(trained.tokenizer.n_vocab))
    folder.mkdir(parents=True, exist_ok=True)
    header = make_header(tokens.dtype, len(tokens), "0" * 64, hashlib.sha256(tokens.tobytes()).hexdigest())
    (folder / "train.bin").write_bytes(header + tokens.tobytes())
    return replace(trained, folder=RunFolder(folder))

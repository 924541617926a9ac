"""What many tests share: a network small enough to train in a blink, and tokens to train it on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.runtime import Runtime


@pytest.fixture
def cpu() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, torch.get_num_threads(), compile=False, reasons=())


@pytest.fixture
def tiny() -> GPTConfig:
    return GPTConfig(n_layer=2, n_head=2, n_embd=16, n_ctx=16, n_vocab=31)


@pytest.fixture
def model(tiny: GPTConfig) -> GPT2:
    torch.manual_seed(0)
    return GPT2(tiny)


@pytest.fixture
def tokens(tiny: GPTConfig) -> NDArray[np.uint16]:
    """203 tokens: no multiple of any window or batch in these tests."""
    return np.random.default_rng(0).integers(tiny.n_vocab, size=203).astype(np.uint16)

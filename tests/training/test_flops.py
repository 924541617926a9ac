"""What training costs, against PyTorch's own count and by hand; all shares of the matrix ceiling hang on it."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.training.flops import flops_per_token


def test_the_flop_of_a_token_are_those_that_pytorch_counts() -> None:
    """It counts attention's products in full, of which a causal one needs half."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=48, n_vocab=101)
    model, (n_windows, window) = GPT2(config), (3, 32)
    ids = torch.randint(101, (n_windows, window + 1), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model.loss_sum(ids[:, :-1], ids[:, 1:]).backward()
    masked = 6 * config.n_layer * config.n_embd * window
    assert counted.get_total_flops() == n_windows * window * (flops_per_token(config, window) + masked)


def test_the_flop_of_the_large_model() -> None:
    """By hand: six of each parameter but positions, biases and LayerNorm's, and 6 x 12 x 768 x 256 of attention."""
    one_by_one = 12 * (3 + 1 + 4 + 1 + 4) * 768 + 2 * 768
    in_products = 124_439_808 - 1024 * 768 - one_by_one
    assert flops_per_token(GPTConfig(), 256) == 6 * in_products + 6 * 12 * 768 * 256 == 755_347_968

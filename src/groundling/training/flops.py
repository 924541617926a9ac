"""What training costs in matrix FLOP: of a token, of a step's network and of its update.

Invariant: a figure is of the operations that are needed, however they are computed; what is no matrix product is not
counted.
"""

from __future__ import annotations

from groundling.corpus.windows import WindowConfig
from groundling.model.gpt2 import GPTConfig
from groundling.optim.muon import orthogonal_flops
from groundling.optim.optimizer import OptimConfig


def flops_per_token(config: GPTConfig, window: float) -> float:
    """Matrix FLOP that training spends on a token: 6 for each parameter in a product, and causal attention.

    Source: Kaplan et al. 2020, table 1, for 2 + 4 FLOP a parameter; attention reads T/2 keys on average. Positions are
    looked up, biases and LayerNorm's parameters added or multiplied one by one: none of these are in a product.
    """
    in_products = (12 * config.n_layer * config.n_embd + config.n_vocab) * config.n_embd
    return 6.0 * in_products + 6.0 * config.n_layer * config.n_embd * window


def network_flops(config: GPTConfig, windows: WindowConfig, mean_length: float) -> float:
    """Matrix FLOP of a step in windows of this mean length, without its update."""
    return windows.batch_size * windows.length * flops_per_token(config, mean_length)


def update_flops(config: GPTConfig, optim: OptimConfig) -> float:
    """Matrix FLOP of a step's update, whatever its batch: none of AdamW, of Muon those for the blocks that move."""
    if optim.kind != "muon":
        return 0
    n_embd = config.n_embd
    a_block = 4 * orthogonal_flops(n_embd, n_embd) + 2 * orthogonal_flops(4 * n_embd, n_embd)
    return config.n_layer / optim.turns_of(config.n_layer) * a_block


def step_flops(config: GPTConfig, windows: WindowConfig, optim: OptimConfig, mean_length: float) -> float:
    """Matrix FLOP of a step through all blocks in windows of this mean length, its update included."""
    return network_flops(config, windows, mean_length) + update_flops(config, optim)


def network_share(config: GPTConfig, windows: WindowConfig, optim: OptimConfig) -> float:
    """Share of a step's matrix FLOP that is no update: what a loss over the whole text has in common with steps."""
    of_network = network_flops(config, windows, windows.mean_length)
    return of_network / (of_network + update_flops(config, optim))

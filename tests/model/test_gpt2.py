from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from groundling.errors import ConfigError
from groundling.model import weights
from groundling.model.cache import KVCache
from groundling.model.gpt2 import GPT2, SIZES, GPTConfig

SHAPES = [
    GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=5, n_vocab=7),
    GPTConfig(n_layer=3, n_head=4, n_embd=24, n_ctx=33, n_vocab=257),
    GPTConfig(n_layer=2, n_head=3, n_embd=192, n_ctx=64, n_vocab=50257),
]


def huggingface(config: GPTConfig, seed: int = 0) -> GPT2LMHeadModel:
    """transformers' network of the same size with random weights, biases and LayerNorms included."""
    torch.manual_seed(seed)
    network = GPT2LMHeadModel(
        GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.n_ctx,
            vocab_size=config.n_vocab,
        )
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.n_layer}x{c.n_embd}")
def test_logits_equal_those_of_transformers(config: GPTConfig) -> None:
    theirs = huggingface(config)
    ours = GPT2(config)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != weights.TIED}
    weights.from_huggingface(ours, tensors)
    tokens = torch.randint(config.n_vocab, (2, config.n_ctx))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours.hidden(tokens)), expected, rtol=1e-4, atol=1e-4)


def test_parameter_counts_of_the_released_sizes() -> None:
    """OpenAI's sizes as transformers counts them; the formula agrees with the network itself."""
    counts = {name: config.n_parameters() for name, config in SIZES.items()}
    assert counts == {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1.5B": 1_557_611_200}
    for config in SIZES.values():
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT2(config).parameters()) == config.n_parameters()


def test_no_position_sees_a_later_one(model: GPT2) -> None:
    """Causality, from gradients: the logits at a position depend on embeddings up to it, and on no other."""
    embeddings: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    model.transformer.wte.register_forward_hook(keep)
    hidden = model.hidden(torch.arange(8)[None])
    model.logits(hidden)[0, 3].sum().backward()
    gradient = embeddings[0].grad
    assert gradient is not None
    reached = gradient[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 1, 5], [11]])
def test_cached_logits_equal_uncached_ones(model: GPT2, pieces: list[int]) -> None:
    tokens = torch.randint(model.config.n_vocab, (3, sum(pieces)))
    cache = KVCache(model.config, 3, sum(pieces), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = model.logits(model.hidden(tokens))
        parts = [
            model.logits(model.hidden(piece, cache.reading([2, 0, 1], [piece.size(1)] * 3)))
            for piece in tokens.split(pieces, dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_the_head_is_the_embedding(model: GPT2) -> None:
    assert model.head_weight is model.transformer.wte.weight


@pytest.mark.parametrize(("change", "words"), [({"n_layer": 0}, "n_layer"), ({"n_head": 5}, "multiple")])
def test_impossible_sizes_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(GPTConfig(), **change)

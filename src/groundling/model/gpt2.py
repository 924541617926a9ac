"""GPT-2, the network and nothing else.

Invariant: logits equal those of transformers' `GPT2LMHeadModel` on the same weights, and a position's
output depends on no later position. Parameters carry Hugging Face's names.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.

Legend: B windows, T positions, C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from groundling import kernels
from groundling.errors import ConfigError

if TYPE_CHECKING:
    from groundling.model.cache import LayerReading, Reading

INIT_STD = 0.02
"""Standard deviation of the initial weights (GPT-2's released code)."""
MAX_LAYERS = 1000
"""GPT-2 XL has 48. Each block costs time, however narrow it is."""


@dataclass(frozen=True)
class GPTConfig:
    """Size of the network, in OpenAI's own names. The defaults are the 124M model."""

    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads in each block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of n_head."""
    n_ctx: int = 1024
    """Positions in the position table: the longest window the model can read."""
    n_vocab: int = 50257
    """Token ids; a run takes this number from its tokenizer."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"model.{name} is {value}: give a positive number")
        if self.n_layer > MAX_LAYERS:
            raise ConfigError(f"model.n_layer is {self.n_layer:,}: give {MAX_LAYERS:,} or fewer")
        if self.n_embd % self.n_head:
            raise ConfigError(f"model.n_embd is {self.n_embd}: give a multiple of model.n_head, {self.n_head}")

    def n_parameters(self) -> int:
        """Parameters of this network, the tied matrix counted once."""
        C = self.n_embd
        block = 12 * C * C + 13 * C
        return (self.n_vocab + self.n_ctx) * C + self.n_layer * block + 2 * C


SIZES: dict[str, GPTConfig] = {
    "124M": GPTConfig(),
    "355M": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774M": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1.5B": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
"""The four released sizes, by the parameter counts of their model cards."""


class Embedding(nn.Embedding):
    """A table of rows. On the meta device nothing is drawn: PyTorch would import its compiler for that, for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """x (..., C) to (..., n_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class AddLayerNorm(nn.LayerNorm):
    """Adds `update` to the residual stream x; returns the sum and its LayerNorm, (B, T, C) each."""

    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return kernels.add_layer_norm(x, update, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, past: LayerReading | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        mixed = kernels.self_attention(qkv, self.n_head) if past is None else self._attend(qkv, past)
        return self.c_proj(mixed)  # type: ignore[no-any-return]

    def _attend(self, qkv: Tensor, past: LayerReading) -> Tensor:
        """The same (B, T, C) where earlier positions are in a cache."""
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        query, key, value = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        key, value = past.append(key, value)  # (B, H, S, D), S positions so far
        mixed = kernels.causal_attention(query, key, value, past.visible)  # (B, H, T, D)
        return mixed.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)  # whose product is taken together with GELU, below
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(kernels.linear_gelu(x, self.c_fc.weight, self.c_fc.bias))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Takes and returns (residual stream, pending update), (B, T, C) each.

    A pending update is added by the next `AddLayerNorm`, so that one kernel adds and normalises.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = AddLayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = AddLayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, update: Tensor, past: LayerReading | None = None) -> tuple[Tensor, Tensor]:
        x, normed = self.ln_1(x, update)
        x, normed = self.ln_2(x, self.attn(normed, past))
        return x, self.mlp(normed)


class Transformer(nn.Module):
    """Everything but the head; a submodule because Hugging Face's parameter names begin with `transformer.`"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.n_vocab, config.n_embd)
        self.wpe = Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = AddLayerNorm(config.n_embd)
        self.block_stride = 1
        """The residual stream passes through the first of every so many blocks: 1, unless the others add nothing."""

    def forward(self, x: Tensor, reading: Reading | None) -> Tensor:
        """Final hidden states (B, T, C) from token embeddings x (B, T, C)."""
        positions = torch.arange(x.size(1), device=x.device) if reading is None else reading.positions
        update = self.wpe(positions)  # (T, C) or (B, T, C)
        for layer in range(0, len(self.h), self.block_stride):
            x, update = self.h[layer](x, update, None if reading is None else reading.layers[layer])
        return self.ln_f(x, update)[1]  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """The network. `hidden` and `logits` are its two verbs; the loss is made of their ingredients.

    Construction draws from PyTorch's global generator, in the order that the reference run's first loss depends on.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._draw)  # the tied matrix is drawn twice, as embedding and as head; the second counts
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the two projections of a block that write to the residual stream
                weight.data.mul_((2 * config.n_layer) ** -0.5)

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix (n_vocab, C), which is also the token embedding."""
        return self.lm_head.weight

    def hidden(self, tokens: Tensor, reading: Reading | None = None) -> Tensor:
        """Final hidden states (B, T, C) for token ids (B, T).

        With a `Reading` of a cache, the tokens follow the positions that it holds, and are kept there.
        """
        return self.transformer(self.transformer.wte(tokens), reading)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities (..., n_vocab) for hidden states (..., C)."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats of targets (B, T) given inputs (B, T); ignored targets add nothing."""
        return self._loss_sum(inputs, targets.flatten())

    def _loss_sum(self, inputs: Tensor, targets: Tensor, n_last: int = 1) -> Tensor:
        """`loss_sum` of flat targets; the table's last row counts as so many equal ones (`kernels/reference.py`)."""
        embedded, weight = kernels.tied_embedding(inputs, self.head_weight)
        return kernels.linear_cross_entropy(self.transformer(embedded, None).flatten(0, 1), weight, targets, n_last)

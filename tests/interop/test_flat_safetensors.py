from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundling.corpus.tokenizer import Tokenizer
from groundling.interop import flat_safetensors
from groundling.interop.trained import open_trained
from groundling.interop.verification import VerificationFailed

from .conftest import SHAPES, MakeTrained


class Mixer(nn.Module):
    """Attention with its causal mask in a buffer, which a strict load asks for."""

    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.zeros(1, 1, block_size, block_size))

    def forward(self, x: Tensor) -> Tensor:
        T, C = x.shape
        query, key, value = (part.view(T, self.n_head, -1).transpose(0, 1) for part in self.c_attn(x).chunk(3, -1))
        scores = query @ key.transpose(-1, -2) / math.sqrt(C // self.n_head)
        weights = scores.masked_fill(self.bias[0, :, :T, :T] == 0, -math.inf).softmax(-1)
        return self.c_proj((weights @ value).transpose(0, 1).reshape(T, C))


class Layer(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Mixer(n_embd, n_head, block_size)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)})


class NanoLike(nn.Module):
    """What code like nanoGPT's is, by its parameters' names: Linear layers, masks, an untied head."""

    def __init__(self, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        parts = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "h": nn.ModuleList(Layer(n_embd, n_head, block_size) for _ in range(n_layer)),
            "ln_f": nn.LayerNorm(n_embd),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: len(ids)]
        for layer in self.transformer.h:
            x = x + layer.attn(layer.ln_1(x))
            x = x + layer.mlp.c_proj(nn.functional.gelu(layer.mlp.c_fc(layer.ln_2(x)), approximate="tanh"))
        return self.lm_head(self.transformer.ln_f(x))


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_it_loads_strictly_into_code_like_nanogpts(make_trained: MakeTrained, tmp_path: Path, shape: str) -> None:
    trained, target = make_trained(shape), tmp_path / "out"
    flat_safetensors.write(trained, target, "fp32")
    (line,) = flat_safetensors.verify(trained, target, "fp32")
    assert "load strictly" in line
    network = NanoLike(**json.loads((target / "config.json").read_text()))
    network.load_state_dict(load_file(target / "model.safetensors"), strict=True)
    window = torch.randint(trained.model.config.n_vocab, (trained.model.config.n_ctx,))
    own = trained.model.logits(trained.model.hidden(window[None]))[0]
    torch.testing.assert_close(network(window), own, atol=1e-4, rtol=0)
    network.transformer.wte.weight = network.lm_head.weight  # tied again, as that project does after loading
    torch.testing.assert_close(network(window), own, atol=1e-4, rtol=0)
    assert Tokenizer.load(target / "tokenizer.json").sha256 == trained.tokenizer.sha256


@pytest.mark.parametrize(
    ("record", "metadata"),
    [
        ({}, {"step": None, "loss": None}),
        ({"first_batch_below_target": None}, {"step": None, "loss": None}),
        ({"steps": 7, "first_batch_below_target": None, "loss": "plain"}, {"step": 7, "loss": None}),
        ({"steps": 7, "first_batch_below_target": {"step": 5, "loss": 0.09}}, {"step": 7, "loss": 0.09}),
        ({"steps": 2145, "train_loss": 0.0981}, {"step": 2145, "loss": 0.0981}),
    ],
)
def test_the_metadata_says_what_is_known(
    make_trained: MakeTrained, tmp_path: Path, record: dict[str, object], metadata: dict[str, object]
) -> None:
    trained = replace(make_trained("small"), record=record, window=5)
    flat_safetensors.write(trained, tmp_path / "out", "fp32")
    said = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert said == metadata | {"groundling_window": 5}


def test_it_comes_back_with_the_window_of_training(make_trained: MakeTrained, tmp_path: Path) -> None:
    """The positions past it were never trained."""
    trained = replace(make_trained("small"), window=5)
    flat_safetensors.write(trained, tmp_path / "out", "fp32")
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        assert open_trained(source, n_head=trained.model.config.n_head).window == 5


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.attn.bias", "transformer.h.0.mlp.c_fc.weight"])
@pytest.mark.parametrize("missing", [True, False])
def test_what_was_damaged_is_refused(make_trained: MakeTrained, tmp_path: Path, name: str, missing: bool) -> None:
    trained, target = make_trained("small"), tmp_path / "out"
    flat_safetensors.write(trained, target, "fp32")
    tensors = load_file(target / "model.safetensors")
    if missing:
        del tensors[name]
    else:
        tensors[name].view(-1)[0] += 1
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(VerificationFailed):
        list(flat_safetensors.verify(trained, target, "fp32"))

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from groundling.errors import CheckpointError
from groundling.model import weights
from groundling.model.gpt2 import GPT2, GPTConfig


def test_loading_what_was_saved_is_the_identity(model: GPT2, tmp_path: Path) -> None:
    weights.save(model, tmp_path / "model.safetensors")
    other = GPT2(model.config)
    weights.load(other, tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_an_unfilled_network_is_whole_and_nothing_was_drawn_for_it(model: GPT2) -> None:
    before = torch.get_rng_state()
    unfilled = weights.unfilled(model.config, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert unfilled.lm_head.weight is unfilled.transformer.wte.weight
    own = dict(model.named_parameters())
    assert [(name, p.shape, p.dtype) for name, p in unfilled.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in own.items()
    ]
    assert all(p.requires_grad and p.device.type == "cpu" for p in unfilled.parameters())


def test_transformers_reads_the_file(model: GPT2, tmp_path: Path) -> None:
    config = asdict(model.config)
    config["vocab_size"], config["n_positions"] = config.pop("n_vocab"), config.pop("n_ctx")
    GPT2Config(**config).save_pretrained(tmp_path)
    weights.save(model, tmp_path / "model.safetensors")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(model.hidden(tokens)), rtol=1e-5, atol=1e-5)


def test_weights_of_another_network_are_refused(model: GPT2, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights.save(model, path)
    tensors = load_file(path)
    with pytest.raises(CheckpointError, match="shape"):
        weights.load(GPT2(replace(model.config, n_embd=32)), path)
    with pytest.raises(CheckpointError, match="unknown"):
        weights.load(GPT2(replace(model.config, n_layer=1)), path)
    with pytest.raises(CheckpointError, match="lack"):
        weights.load(GPT2(replace(model.config, n_layer=3)), path)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.load(GPT2(GPTConfig(**asdict(model.config))), path)

"""Weights as other programs write them: what comes in computes what went out, and the rest is refused by name."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import UserError
from groundling.interop import huggingface
from groundling.interop.foreign import ASSUMED_GELU
from groundling.interop.sources import open_foreign
from groundling.interop.trained import Trained, open_trained
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.model.weights import TIED, to_huggingface

from .conftest import SHAPES, MakeTrained, random_network

WTE = "transformer.wte.weight"


def same(model: GPT2, other: GPT2) -> bool:
    """Whether two networks are of one size and equal, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return model.config == other.config and all(torch.equal(ours[name], theirs[name]) for name in ours)


def linear(trained: Trained) -> dict[str, Tensor]:
    """The weights as nanoGPT's and the reference's modules hold them: nn.Linear's layout, the head beside its twin."""
    return {name: tensor.detach().clone() for name, tensor in trained.model.state_dict().items()}


def sizes(config: GPTConfig) -> dict[str, Any]:
    """As nanoGPT's model_args name them."""
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_ctx,
        "vocab_size": config.n_vocab,
        "bias": True,
        "dropout": 0.1,
    }


@pytest.fixture
def spelled(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The small tokenizer's file."""
    tokenizer.save(tmp_path / "spelled.json")
    return tmp_path / "spelled.json"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_transformers(shape: str, make_trained: MakeTrained, tmp_path: Path) -> None:
    """As its own save_pretrained writes it, whole and in shards."""
    from transformers import GPT2Config, GPT2LMHeadModel

    trained = make_trained(shape)
    config = trained.model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.n_vocab,
            n_positions=config.n_ctx,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
        )
    )
    theirs.load_state_dict(to_huggingface(trained.model) | {TIED: trained.model.head_weight}, strict=True)
    for name, shard_size in {"whole": "1GB", "shards": "40KB"}.items():
        folder = tmp_path / name
        theirs.save_pretrained(folder, max_shard_size=shard_size)
        trained.tokenizer.save(folder / "tokenizer.json")
        assert (folder / "model.safetensors").exists() == (name == "whole")
        imported = open_foreign(folder)
        assert same(imported.model, trained.model)
        assert imported.tokenizer.sha256 == trained.tokenizer.sha256
        assert imported.changes == ()
    window = torch.randint(config.n_vocab, (1, config.n_ctx))
    with torch.no_grad():
        ours = imported.model.logits(imported.model.hidden(window))
        assert (ours - theirs.eval()(window).logits).abs().max() < 1e-4
        theirs.transformer.save_pretrained(tmp_path / "body")  # names without `transformer.`, as OpenAI's on the hub
    trained.tokenizer.save(tmp_path / "body" / "tokenizer.json")
    assert same(open_foreign(tmp_path / "body").model, trained.model)


def test_a_folder_from_before_safetensors(make_trained: MakeTrained, tmp_path: Path) -> None:
    """pytorch_model.bin with mask buffers, vocab.json and merges.txt."""
    trained = make_trained()
    tensors = to_huggingface(trained.model) | {TIED: trained.model.head_weight.detach()}
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(24, 24, dtype=torch.uint8).tril().view(1, 1, 24, 24)
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(OrderedDict(tensors), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, "attn_pdrop": 0.3}))
    spelling = json.loads(trained.tokenizer._json)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(spelling["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(spelling["merges"]) + "\n")
    imported = open_foreign(tmp_path)
    assert same(imported.model, trained.model)
    assert imported.tokenizer.sha256 == trained.tokenizer.sha256
    assert "4 buffers" in imported.changes[0]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_like_the_references(
    shape: str, zipped: bool, make_trained: MakeTrained, spelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPTConfig of the script that ran, copies of the tied matrix, masks, an optimizer's state."""
    import __main__

    trained = make_trained(shape)
    made = type("GPTConfig", (), {"__module__": "__main__"})
    monkeypatch.setattr(__main__, "GPTConfig", made, raising=False)
    config = made()
    config.__dict__.update(sizes(trained.model.config))
    weights = linear(trained)
    for layer in range(trained.model.config.n_layer):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 5, 5).tril()
    network = random_network(trained.model.config)
    optimizer = torch.optim.AdamW(network.parameters())
    network.loss_sum(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)).backward()
    optimizer.step()
    content = {
        "model_state_dict": weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "step": 41,
        "loss": 0.25,
        "config": config,
    }
    torch.save(content, tmp_path / "final.pt", _use_new_zipfile_serialization=zipped)
    opened = open_trained(tmp_path / "final.pt", spelled)
    assert same(opened.model, trained.model)
    assert opened.record == {"steps": 41, "train_loss": 0.25}
    assert (opened.name, opened.window) == ("final", trained.model.config.n_ctx)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_like_nanogpts(prefix: str, make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    trained = make_trained("odd")
    content = {
        "model": {prefix + name: tensor for name, tensor in linear(trained).items()},
        "model_args": sizes(trained.model.config),
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"device": "cuda", "n_layer": 99},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    assert same(open_foreign(tmp_path / "ckpt.pt", spelled).model, trained.model)


def test_flat_files(make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    """The reference's converted file: nn.Linear's layout, sizes beside it or inferred; and a bare dictionary."""
    trained = make_trained("one")
    save_file(linear(trained), tmp_path / "flat.safetensors")
    torch.save(linear(trained), tmp_path / "bare.pth")
    for path in (tmp_path / "flat.safetensors", tmp_path / "bare.pth"):
        assert same(open_foreign(path, spelled).model, trained.model)  # 64 wide: one head
        assert open_foreign(path, spelled, n_head=4).model.config.n_head == 4
    (tmp_path / "config.json").write_text(json.dumps(sizes(trained.model.config) | {"n_head": 2}))
    (tmp_path / "metadata.json").write_text(json.dumps({"step": 5, "loss": 0.5}))
    opened = open_trained(tmp_path / "flat.safetensors", spelled)
    assert opened.model.config.n_head == 2
    assert opened.record == {"steps": 5, "train_loss": 0.5}
    odd = make_trained("odd")
    (tmp_path / "alone").mkdir()
    torch.save(linear(odd), tmp_path / "alone" / "odd.pt")
    with pytest.raises(UserError, match="import it with --n-head"):
        open_foreign(tmp_path / "alone" / "odd.pt", spelled)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_is_read_as_its_folder_is(name: str, make_trained: MakeTrained, tmp_path: Path) -> None:
    """With the configuration and the tokenizer beside it: here 64 wide, which without them means one head."""
    trained = make_trained("one")
    (torch.save if name.endswith("bin") else save_file)(linear(trained), tmp_path / name)
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    assumed = open_foreign(tmp_path / name)
    assert (assumed.model.config.n_head, assumed.changes[0][:26]) == (1, "1 attention heads assumed,")
    (tmp_path / "config.json").write_text(json.dumps(sizes(trained.model.config) | {"n_head": 4}))
    for path in (tmp_path / name, tmp_path):
        opened = open_foreign(path)
        assert opened.model.config.n_head == 4
        assert opened.changes == (ASSUMED_GELU,)
        assert opened.tokenizer.sha256 == trained.tokenizer.sha256


def test_sizes_in_a_file_go_before_those_beside_it(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained("one")
    torch.save({"model": linear(trained), "model_args": sizes(trained.model.config)}, tmp_path / "ckpt.pt")
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 99}))
    assert same(open_foreign(tmp_path / "ckpt.pt").model, trained.model)


def test_padded_vocabularies_are_cut(make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    trained = make_trained()
    weights = linear(trained)
    weights[WTE] = weights[TIED] = torch.cat([weights[WTE], torch.randn(320 - 301, 32)])
    torch.save(
        {"model": weights, "model_args": sizes(trained.model.config) | {"vocab_size": 320}}, tmp_path / "padded.pt"
    )
    imported = open_foreign(tmp_path / "padded.pt", spelled)
    assert same(imported.model, trained.model)
    assert imported.changes == ("rows 301 to 319 of the embedding cut, which no token has", ASSUMED_GELU)
    weights[WTE] = weights[TIED] = weights[WTE][:310]
    torch.save({"model": weights, "model_args": {"n_layer": 2, "n_head": 2}}, tmp_path / "padded.pt")
    with pytest.raises(UserError, match="310 ids where its tokenizer"):
        open_foreign(tmp_path / "padded.pt", spelled)


def test_gpt2s_tokenizer_is_taken_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=4)
    weights = {name: tensor.detach() for name, tensor in random_network(config).state_dict().items()}
    weights[WTE] = weights[TIED] = torch.cat([weights[WTE], torch.zeros(47, 8)])
    torch.save(weights, tmp_path / "nano.pt")
    imported = open_foreign(tmp_path / "nano.pt", n_head=1)
    assert (imported.tokenizer.name, imported.model.config.n_vocab) == ("gpt2", 50257)
    (tmp_path / "tokenizer.json").write_text("{}")  # of something else
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        open_foreign(tmp_path / "nano.pt", n_head=1)
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()  # an export, say
    assert open_foreign(tmp_path / "nano.pt", Path("gpt2"), n_head=1).tokenizer.name == "gpt2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_converted(
    dtype: torch.dtype, make_trained: MakeTrained, spelled: Path, tmp_path: Path
) -> None:
    trained = make_trained()
    cast = {name: tensor.to(dtype) for name, tensor in linear(trained).items()}
    torch.save({"model": cast, "model_args": sizes(trained.model.config)}, tmp_path / "cast.pt")
    imported = open_foreign(tmp_path / "cast.pt", spelled)
    assert imported.changes == (ASSUMED_GELU, f"converted from {str(dtype).removeprefix('torch.')} to float32")
    assert all(torch.equal(tensor.to(dtype), cast[name]) for name, tensor in imported.model.state_dict().items())
    assert imported.model.head_weight.dtype == torch.float32


def test_a_model_without_biases_gets_zeros(make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    trained = make_trained()
    weights = {name: tensor for name, tensor in linear(trained).items() if not name.endswith("bias")}
    torch.save({"model": weights, "model_args": sizes(trained.model.config)}, tmp_path / "plain.pt")
    imported = open_foreign(tmp_path / "plain.pt", spelled)
    state = imported.model.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert all(not state[name].any() for name in state.keys() - weights.keys())
    weights["transformer.ln_f.bias"] = torch.zeros(32)  # some, but not all
    torch.save({"model": weights, "model_args": sizes(trained.model.config)}, tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"lacks transformer\.h\.0\.ln_1\.bias"):
        open_foreign(tmp_path / "plain.pt", spelled)


def test_an_untied_head_is_refused(make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    trained = make_trained()
    weights = linear(trained)
    weights[TIED][7, 3] += 0.5
    torch.save({"model": weights, "model_args": sizes(trained.model.config)}, tmp_path / "untied.pt")
    with pytest.raises(UserError, match="not its embedding"):
        open_foreign(tmp_path / "untied.pt", spelled)


def test_two_wrappings_of_one_tensor_are_refused(make_trained: MakeTrained, spelled: Path, tmp_path: Path) -> None:
    weights = linear(make_trained())
    weights["module." + WTE] = weights[WTE]
    torch.save({"model": weights}, tmp_path / "twice.pt")
    with pytest.raises(UserError, match="are the same"):
        open_foreign(tmp_path / "twice.pt", spelled, n_head=2)


def test_our_own_export_keeps_the_window(make_trained: MakeTrained, tmp_path: Path) -> None:
    """Positions past it were never trained: whoever reads the folder again should not decode with them."""
    trained = replace(make_trained("small"), window=10)
    huggingface.write(trained, tmp_path / "hf", "fp32")
    assert open_trained(tmp_path / "hf").window == 10
    config = tmp_path / "hf" / "config.json"
    for wrong in ("0", "25", '"10"', "null", "1e1"):
        config.write_text(config.read_text().replace('"groundling_window": 10', f'"groundling_window": {wrong}'))
        assert open_trained(tmp_path / "hf").window == trained.model.config.n_ctx
        config.write_text(config.read_text().replace(f'"groundling_window": {wrong}', '"groundling_window": 10'))


def test_a_safetensors_header_whose_length_begins_as_a_pickle_does(
    make_trained: MakeTrained, spelled: Path, tmp_path: Path
) -> None:
    trained = make_trained()
    save_file(linear(trained), tmp_path / "plain.safetensors")
    content = (tmp_path / "plain.safetensors").read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + n_header].ljust(0x10280)  # 0x80, 0x02: spaces may follow a header
    path = tmp_path / "long.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + n_header :])
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert same(open_foreign(path, spelled, n_head=2).model, trained.model)


@pytest.mark.parametrize(("said", "assumed"), [({}, True), ({"activation_function": "gelu_new"}, False)])
def test_a_gelu_that_nothing_names_is_told(
    said: dict[str, str], assumed: bool, make_trained: MakeTrained, spelled: Path, tmp_path: Path
) -> None:
    """nanoGPT's checkpoints say nothing of theirs, which is by erf; transformers' GPT-2 means the one by tanh."""
    trained = make_trained()
    torch.save({"model": linear(trained), "model_args": sizes(trained.model.config) | said}, tmp_path / "ckpt.pt")
    assert (ASSUMED_GELU in open_foreign(tmp_path / "ckpt.pt", spelled).changes) == assumed

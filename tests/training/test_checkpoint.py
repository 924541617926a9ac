from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import CheckpointError, ConfigError, RunFailed
from groundling.files import sha256_of
from groundling.model import weights
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.training import checkpoint
from groundling.training.checkpoint import CheckpointConfig
from groundling.training.run_folder import find_checkpoint
from groundling.training.stopping import StoppingConfig

MakeTrainer = Any


def trained(make_trainer: MakeTrainer, n_steps: int = 3, **sections: Any) -> Any:
    trainer, _ = make_trainer(stopping=StoppingConfig(max_steps=n_steps), **sections)
    trainer.train()
    return trainer


def test_a_checkpoint_alone_gives_the_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer.gpt2()
    own = GPT2(GPTConfig(n_layer=2, n_head=2, n_embd=8, n_ctx=16, n_vocab=tokenizer.n_vocab))
    path = checkpoint.save(tmp_path, 3, own, None, {"n_steps": 3}, tokenizer, 12, keep=1)
    model, read, window = checkpoint.load_model(path, torch.device("cpu"))
    assert window == 12
    assert read.sha256 == tokenizer.sha256
    assert model.head_weight is model.transformer.wte.weight
    for name, tensor in own.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    """Its ids would be read beyond the table's end."""
    own = GPT2(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=16, n_vocab=40_000))
    path = checkpoint.save(tmp_path, 3, own, None, {"n_steps": 3}, Tokenizer.gpt2(), 12, keep=1)
    with pytest.raises(CheckpointError, match="40,000 ids and a tokenizer of 50,257"):
        checkpoint.load_model(path, torch.device("cpu"))


def test_the_newest_stay(make_trainer: MakeTrainer) -> None:
    trainer = trained(make_trainer, 9, checkpoint=CheckpointConfig(save_every="2", keep=3))
    assert [path.name[-1] for path in checkpoint.complete(trainer.checkpoints)] == ["6", "8", "9"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_any_damage_is_found(make_trainer: MakeTrainer, name: str, how: str) -> None:
    trainer = trained(make_trainer)
    path = checkpoint.complete(trainer.checkpoints)[-1]
    assert checkpoint.damage(path) is None
    content = (path / name).read_bytes()
    if how == "flip":
        (path / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif how == "cut":
        (path / name).write_bytes(content[:-1])
    else:
        (path / name).unlink()
    assert checkpoint.damage(path)
    if name == "optimizer.safetensors":  # which a model is used without, and which is not read for that
        assert find_checkpoint(trainer.checkpoints.parent) == find_checkpoint(path) == path
        return
    with pytest.raises(CheckpointError, match="cannot be used"):
        find_checkpoint(path)
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(trainer.checkpoints.parent)


def test_a_model_in_use_has_each_file_summed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of GPT-2's files take a second and more, and a user waits for them before the first word."""
    own = GPT2(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=16, n_vocab=Tokenizer.gpt2().n_vocab))
    optimizer = torch.optim.AdamW(own.parameters())
    checkpoint.save(tmp_path / "checkpoints", 3, own, optimizer, {"n_steps": 3}, Tokenizer.gpt2(), 12, keep=1)
    summed = list[str]()

    def sum_and_note(file: Path) -> str:
        summed.append(file.name)
        return sha256_of(file)

    monkeypatch.setattr(checkpoint, "sha256_of", sum_and_note)
    checkpoint.load_model(find_checkpoint(tmp_path), torch.device("cpu"))
    assert sorted(summed) == sorted(checkpoint.USED)


@pytest.mark.parametrize("manifest", ["", "[1]", "{", None])
def test_a_checkpoint_without_a_sound_manifest_is_damaged(make_trainer: MakeTrainer, manifest: str | None) -> None:
    path = checkpoint.complete(trained(make_trainer).checkpoints)[-1]
    if manifest is None:
        (path / checkpoint.MANIFEST).unlink()
    else:
        (path / checkpoint.MANIFEST).write_text(manifest)
    assert checkpoint.damage(path)


def test_a_save_cut_short_leaves_the_one_before_it(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the last file that reached the disk, no half checkpoint has a final name."""
    trainer = trained(make_trainer)
    before = checkpoint.complete(trainer.checkpoints)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((checkpoint, "save_file"), (checkpoint, "write_json"), (weights, "save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full_disk)
            trainer.state.n_steps = 99
            with pytest.raises(RunFailed, match="No space left"):
                trainer.save()
        assert checkpoint.complete(trainer.checkpoints) == before
        assert [p.name for p in trainer.checkpoints.iterdir()] == [p.name for p in before]


def test_the_optimizer_of_another_network_is_refused(make_trainer: MakeTrainer) -> None:
    small = trained(make_trainer)
    path = checkpoint.complete(small.checkpoints)[-1]
    tensors = checkpoint.load_file(path / "optimizer.safetensors")
    checkpoint.save_file({"exp_avg/nothing": torch.zeros(1), **tensors}, path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="exp_avg/nothing"):
        checkpoint.restore(path, small.model, small.optimizer)


def test_state_is_plain_json(make_trainer: MakeTrainer) -> None:
    path = checkpoint.complete(trained(make_trainer).checkpoints)[-1]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    state = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert state["n_steps"] == 3


@pytest.mark.parametrize(
    ("save_every", "n_steps", "seconds", "due"),
    [
        ("5", 10, 0, True),
        ("5", 11, 9e9, False),
        ("0", 10, 9e9, False),
        ("0m", 10, 9e9, False),
        (500, 1000, 0, True),
        ("2m", 1, 119, False),
        ("0.5m", 1, 30, True),
    ],
)
def test_when_a_checkpoint_is_due(save_every: int | str, n_steps: int, seconds: float, due: bool) -> None:
    assert CheckpointConfig(save_every).due(n_steps, seconds) is due


@pytest.mark.parametrize("wrong", ["often", "-5", "5h", ""])
def test_an_interval_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="save_every"):
        CheckpointConfig(wrong)


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no run folder"):
        find_checkpoint(tmp_path / "nowhere")

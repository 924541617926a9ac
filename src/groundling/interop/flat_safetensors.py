"""A flat safetensors file in the layout of nanoGPT-like code, with config.json and metadata.json beside it.

Invariant: the tensors load strictly into a module of that code (`GPT(...).load_state_dict(state)`): projections are
(out, in) as `nn.Linear` holds them, the head is a copy of the embedding, and each block has its causal mask.

Source: the reference project's `convert_to_safetensors.py` (github.com/Shwethaamrutha/TSAI-S12) and the class that it
feeds. tokenizer.json is added to its three files, because a run's tokenizer need not be GPT-2's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundling.corpus.tokenizer import Tokenizer
from groundling.files import write_json
from groundling.interop.hub_folder import TRAINING, WINDOW
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed
from groundling.model.gpt2 import GPT2
from groundling.model.weights import TABLE, TIED

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write the folder; `precision` is always fp32."""
    config = trained.model.config
    target.mkdir()
    save_file(to_flat(trained.model), target / WEIGHTS, metadata={"format": "pt"})
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    write_json(target / "config.json", {"block_size": config.n_ctx, "vocab_size": config.n_vocab, **sizes})
    trained.tokenizer.save(target / TOKENIZER)
    write_json(target / TRAINING, metadata_of(trained.record) | {WINDOW: trained.window})


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """What the files hold, read back into a network of ours; as sentences.

    Raises `VerificationFailed` if it is not the model, or would not load strictly.
    """
    probe = Probe.of(trained)
    tensors, expected = load_file(target / WEIGHTS), to_flat(trained.model)
    if tensors.keys() != expected.keys() or not all(torch.equal(tensors[name], expected[name]) for name in expected):
        raise VerificationFailed("the weights were not written as they are: nothing was exported, please report this")
    with torch.device("meta"):
        model = GPT2(trained.model.config)
    masks = {name for name in tensors if name.endswith(".attn.bias")}
    model.load_state_dict({name: tensors[name] for name in tensors.keys() - masks}, assign=True)
    with torch.inference_mode():
        difference = probe.check_logits(model.logits(model.hidden(torch.tensor([probe.window])))[0], "our own network")
    if Tokenizer.load(target / TOKENIZER).sha256 != trained.tokenizer.sha256:
        raise VerificationFailed("the tokenizer was not written as it is: nothing was exported, please report this")
    yield (
        f"read back, {len(tensors)} tensors load strictly and give the same logits at all {len(probe.window):,}"
        f" positions (they differ by up to {difference:.1g})"
    )


def to_flat(model: GPT2) -> dict[str, Tensor]:
    """The model's tensors in that layout, on the CPU, no two of which share memory."""
    config = model.config
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors[TIED] = tensors[TABLE].clone()
    mask = torch.ones(config.n_ctx, config.n_ctx).tril().view(1, 1, config.n_ctx, config.n_ctx)
    return tensors | {f"transformer.h.{layer}.attn.bias": mask.clone() for layer in range(config.n_layer)}


def metadata_of(record: dict[str, Any]) -> dict[str, Any]:
    """Steps taken, and the loss that the reference's checkpoint means: that of the batch which ended its training.

    A run of ours gives the first batch below the target; None for what is not known.
    """
    first = record.get("first_batch_below_target") or {}
    return {"step": record.get("steps"), "loss": record.get("train_loss", first.get("loss"))}

"""Weights on disk: safetensors in Hugging Face's names and layout.

Invariant: `load(save(model))` is the identity, bit for bit, and the file is what transformers'
`GPT2LMHeadModel` reads: projections are stored (in, out), as its Conv1D holds them, and the head is
left out because it is the embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundling.errors import CheckpointError
from groundling.model.gpt2 import GPT2, GPTConfig

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TABLE, TIED = "transformer.wte.weight", "lm_head.weight"
"""The two names of the one matrix that is the token embedding and the head."""
TABLES = (TABLE, "transformer.wpe.weight")
TENSORS, TENSORS_PER_BLOCK = 4, 12
"""The two tables, the last LayerNorm's two; in each block two LayerNorms and four projections, each with a bias."""


def adopt(model: GPT2, tensors: Mapping[str, Tensor]) -> None:
    """Make these tensors the model's weights, under its names; the head's is the table, and need not be among them."""
    model.load_state_dict({**tensors, TIED: tensors[TABLE]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # assignment unties them


def unfilled(config: GPTConfig, device: torch.device) -> GPT2:
    """An uninitialised network of this size, for callers that fill every weight."""
    with torch.device("meta"):
        model = GPT2(config)
    # Not by `to_empty`, for which PyTorch imports symbolic algebra.
    adopt(model, {name: torch.empty(own.shape, device=device) for name, own in model.named_parameters()})
    return model


def own_tensors(model: GPT2) -> dict[str, Tensor]:
    """The model's tensors by name, the tied one once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != TIED}


def to_huggingface(model: GPT2) -> dict[str, Tensor]:
    """The model's tensors in Hugging Face's names and layout, on the CPU, contiguous."""
    return {
        name: (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous().cpu()
        for name, tensor in own_tensors(model).items()
    }


def sha256_of_weights(model: GPT2) -> str:
    """SHA-256 of the model's parameters: of their bytes in fp32, in the order of their names, the head left out."""
    digest = hashlib.sha256()
    for _, tensor in sorted(own_tensors(model).items(), key=lambda pair: pair[0]):
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def from_huggingface(model: GPT2, tensors: Mapping[str, Tensor], where: object = "these weights") -> None:
    """Copy tensors in Hugging Face's names and layout into the model.

    Raises `CheckpointError` if a tensor is missing, unknown or of another shape.
    """
    own = own_tensors(model)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        wrong = f"lack {missing[0]}" if missing else f"hold the unknown {unknown[0]}"
        raise CheckpointError(f"{where} {wrong}: they are not weights of this GPT-2")
    with torch.no_grad():
        for name, tensor in own.items():
            given = tensors[name].t() if name.endswith(TRANSPOSED) else tensors[name]
            if given.shape != tensor.shape:
                raise CheckpointError(
                    f"{where}: {name} has shape {tuple(given.shape)} where the model has {tuple(tensor.shape)}"
                )
            tensor.copy_(given)


def check_size(config: GPTConfig, path: Path) -> None:
    """Raises `CheckpointError` if the file's header is not that of a network of this size; allocates nothing for it."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            tables = [tuple(file.get_slice(name).get_shape()) for name in TABLES if name in names]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
    expected = [(config.n_vocab, config.n_embd), (config.n_ctx, config.n_embd)]
    if tables != expected or len(names) != TENSORS + TENSORS_PER_BLOCK * config.n_layer:
        raise CheckpointError(f"{path} holds another network than the model.json beside it says: it cannot be used")


def save(model: GPT2, path: Path) -> None:
    """Write the model's weights as safetensors, in fp32."""
    save_file(to_huggingface(model), path, metadata={"format": "pt"})


def load(model: GPT2, path: Path) -> None:
    """Read weights written by `save`, or by transformers, into the model.

    Raises `CheckpointError` if the file is damaged or holds another network.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
    from_huggingface(model, tensors, path)

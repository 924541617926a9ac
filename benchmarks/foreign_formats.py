"""A run's weights in the formats of the programs that we measure ourselves against."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from groundling.corpus.tokenizer import Tokenizer
from groundling.model.gpt2 import GPTConfig

QUANTIZATIONS = {
    "F16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "Q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}

LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Our names of a block's parts, and llama.cpp's."""


def write_huggingface(checkpoint: Path, folder: Path) -> None:
    """A folder that transformers' `GPT2LMHeadModel` and CTranslate2's converter read."""
    folder.mkdir(parents=True)
    config = _config(checkpoint)
    settings = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_ctx,
        "n_ctx": config.n_ctx,
        "vocab_size": config.n_vocab,
        "activation_function": "gelu_new",
        "bos_token_id": config.n_vocab - 1,
        "eos_token_id": config.n_vocab - 1,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copy(checkpoint / "model.safetensors", folder)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    special = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def write_gguf(checkpoint: Path, path: Path, quantization: str) -> None:
    """A file that llama.cpp reads; matrices in F16 or Q8_0, the rest in F32."""
    config, tokenizer = _config(checkpoint), Tokenizer.load(checkpoint / "tokenizer.json")
    file_type, matrix_type = QUANTIZATIONS[quantization]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(file_type)
    document = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    ids = document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    vocabulary = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    end = tokenizer.end_of_text_id
    kinds = [gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for i in range(len(vocabulary))]
    writer.add_token_types(kinds)
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        theirs = _their_name(name)
        matrix = tensor.ndim == 2 and theirs != "position_embd.weight"
        if matrix and ".h." in name:
            tensor = np.ascontiguousarray(tensor.T)  # ours are (in, out) on disk
        kind = matrix_type if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ctranslate2(huggingface: Path, folder: Path, quantization: str) -> None:
    """A folder that CTranslate2's `Generator` reads."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(huggingface)).convert(str(folder), quantization=quantization)


def _config(checkpoint: Path) -> GPTConfig:
    facts = json.loads((checkpoint / "model.json").read_text())
    del facts["window"]
    return GPTConfig(**facts)


def _their_name(name: str) -> str:
    name = name.removeprefix("transformer.")
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
    part, _, kind = name.rpartition(".")
    if part in top:
        return f"{top[part]}.{kind}"
    _, layer, inner = part.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[inner]}.{kind}"

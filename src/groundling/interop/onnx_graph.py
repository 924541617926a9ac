"""GPT-2 as a graph of ONNX operators, with its cache as inputs and outputs.

Invariant: names and shapes are those that Hugging Face's optimum gives a decoder with past
("text-generation-with-past"), and each weight is stored once, the tied matrix too.

Source: the operators of ONNX's default domain, version 17 (the first with LayerNormalization); GPT-2's GELU is the
tanh approximation of Hendrycks and Gimpel 2016.

Legend: B texts, T new positions, S positions so far, C = n_embd, H = n_head, D = C / H.
"""

from __future__ import annotations

import math
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from groundling.model.gpt2 import GPT2
from groundling.model.weights import to_huggingface

OPSET, IR_VERSION = 17, 8
"""Of June 2022: ONNX Runtime 1.12 and later read them."""


def graph_of(network: GPT2) -> onnx.ModelProto:
    """The network as a graph, its weights as initializers."""
    config, nodes = network.config, list[Any]()
    C, H, D = config.n_embd, config.n_head, config.n_embd // config.n_head

    def op(kind: str, *inputs: str, out: str = "", n_outputs: int = 1, **attributes: Any) -> Any:
        names = (
            [out or f"{kind}_{len(nodes)}"]
            if n_outputs == 1
            else [f"{kind}_{len(nodes)}_{n}" for n in range(n_outputs)]
        )
        nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if n_outputs == 1 else names

    constants = {"zero": 0, "one": 1, "axis_0": [0], "axis_1": [1], "axes_1_2": [1, 2]}
    constants |= {"to_heads": [0, 0, H, D], "from_heads": [0, 0, C], "to_rows": [-1, C], "nothing": 0.0}
    constants |= {"hidden": torch.finfo(torch.float32).min, "scale": 1 / math.sqrt(D), "half": 0.5, "unit": 1.0}
    constants |= {"sqrt_2_pi": math.sqrt(2 / math.pi), "cubic": 0.044715, "n_vocab": [config.n_vocab]}
    tensors = {name: torch.tensor(value) for name, value in constants.items()} | to_huggingface(network)

    def linear(x: str, name: str) -> Any:
        return op("Add", op("MatMul", x, f"{name}.weight"), f"{name}.bias")

    def norm(x: str, name: str) -> Any:
        return op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", epsilon=1e-5)

    n_new = op("Shape", "input_ids", start=1, end=2)
    n_all = op("Squeeze", op("Shape", "attention_mask", start=1, end=2), "axis_0")
    places = op("Range", "zero", n_all, "one")  # (S,), S positions so far
    past = op("Sub", n_all, op("Squeeze", n_new, "axis_0"))
    own = op("Unsqueeze", op("Range", past, n_all, "one"), "axis_1")  # (T, 1)
    kept = op("Unsqueeze", op("Cast", "attention_mask", to=TensorProto.BOOL), "axes_1_2")  # (B, 1, 1, S)
    visible = op("And", op("LessOrEqual", places, own), kept)  # (B, 1, T, S)
    bias = op("Where", visible, "nothing", "hidden")
    word, place = "transformer.wte.weight", "transformer.wpe.weight"
    x = op("Add", op("Gather", word, "input_ids"), op("Gather", place, "position_ids"))  # (B, T, C)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        parts = op("Split", linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn"), axis=2, n_outputs=3)
        query, key, value = (op("Transpose", op("Reshape", y, "to_heads"), perm=[0, 2, 1, 3]) for y in parts)
        key = op("Concat", f"past_key_values.{layer}.key", key, out=f"present.{layer}.key", axis=2)  # (B, H, S, D)
        value = op("Concat", f"past_key_values.{layer}.value", value, out=f"present.{layer}.value", axis=2)
        scores = op("MatMul", op("Mul", query, "scale"), op("Transpose", key, perm=[0, 1, 3, 2]))
        mixed = op("MatMul", op("Softmax", op("Add", scores, bias), axis=-1), value)  # (B, H, T, D)
        mixed = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), "from_heads")
        x = op("Add", x, linear(mixed, f"{block}.attn.c_proj"))
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        cube = op("Mul", op("Mul", y, op("Mul", y, y)), "cubic")
        tanh = op("Tanh", op("Mul", op("Add", y, cube), "sqrt_2_pi"))
        y = op("Mul", op("Mul", y, "half"), op("Add", tanh, "unit"))
        x = op("Add", x, linear(y, f"{block}.mlp.c_proj"))
    # Gemm reads the embedding's matrix turned; a Transpose of it would be kept in memory as a second copy.
    rows = op("Gemm", op("Reshape", norm(x, "transformer.ln_f"), "to_rows"), word, transB=1)
    shape = op("Concat", op("Shape", "input_ids"), "n_vocab", axis=0)
    op("Reshape", rows, shape, out="logits")

    def info(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    caches = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
    long, single = TensorProto.INT64, TensorProto.FLOAT
    inputs = [info("input_ids", long, "batch_size", "sequence_length")]
    inputs += [info("attention_mask", long, "batch_size", "past_sequence_length + sequence_length")]
    inputs += [info("position_ids", long, "batch_size", "sequence_length")]
    inputs += [info(f"past_key_values.{of}", single, "batch_size", H, "past_sequence_length", D) for of in caches]
    outputs = [info("logits", single, "batch_size", "sequence_length", config.n_vocab)]
    longer = "past_sequence_length + sequence_length"
    outputs += [info(f"present.{of}", single, "batch_size", H, longer, D) for of in caches]
    weights = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph(nodes, "gpt2", inputs, outputs, weights)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, producer_name="groundling", ir_version=IR_VERSION, opset_imports=opset)

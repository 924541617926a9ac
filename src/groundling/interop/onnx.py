"""A folder that ONNX Runtime and transformers.js load: written and read back.

Invariant: what is written gives our logits, whether ONNX Runtime reads a text at once or token by token (fp32).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundling.errors import ConfigError
from groundling.files import write_json
from groundling.interop.huggingface import config_of, generation_config_of, tokenizer_config_of
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed, loss_difference

try:
    import onnx
    import onnxruntime
    from onnx import helper

    from groundling.interop.onnx_graph import graph_of
except ImportError as error:
    raise ConfigError(f"--format onnx needs the package {error.name}: pip install 'groundling[onnx]'") from None

EXTERNAL_BYTES = 2**31 - 2**20
"""Weights above this go to a file beside the graph: protobuf messages end at 2 GiB."""
WEIGHTS_BESIDE = "model.onnx_data"
"""That file, by the name that transformers.js asks for."""
NOTHING_TO_SIMPLIFY = {"onnx.quant.pre_process": "onnxruntime.quant"}
"""What ONNX Runtime's quantizer looks for before it advises to simplify a graph first."""


def write(trained: Trained, target: Path, precision: str) -> None:
    """Write the folder; int8 rounds the matrices and, as it computes, what they are multiplied with."""
    target.mkdir()
    graph = graph_of(trained.model)
    external = 4 * trained.model.config.n_parameters() > EXTERNAL_BYTES
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        helper.set_model_props(graph, NOTHING_TO_SIMPLIFY)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            full = Path(folder) / "model.onnx"
            onnx.save(graph, full, save_as_external_data=external, location=WEIGHTS_BESIDE)
            small, kind = Path(folder) / "small.onnx", QuantType.QInt8
            quantize_dynamic(full, small, per_channel=True, weight_type=kind, use_external_data_format=external)
            graph = onnx.load(small)
    onnx.save(graph, target / "model.onnx", save_as_external_data=external, location=WEIGHTS_BESIDE)
    write_json(target / "config.json", config_of(trained, "fp32"))
    write_json(target / "generation_config.json", generation_config_of(trained))
    write_json(target / "tokenizer_config.json", tokenizer_config_of(trained))  # transformers.js asks for it
    trained.tokenizer.save(target / "tokenizer.json")


def verify(trained: Trained, target: Path, precision: str) -> Iterator[str]:
    """What ONNX Runtime reads: logits in one pass and token by token, and greedy tokens. In int8, its loss."""
    onnx.checker.check_model(target / "model.onnx", full_check=True)
    probe, network = Probe.of(trained), _Network(trained, target / "model.onnx")
    whole, _ = network.read(probe.window)
    if precision == "int8":
        if not bool(whole.isfinite().all()):
            raise VerificationFailed("ONNX Runtime reads int8 logits that are no numbers: export fp32")
        yield loss_difference(trained, lambda tokens: network.read(tokens)[0], "ONNX Runtime in int8")
        return
    difference = probe.check_logits(whole, "ONNX Runtime")
    cache: dict[str, Any] | None = None
    rows = []
    for token in probe.window:
        row, cache = network.read([token], cache)
        rows.append(row)
    difference = max(difference, probe.check_logits(torch.cat(rows), "ONNX Runtime, token by token"))
    logits, cache = network.read(probe.prompt)
    written: list[int] = []
    while len(written) < len(probe.continuation):
        written.append(int(logits[-1].argmax()))
        logits, cache = network.read(written[-1:], cache)
    n_equal = probe.check_tokens(written, "ONNX Runtime")
    yield (
        f"ONNX Runtime {onnxruntime.__version__} gives the same logits at {len(probe.window)} positions"
        f" (within {max(difference, 1e-7):.1g}) and the same {n_equal} greedy tokens"
    )


class _Network:
    """The written graph in ONNX Runtime, for one text."""

    def __init__(self, trained: Trained, path: Path) -> None:
        config = trained.model.config
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of unused initializers that its own optimizer made unused
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.nothing = torch.zeros(1, config.n_head, 0, config.n_embd // config.n_head).numpy()

    def read(self, tokens: list[int], cache: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Logits (len(tokens), n_vocab) of tokens that follow what the cache holds, and the cache with them in it."""
        _, *presents = (output.name for output in self.session.get_outputs())
        cache = cache or {name.replace("present", "past_key_values"): self.nothing for name in presents}
        n_past = next(iter(cache.values())).shape[2]
        positions = torch.arange(n_past, n_past + len(tokens))[None].numpy()
        mask = torch.ones(1, n_past + len(tokens), dtype=torch.long).numpy()
        fed = {"input_ids": [tokens], "attention_mask": mask, "position_ids": positions, **cache}
        logits, *tensors = self.session.run(None, fed)
        return torch.from_numpy(logits[0]), dict(zip(cache, tensors, strict=True))

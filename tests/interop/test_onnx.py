from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from groundling.corpus.tokenizer import Tokenizer
from groundling.interop import onnx as export
from groundling.interop.trained import Trained
from groundling.interop.verification import VerificationFailed

from .conftest import SHAPES, MakeTrained, keep_text


@pytest.fixture(params=list(SHAPES))
def trained(request: pytest.FixtureRequest, make_trained: MakeTrained) -> Trained:
    return make_trained(request.param)


def test_onnx_runtime_reads_our_logits_and_tokens(trained: Trained, tmp_path: Path) -> None:
    export.write(trained, tmp_path / "out", "fp32")
    (line,) = export.verify(trained, tmp_path / "out", "fp32")
    assert f"at {trained.model.config.n_ctx} positions" in line


def test_every_weight_is_stored_once(trained: Trained, tmp_path: Path) -> None:
    export.write(trained, tmp_path / "out", "fp32")
    weights = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    sizes = [int(np.prod(tensor.dims)) for tensor in weights if tensor.name.startswith("transformer.")]
    assert sum(sizes) == trained.model.config.n_parameters()
    assert sum(int(np.prod(tensor.dims)) for tensor in weights) < sum(sizes) + 100


def test_texts_of_different_lengths_are_read_together(make_trained: MakeTrained, tmp_path: Path) -> None:
    """As optimum and transformers.js do it: padded on the left, hidden by the mask."""
    trained = make_trained("odd")
    export.write(trained, tmp_path / "out", "fp32")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    config = trained.model.config
    long, short = [5, 7, 11, 13, 300], [17, 19]
    padding = len(long) - len(short)
    fed = {
        "input_ids": [long, [0] * padding + short],
        "attention_mask": [[1] * len(long), [0] * padding + [1] * len(short)],
        "position_ids": [list(range(len(long))), [0] * padding + list(range(len(short)))],
    }
    nothing = np.zeros((2, config.n_head, 0, config.n_embd // config.n_head), np.float32)
    caches = [entry.name for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    assert len(caches) == 2 * config.n_layer
    logits, *presents = session.run(None, fed | dict.fromkeys(caches, nothing))
    assert {present.shape for present in presents} == {(2, config.n_head, 5, config.n_embd // config.n_head)}
    for row, text in zip(logits, (long, short), strict=True):
        with torch.inference_mode():
            own = trained.model.logits(trained.model.hidden(torch.tensor([text])))[0]
        np.testing.assert_allclose(row[-len(text) :], own.numpy(), atol=1e-4)


def test_large_weights_go_to_a_file_of_their_own(
    make_trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1000)
    trained = make_trained()
    for precision in ("fp32", "int8"):
        out = tmp_path / precision
        export.write(trained, out, precision)
        assert (out / "model.onnx").stat().st_size < 50_000
        files = {path.name for path in out.iterdir()}
        assert len(files) == 6, files
        assert "model.onnx_data" in files
        assert "model.onnx_data" in str(onnx.load(out / "model.onnx", load_external_data=False).graph.initializer)
        assert list(export.verify(trained, out, precision))


def test_int8_is_small_and_near(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = keep_text(make_trained("odd"), tmp_path / "run")
    for precision in ("fp32", "int8"):
        export.write(trained, tmp_path / precision, precision)
    full, small = ((tmp_path / of / "model.onnx").stat().st_size for of in ("fp32", "int8"))
    assert small < 0.4 * full
    (line,) = export.verify(trained, tmp_path / "int8", "int8")
    assert line.startswith("corpus/loss ")
    assert abs(float(line.partition(" (")[2].partition(")")[0])) < 0.3


@pytest.mark.parametrize("part", ["transformer.h.1.attn.c_attn.bias", "transformer.wpe.weight", "scale", "cubic"])
def test_another_graph_is_refused(part: str, make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained()
    export.write(trained, tmp_path / "out", "fp32")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == part)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.1), part))
    onnx.save(model, path)
    with pytest.raises(VerificationFailed, match="ONNX Runtime"):
        list(export.verify(trained, tmp_path / "out", "fp32"))


def test_the_cache_is_read_where_it_is_written(make_trained: MakeTrained, tmp_path: Path) -> None:
    """A graph whose keys are right in one pass, but in the wrong order token by token."""
    trained = make_trained()
    export.write(trained, tmp_path / "out", "fp32")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if "present.1.key" in node.output)
    node.input[0], node.input[1] = node.input[1], node.input[0]
    onnx.save(model, path)
    with pytest.raises(VerificationFailed, match="token by token"):
        list(export.verify(trained, tmp_path / "out", "fp32"))


def test_the_files_beside_the_graph(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained()
    export.write(trained, tmp_path / "out", "fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == trained.model.config.n_ctx
    assert config["eos_token_id"] == trained.tokenizer.end_of_text_id
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())  # transformers.js loads none without
    assert (named["tokenizer_class"], named["model_max_length"]) == ("GPT2Tokenizer", trained.window)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").sha256 == trained.tokenizer.sha256

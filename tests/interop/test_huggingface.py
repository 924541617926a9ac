from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from groundling.corpus.tokenizer import END_OF_TEXT, Tokenizer
from groundling.errors import ConfigError
from groundling.interop import huggingface
from groundling.interop.trained import Trained
from groundling.interop.verification import VerificationFailed

from .conftest import SHAPES, MakeTrained


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> Tokenizer:
    return Tokenizer.gpt2()


@pytest.fixture(scope="session")
def exported(make_trained: MakeTrained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    trained = make_trained("odd")
    target = tmp_path_factory.mktemp("hf") / "odd"
    huggingface.write(trained, target, "fp32")
    return trained, target


@pytest.fixture(scope="session")
def theirs(exported: tuple[Trained, Path]) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(exported[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_wrote(
    make_trained: MakeTrained, tmp_path: Path, shape: str, precision: str
) -> None:
    trained = make_trained(shape)
    huggingface.write(trained, tmp_path / "out", precision)
    lines = list(huggingface.verify(trained, tmp_path / "out", precision))
    assert "the same logits at all" in lines[0]
    assert len(lines) == 2 + (precision != "fp32")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        kinds = {file.get_tensor(name).dtype for name in names}
    assert kinds == {huggingface.DTYPES[precision]}
    assert not {"lm_head.weight", "transformer.h.0.attn.bias"} & names
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # in the precision of its config.json
    assert model.dtype == huggingface.DTYPES[precision]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2s_own_tokenizer_goes_the_same_way(
    make_trained: MakeTrained, gpt2_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    trained = make_trained("one", gpt2_tokenizer)
    huggingface.write(trained, tmp_path / "out", "fp32")
    assert len(list(huggingface.verify(trained, tmp_path / "out", "fp32"))) == 2
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (50257, 50256, 50256)


def test_the_files_say_what_transformers_asks(exported: tuple[Trained, Path]) -> None:
    trained, target = exported
    config = json.loads((target / "config.json").read_text())
    assert config["n_positions"] == config["n_ctx"] == trained.model.config.n_ctx
    assert {config[name] for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")} == {0.0}
    assert config["dtype"] == config["torch_dtype"] == "float32"
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    assert tokenizer["clean_up_tokenization_spaces"] is False, "transformers 4 would make `a.` of `a .`"
    assert tokenizer["model_max_length"] == trained.window
    sampling = transformers.GenerationConfig.from_pretrained(target)
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 0.8, 50)
    assert sampling.eos_token_id == sampling.pad_token_id == trained.tokenizer.end_of_text_id
    assert sampling.max_new_tokens <= trained.window
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    model.save_pretrained(target.parent / "again")  # refuses settings that contradict each other


def test_sampling_is_the_runs_own(exported: tuple[Trained, Path], tmp_path: Path) -> None:
    record = {"config": {"sampling": {"temperature": 0, "max_tokens": 3, "seed": 5, "stop": ["x"], "unknown": 1}}}
    huggingface.write(replace(exported[0], record=record), tmp_path / "greedy", "fp32")
    sampling = transformers.GenerationConfig.from_pretrained(tmp_path / "greedy")
    sampling.validate(strict=True)
    assert (sampling.do_sample, sampling.max_new_tokens, sampling.temperature) == (False, 3, None)


TRICKY = st.text(st.characters(codec="utf-8")) | st.text(" \r\n\t'sdA🍾é1.<|>", max_size=40)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TRICKY)
def test_their_tokenizer_is_ours(
    exported: tuple[Trained, Path], theirs: transformers.PreTrainedTokenizerBase, text: str
) -> None:
    own = exported[0].tokenizer
    ids = own.encode(text)
    assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    assert theirs.decode(ids) == text
    if END_OF_TEXT not in text:
        assert theirs(text)["input_ids"] == ids


def test_only_the_end_of_text_spelled_out_is_read_otherwise(
    exported: tuple[Trained, Path], theirs: transformers.PreTrainedTokenizerBase
) -> None:
    own = exported[0].tokenizer
    assert theirs(END_OF_TEXT)["input_ids"] == [own.end_of_text_id] == [theirs.eos_token_id]
    assert theirs(END_OF_TEXT, split_special_tokens=True)["input_ids"] == own.encode(END_OF_TEXT)


def test_the_old_files_alone_are_enough(exported: tuple[Trained, Path], tmp_path: Path) -> None:
    trained, target = exported
    old = [str(target / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = transformers.GPT2Tokenizer(*old)
    for text in huggingface.TEXTS:
        assert tokenizer(text)["input_ids"] == trained.tokenizer.encode(text)
    from tokenizers.implementations import ByteLevelBPETokenizer

    rust = ByteLevelBPETokenizer.from_file(*old)
    assert rust.encode("hanging on the wall; it's").ids == trained.tokenizer.encode("hanging on the wall; it's")


def test_a_weight_that_fp16_cannot_hold_is_refused(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = make_trained("small")
    with torch.no_grad():
        trained.model.transformer.h[1].mlp.c_fc.weight[3, 4] = -70_000.0
    with pytest.raises(ConfigError, match=r"7e\+04 in transformer\.h\.1\.mlp\.c_fc\.weight"):
        huggingface.write(trained, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()
    huggingface.write(trained, tmp_path / "out", "bf16")


@pytest.mark.parametrize(
    ("name", "with_transformers"),
    [
        *((name, True) for name in ("model.safetensors", "tokenizer.json", "config.json")),  # it leaves the others
        *((name, False) for name in ("model.safetensors", "tokenizer.json", "vocab.json", "merges.txt")),
    ],
)
def test_what_was_damaged_is_refused(
    exported: tuple[Trained, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    with_transformers: bool,
) -> None:
    if not with_transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    trained, _ = exported
    target = tmp_path / "out"
    huggingface.write(trained, target, "bf16")
    lines = list(huggingface.verify(trained, target, "bf16"))
    assert ("transformers is not installed" in lines[0]) != with_transformers
    path = target / name
    match name:
        case "model.safetensors":
            tensors = load_file(path)
            tensors["transformer.wpe.weight"][-1, -1] += 0.5
            save_file(tensors, path, metadata={"format": "pt"})
        case "vocab.json":
            path.write_text(json.dumps({token: 300 - number for token, number in trained.tokenizer.vocab.items()}))
        case "merges.txt":
            path.write_text("\n".join(path.read_text().split("\n")[:-2]) + "\n")
        case "tokenizer.json":
            document = json.loads(path.read_text())
            document["model"]["merges"] = document["model"]["merges"][1:]
            path.write_text(json.dumps(document))
        case _:
            path.write_text(path.read_text().replace('"gelu_new"', '"gelu"'))
    with pytest.raises(VerificationFailed):
        list(huggingface.verify(trained, target, "bf16"))

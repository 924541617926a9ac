"""torch.compile changes nothing but speed, and its failure costs nothing but speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groundling import runtime
from groundling.evaluation import glance
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.optim.optimizer import OptimConfig, make_optimizer
from groundling.runtime import RuntimeConfig
from groundling.training.compiled import CompiledLoss
from groundling.training.growth import GrowthConfig

MakeTrainer = Any


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """Each test has all of the compiler's patience, and leaves threads and algorithms as they were."""
    torch.compiler.reset()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_a_compiled_run_has_the_losses_of_an_eager_one(make_trainer: MakeTrainer) -> None:
    eager, eager_memory = make_trainer("eager")
    eager.train()
    compiled, memory = make_trainer("compiled", runtime=replace(eager.runtime, compile=True))
    compiled.train()
    assert not memory.notes
    assert isinstance(compiled.loss_sum, CompiledLoss)
    assert compiled.loss_sum.function is not compiled.loss_sum.eager
    assert memory.losses() == pytest.approx(eager_memory.losses(), abs=1e-4)
    tokens = eager.train_tokens
    assert compiled.evaluator.loss(tokens) == pytest.approx(eager.evaluator.loss(tokens), abs=1e-4)


def test_compiled_steps_repeat_bit_for_bit_on_several_threads() -> None:
    """Without deterministic algorithms, compiled code adds up the embedding's gradient in a racing order."""
    runtime.resolve(RuntimeConfig(device="cpu", threads=2))
    sums = []
    for _ in range(3):
        torch.manual_seed(0)
        model = GPT2(GPTConfig(n_layer=2, n_head=2, n_embd=64, n_ctx=64, n_vocab=320))
        optimizer = make_optimizer(model, OptimConfig())
        optimizer.param_groups[0]["lr"] = 1e-3
        loss_sum = torch.compile(model.loss_sum, dynamic=False)
        draws = torch.Generator().manual_seed(1)
        for _step in range(40):
            tokens = torch.randint(320, (8, 65), generator=draws)
            (loss_sum(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / 512).backward()
            optimizer.step()
            optimizer.zero_grad()
        sums.append(model.head_weight.detach().double().sum().item())
    assert sums[0] == sums[1] == sums[2]


def test_the_compiler_is_asked_for_deterministic_code(make_trainer: MakeTrainer) -> None:
    from torch._inductor import config

    eager, _ = make_trainer("unused")
    torch.use_deterministic_algorithms(False)
    runtime.resolve(RuntimeConfig(device="cpu"))
    make_trainer("run", runtime=replace(eager.runtime, compile=True))
    assert config.deterministic


def test_a_run_never_recompiles(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is no multiple of its windows, which come in pieces; looks have short batches; it goes on."""
    for name, value in {"N_GROUPS": 2, "GROUP": 5, "MAX_SHARE": 1.0}.items():
        monkeypatch.setattr(glance, name, value)
    eager, _ = make_trainer("unused")
    compiled = replace(eager.runtime, compile=True)
    windows = replace(eager.recipe.windows, pieces=4, short_fraction=0.1)
    heldout = eager.train_tokens[:70]
    stopping = replace(eager.recipe.stopping, patience=9, target=1e-9)
    begun, _ = make_trainer("run", heldout, runtime=compiled, windows=windows, stopping=stopping)
    begun.train()
    assert all(begun.take(name) > 0 for name in begun.looks.sizes())
    assert begun.looks.glance("corpus/loss_offset") is not None
    stopping = replace(stopping, max_steps=14)
    resumed, _ = make_trainer("run", heldout, runtime=compiled, windows=windows, stopping=stopping)
    resumed.resume()
    resumed.train()
    resumed.take("corpus/loss_offset")
    assert (begun.loss_sum.compiled, begun.loss_sum.n_recompilations) == (True, 0)
    assert (resumed.loss_sum.compiled, resumed.loss_sum.n_recompilations) == (True, 0)


def test_blocks_that_join_are_compiled_once_and_are_no_recompilation(make_trainer: MakeTrainer) -> None:
    eager, eager_memory = make_trainer("eager", growth=GrowthConfig(2, 0.1))
    eager.train()
    compiled, memory = make_trainer(
        "compiled", runtime=replace(eager.runtime, compile=True), growth=GrowthConfig(2, 0.1)
    )
    compiled.train()
    assert [line["train/blocks"] for line in memory.metrics] == [1] * 4 + [2] * 6
    assert memory.losses() == pytest.approx(eager_memory.losses(), abs=1e-4)
    assert (compiled.loss_sum.compiled, compiled.loss_sum.n_recompilations) == (True, 0)


def test_a_recompilation_is_counted() -> None:
    torch.manual_seed(0)
    model = GPT2(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_ctx=8, n_vocab=16))
    loss_sum = CompiledLoss(model.loss_sum, {(2, 8), (2, 2)}, warn=pytest.fail)
    for length, n_recompilations in ((8, 0), (8, 0), (2, 0), (4, 1), (8, 1), (2, 1)):
        loss_sum(torch.zeros(2, length, dtype=torch.int64), torch.ones(2, length, dtype=torch.int64))
        assert loss_sum.n_recompilations == n_recompilations
    with torch.no_grad():
        loss_sum(torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    assert loss_sum.n_recompilations == 1


def test_a_compiler_that_fails_costs_a_warning(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    eager, eager_memory = make_trainer("eager")
    eager.train()
    broken, memory = make_trainer("broken", runtime=replace(eager.runtime, compile=True))
    with config.patch({"cpp.cxx": ("/bin/false",), "force_disable_caches": True}):
        broken.train()
    assert ["torch.compile failed" in note for note in memory.notes] == [True]
    assert memory.losses() == eager_memory.losses()


def test_a_compiler_that_fails_at_the_backward_pass_costs_a_warning(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled with the forward pass, while there is a way back."""
    from torch._inductor import compile_fx, config

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no backward pass")

    torch.compiler.reset()
    monkeypatch.setattr(compile_fx, "compile_fx_backward", fail)
    eager, eager_memory = make_trainer("eager")
    eager.train()
    broken, memory = make_trainer("broken", runtime=replace(eager.runtime, compile=True))
    with config.patch({"force_disable_caches": True}):
        broken.train()
    assert ["torch.compile failed" in note for note in memory.notes] == [True]
    assert memory.losses() == eager_memory.losses()

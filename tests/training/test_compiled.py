"""torch.compile changes nothing but speed, and its failure costs nothing but speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groundling.training.compiled import CompiledLoss

MakeTrainer = Any


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


def test_a_compiler_that_fails_costs_a_warning(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setattr(config.cpp, "cxx", ("/bin/false",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    eager, eager_memory = make_trainer("eager")
    eager.train()
    broken, memory = make_trainer("broken", runtime=replace(eager.runtime, compile=True))
    broken.train()
    assert [note for note in memory.notes if "torch.compile failed" in note] == memory.notes[:1]
    assert memory.losses() == eager_memory.losses()

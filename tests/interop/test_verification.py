from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from groundling.errors import CheckpointError
from groundling.evaluation.corpus_loss import Evaluator
from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed, loss_difference
from groundling.runtime import RuntimeConfig, resolve

from .conftest import N_TEXT, SHAPES, MakeTrained, keep_text, random_network


@pytest.fixture(params=list(SHAPES))
def trained(request: pytest.FixtureRequest, make_trained: MakeTrained) -> Trained:
    return make_trained(request.param)


def test_a_probe_holds_the_model_that_it_is_of(trained: Trained) -> None:
    probe = Probe.of(trained)
    assert probe.check_logits(probe.logits.double(), "itself") == 0
    assert probe.check_tokens([*probe.continuation, 5], "itself") == len(probe.continuation) > 0


def test_a_probe_covers_every_position_and_refuses_one_that_differs(trained: Trained) -> None:
    probe = Probe.of(trained)
    assert len(probe.window) == trained.model.config.n_ctx
    for place in range(len(probe.window)):
        wrong = probe.logits.clone()
        wrong[place, 7] += 2e-4
        with pytest.raises(VerificationFailed, match="other logits"):
            probe.check_logits(wrong, "a program")


def test_logits_that_are_no_numbers_are_refused(trained: Trained) -> None:
    probe = Probe.of(trained)
    wrong = probe.logits.clone()
    wrong[0, 0] = torch.nan
    with pytest.raises(VerificationFailed, match="nan"):
        probe.check_logits(wrong, "a program")
    with pytest.raises(VerificationFailed, match="shape"):
        probe.check_logits(probe.logits[:, 1:], "a program")


def test_other_or_fewer_tokens_are_refused(trained: Trained) -> None:
    probe = Probe.of(trained)
    with pytest.raises(VerificationFailed, match="continues"):
        probe.check_tokens([*probe.continuation[:-1], probe.continuation[-1] ^ 1], "a program")
    with pytest.raises(VerificationFailed, match="wrote"):
        probe.check_tokens(probe.continuation[:-1], "a program")


def test_a_continuation_ends_where_the_order_of_two_tokens_would_be_chance(trained: Trained) -> None:
    with torch.no_grad():
        trained.model.transformer.ln_f.weight.zero_()
        trained.model.transformer.ln_f.bias.zero_()  # all logits are nought
    assert Probe.of(trained).continuation == []


def test_a_difference_of_losses_is_that_of_corpus_loss(trained: Trained, tmp_path: Path) -> None:
    trained = keep_text(trained, tmp_path)
    assert trained.folder is not None
    train = trained.train_tokens()
    assert train is not None
    runtime = resolve(RuntimeConfig(device="cpu", dtype="fp32", threads=1, compile="off"))
    loss = Evaluator(trained.model.loss_sum, trained.window, runtime).loss(train.tokens)
    line = loss_difference(trained, lambda tokens: _logits(trained, tokens), "itself")
    assert line.startswith(f"corpus/loss {loss:.4f} here, {loss:.4f} in itself (")
    assert line.endswith(f"over all {N_TEXT - 1} predictions of the training text")
    even = loss_difference(trained, lambda tokens: torch.zeros(len(tokens), 301), "a fair die")
    assert f", {torch.tensor(301).log():.4f} in a fair die (" in even


def test_a_loss_over_a_part_is_no_corpus_loss(make_trained: MakeTrained, tmp_path: Path) -> None:
    trained = keep_text(make_trained(), tmp_path)
    line = loss_difference(trained, lambda tokens: _logits(trained, tokens), "itself", budget_s=0)
    assert line.startswith("loss ")
    assert line.endswith(f"over 1 of the {-(-(N_TEXT - 1) // trained.window)} windows of the training text")


def test_without_its_text_a_model_is_held_against_random_tokens(make_trained: MakeTrained) -> None:
    trained = make_trained()
    line = loss_difference(trained, lambda tokens: _logits(trained, tokens) + 1, "itself")
    assert "no loss was compared: log-probabilities in itself are within " in line
    assert float(line.split("within ")[1].split()[0]) < 1e-5
    with pytest.raises(VerificationFailed, match="no numbers in a program"):
        loss_difference(trained, lambda tokens: torch.full((len(tokens), 301), torch.inf), "a program")


def test_a_loss_that_is_no_number_is_refused(make_trained: MakeTrained, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match="nan in a program"):
        loss_difference(
            keep_text(make_trained(), tmp_path), lambda t: torch.full((len(t), 301), torch.nan), "a program"
        )


@torch.inference_mode()
def _logits(trained: Trained, tokens: list[int]) -> Tensor:
    return trained.model.logits(trained.model.hidden(torch.tensor([tokens])))[0]


def test_a_model_that_gives_no_numbers_is_not_exported(trained: Trained) -> None:
    with torch.no_grad():
        trained.model.head_weight[3] = torch.nan
    with pytest.raises(CheckpointError, match="no numbers"):
        Probe.of(trained)


def test_a_model_of_one_position_has_logits_and_no_continuation(make_trained: MakeTrained) -> None:
    small = make_trained("small")
    config = replace(small.model.config, n_ctx=1)
    probe = Probe.of(replace(small, model=random_network(config), window=1))
    assert (len(probe.window), len(probe.logits), probe.continuation) == (1, 1, [])

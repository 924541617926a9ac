from __future__ import annotations

import pytest
import torch

from groundling.interop.trained import Trained
from groundling.interop.verification import Probe, VerificationFailed

from .conftest import SHAPES, MakeTrained


@pytest.fixture(params=list(SHAPES))
def trained(request: pytest.FixtureRequest, make_trained: MakeTrained) -> Trained:
    return make_trained(request.param)


def test_a_probe_holds_the_model_that_it_is_of(trained: Trained) -> None:
    probe = Probe.of(trained)
    assert probe.hold_logits(probe.logits.double(), "itself") == 0
    assert probe.hold_tokens([*probe.continuation, 5], "itself") == len(probe.continuation) > 0


def test_a_probe_covers_every_position_and_refuses_one_that_differs(trained: Trained) -> None:
    probe = Probe.of(trained)
    assert len(probe.window) == trained.model.config.n_ctx
    for place in range(len(probe.window)):
        wrong = probe.logits.clone()
        wrong[place, 7] += 2e-4
        with pytest.raises(VerificationFailed, match="other logits"):
            probe.hold_logits(wrong, "a program")


def test_logits_that_are_no_numbers_are_refused(trained: Trained) -> None:
    probe = Probe.of(trained)
    wrong = probe.logits.clone()
    wrong[0, 0] = torch.nan
    with pytest.raises(VerificationFailed, match="nan"):
        probe.hold_logits(wrong, "a program")
    with pytest.raises(VerificationFailed, match="shape"):
        probe.hold_logits(probe.logits[:, 1:], "a program")


def test_other_or_fewer_tokens_are_refused(trained: Trained) -> None:
    probe = Probe.of(trained)
    with pytest.raises(VerificationFailed, match="continues"):
        probe.hold_tokens([*probe.continuation[:-1], probe.continuation[-1] ^ 1], "a program")
    with pytest.raises(VerificationFailed, match="wrote"):
        probe.hold_tokens(probe.continuation[:-1], "a program")


def test_a_continuation_ends_where_the_order_of_two_tokens_would_be_chance(trained: Trained) -> None:
    with torch.no_grad():
        trained.model.transformer.ln_f.weight.zero_()
        trained.model.transformer.ln_f.bias.zero_()  # all logits are nought
    assert Probe.of(trained).continuation == []

"""Which targets goldfish loss drops: the same ones, wherever and however the passage is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from groundling.corpus.config import CorpusConfig
from groundling.corpus.goldfish import PLAIN, ObjectiveConfig, dropped, dropped_share
from groundling.corpus.load import load_corpus
from groundling.corpus.windows import WindowConfig, Windows, gather, grid
from groundling.errors import ConfigError
from groundling.kernels.reference import IGNORED_TARGET

Ids = NDArray[np.uint16]

SMALL = ObjectiveConfig("goldfish", drop_every=3, context=2)
ids = st.lists(st.integers(0, 5), min_size=2, max_size=60)
contexts = st.integers(1, 6)


def array(values: list[int]) -> Ids:
    return np.array(values, dtype=np.uint16)


def hash_by_hand(context: list[int]) -> int:
    """The docstring's hash in Python's unbounded integers, powers written out."""
    h, base, whole = len(context), 6364136223846793005, 2**64
    z = 0x9E3779B97F4A7C15 * base**h + sum(t * base ** (h - i) for i, t in enumerate(context, start=1))
    z %= whole
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % whole
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % whole
    return z ^ (z >> 31)


def test_a_small_mask_by_hand() -> None:
    text = [7, 1, 0, 4, 7, 9, 2, 0, 4, 7, 1, 3]
    mask = dropped(array(text), 0, len(text), SMALL).tolist()
    assert mask == [False, False] + [hash_by_hand(text[p - 2 : p]) % 3 == 0 for p in range(2, len(text))]
    assert [p for p, out in enumerate(mask) if out] == [5, 6, 7, 8, 10]  # pinned, for runs to resume
    assert mask[5] is mask[10] is True  # after 4, 7
    assert mask[4] is mask[9] is False  # after 0, 4


@given(ids, ids, ids, st.lists(st.integers(0, 5), min_size=7, max_size=40), contexts)
def test_a_passage_is_dropped_alike_wherever_it_stands(
    before: list[int], between: list[int], after: list[int], passage: list[int], h: int
) -> None:
    config = ObjectiveConfig("goldfish", drop_every=2, context=h)
    text = array(before + passage + between + passage + after)
    masks = [
        dropped(text, start + h, start + len(passage), config)
        for start in (len(before), len(before) + len(passage) + len(between))
    ]
    assert masks[0].tolist() == masks[1].tolist()
    alone = dropped(array(passage), h, len(passage), config)
    assert masks[0].tolist() == alone.tolist()


@given(ids, contexts, st.integers(1, 17), st.integers(0, 16))
def test_the_mask_is_that_of_the_text_in_windows_of_any_cut(text: list[int], h: int, length: int, offset: int) -> None:
    """Also across a window's border: its first targets are decided by tokens that it does not hold."""
    tokens, config = array(text), ObjectiveConfig("goldfish", drop_every=2, context=h)
    windows = grid(len(tokens), length, offset % length)
    batch, whole = gather(tokens, windows, length, config), gather(tokens, windows, length)
    mask = dropped(tokens, 0, len(tokens), config)
    for row, (start, n) in enumerate(windows):
        targets = tokens[start + 1 : start + n + 1].astype(np.int64)
        expected = np.where(mask[start + 1 : start + n + 1], IGNORED_TARGET, targets)
        assert batch.targets[row, :n].tolist() == expected.tolist()
    assert batch.inputs.tolist() == whole.inputs.tolist()
    assert batch.n_targets == int((batch.targets != IGNORED_TARGET).sum()) == len(tokens) - 1 - mask[1:].sum()
    assert batch.n_read == whole.n_read == whole.n_targets == len(tokens) - 1


@pytest.mark.parametrize("order", ["permuted", "shifted", "sequential"])
def test_no_pass_ever_trains_on_a_dropped_target(order: Any) -> None:
    tokens = np.arange(203, dtype=np.uint16)  # a target's value is its position
    config = ObjectiveConfig("goldfish")
    mask = dropped(tokens, 0, len(tokens), config)
    windows = Windows(tokens, WindowConfig(16, 4, order=order), seed=7, objective=config)
    trained = {int(t) for step in range(30) for t in windows.batch(step).targets.flatten()} - {IGNORED_TARGET}
    last = 192 if order == "sequential" else 202  # the sequential order never reads the tail
    assert trained == {p for p in range(1, last + 1) if not mask[p]}
    assert 0 < mask.sum() < 100


@settings(max_examples=30)
@given(st.lists(st.integers(0, 65535), min_size=30, max_size=30), st.integers(1, 8), st.integers(1, 65535))
def test_a_decision_depends_on_the_h_tokens_before_and_on_nothing_else(text: list[int], h: int, change: int) -> None:
    config, p = ObjectiveConfig("goldfish", drop_every=2, context=h), 20
    decision = dropped(array(text), p, p + 1, config)
    for place in (*range(p - h), *range(p, 30)):
        other = text.copy()
        other[place] = (other[place] + change) % 65536
        assert dropped(array(other), p, p + 1, config) == decision


def test_every_one_of_the_h_tokens_and_their_order_matters() -> None:
    """With a hash that mixes well, any change turns the decision with k = 2 about half the time."""
    config = ObjectiveConfig("goldfish", drop_every=2, context=5)
    contexts = np.random.default_rng(0).integers(1000, size=(400, 6)).astype(np.uint16)

    def decisions(rows: Ids) -> NDArray[np.bool_]:
        return np.array([dropped(row, 5, 6, config)[0] for row in rows])

    plain = decisions(contexts)
    for place in range(5):
        changed = contexts.copy()
        changed[:, place] += 1
        assert 0.4 < np.mean(decisions(changed) != plain) < 0.6, place
    reversed_contexts = np.concatenate([contexts[:, 4::-1], contexts[:, 5:]], axis=1)
    assert 0.4 < np.mean(decisions(reversed_contexts) != plain) < 0.6


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_first_h_are_counted(dtype: Any) -> None:
    for h in (1, 5, 13):
        config = ObjectiveConfig("goldfish", drop_every=2, context=h)
        texts = [np.random.default_rng(seed).integers(9, size=40).astype(dtype) for seed in range(30)]
        ever = np.any([dropped(text, 0, 40, config) for text in texts], axis=0)
        assert not ever[:h].any()
        assert ever[h:].all()  # 30 texts, one half each
        assert not dropped(texts[0][:h], 0, h, config).any()  # a text no longer than that


def test_one_in_k_targets_of_tiny_shakespeare_are_dropped(tmp_path: Path) -> None:
    """The spread of 338,024 independent drops would be 0.0009 at most; passages that recur add to it."""
    tokens = load_corpus(CorpusConfig(), tmp_path, own_heldout=False).train.tokens
    for k in (2, 3, 4, 8):
        assert dropped_share(tokens, ObjectiveConfig("goldfish", drop_every=k)) == pytest.approx(1 / k, abs=0.004)
    config = ObjectiveConfig("goldfish")
    assert dropped_share(tokens, config) == dropped(tokens, 1, len(tokens), config).mean()


def test_the_share_of_a_text_is_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, config = np.arange(152, dtype=np.uint16), SMALL
    whole = dropped_share(tokens, config)
    monkeypatch.setattr("groundling.corpus.goldfish.PIECE_TOKENS", 7)
    assert dropped_share(tokens, config) == whole > 0


def test_plain_loss_drops_nothing() -> None:
    tokens = array(list(range(50)))
    assert not dropped(tokens, 0, 50, PLAIN).any()
    assert dropped_share(tokens, PLAIN) == 0


@pytest.mark.parametrize("setting", [{"drop_every": 1}, {"drop_every": 2**64}, {"context": 0}])
def test_settings_that_drop_everything_or_know_nothing_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"objective.{next(iter(setting))}"):
        ObjectiveConfig("goldfish", **setting)

"""Losses over whole texts as a run takes them: by house name, with progress, and left at once when a signal comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from groundling.corpus.shards import Tokens
from groundling.evaluation.corpus_loss import Evaluator, n_tokens_read
from groundling.evaluation.glance import Glance, glance


class Looks:
    """What a run can see of its texts."""

    def __init__(
        self,
        evaluator: Evaluator,
        train: Tokens,
        heldout: Tokens | None,
        check: Callable[[], None],
        progress: Callable[[str, float], None],
    ) -> None:
        """`check` is called between batches and may raise; `progress` is told what is read, and which share is done."""
        self.evaluator, self.train, self.heldout = evaluator, train, heldout
        self.check, self.progress = check, progress

    def take(self, name: str) -> float:
        """The loss of this house name over its whole text."""
        tokens = self.heldout if name == "heldout/loss" else self.train
        assert tokens is not None, f"{name} asked for without its text"
        n_tokens = n_tokens_read(name, len(tokens), self.evaluator.length)
        n_read = 0

        def count(n_windows: int) -> None:
            nonlocal n_read
            self.check()
            n_read += n_windows * self.evaluator.length
            self.progress(name, min(1.0, n_read / n_tokens))

        evaluator = replace(self.evaluator, on_windows=count)
        return evaluator.offset_loss(tokens) if name == "corpus/loss_offset" else evaluator.loss(tokens)

    def glance(self, name: str) -> Glance | None:
        """A sample of the loss of this house name over the training text; None where the loss costs little more."""
        return glance(replace(self.evaluator, on_windows=lambda _: self.check()), name, self.train)

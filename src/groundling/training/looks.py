"""What a run sees of its whole texts, and how it is read: with progress shown, and left at once when a signal comes.

Invariant: what is read depends on texts and windows alone, not on how many windows are read at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from groundling.corpus.shards import Tokens
from groundling.evaluation.corpus_loss import Evaluator, n_tokens_read
from groundling.evaluation.glance import Glance, glance


class Looks:
    """The losses of one model over the texts of its run."""

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

    def sizes(self) -> dict[str, int]:
        """The losses that can be taken, by house name, and how many tokens each reads."""
        texts = {"corpus/loss": self.train, "corpus/loss_offset": self.train}
        if self.heldout is not None:
            texts["heldout/loss"] = self.heldout
        return {name: n_tokens_read(name, len(tokens), self.evaluator.length) for name, tokens in texts.items()}

    def take(self, name: str) -> float:
        """The loss of this house name over its whole text."""
        tokens = self.heldout if name == "heldout/loss" else self.train
        assert tokens is not None, f"{name} asked for without its text"
        n_tokens, n_read = self.sizes()[name], 0

        def count(n_windows: int) -> None:
            nonlocal n_read
            self.check()
            n_read += n_windows * self.evaluator.length
            self.progress(f"{name} over the whole text", min(1.0, n_read / n_tokens))

        evaluator = replace(self.evaluator, on_windows=count)
        return evaluator.offset_loss(tokens) if name == "corpus/loss_offset" else evaluator.loss(tokens)

    def glance(self, name: str) -> Glance | None:
        """A sample of the loss of this house name; None where the loss itself costs little more."""
        return glance(replace(self.evaluator, on_windows=lambda _: self.check()), name, self.train)

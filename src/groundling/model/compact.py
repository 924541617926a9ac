"""GPT-2 in which all ids that a text lacks share one row of the tied embedding.

Invariant: to ids in, logits out, losses and gradients this network is the full GPT-2 that `expanded` gives, but for
rounding. Nothing is left out of the softmax: the row counts as often as there are ids that share it.

The derivation is in docs/design/0008-unseen-ids-share-a-row.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from groundling.errors import ConfigError
from groundling.model.cache import Reading
from groundling.model.gpt2 import GPT2
from groundling.model.weights import TABLE, TIED, adopt

HeadVocabulary = Literal["full", "seen"]


class CompactGPT2(GPT2):
    """A full GPT-2 kept in fewer rows: one for each id that occurs in a text, and a last one for all the others.

    `config` is the size of what is computed; `expanded` has the full one.
    """

    places: Tensor
    """The row (n_vocab,) of each id of the full vocabulary."""

    def __init__(self, full: GPT2, seen: Tensor) -> None:
        """`seen` are the ids, ascending, that keep their rows. Takes over the other tensors of `full`.

        Raises `ConfigError` if no id is left to share a row.
        """
        n_vocab, n_seen = full.config.n_vocab, len(seen)
        if n_seen == n_vocab:
            raise ConfigError(f"head_vocabulary is seen, but the text has all {n_vocab:,} ids: leave it out")
        with torch.device("meta"):  # its weights are those of `full`: nothing is drawn
            super().__init__(replace(full.config, n_vocab=n_seen + 1))
        places = torch.full((n_vocab,), n_seen)
        places[seen] = torch.arange(n_seen)
        self.register_buffer("places", places, persistent=False)
        self.n_seen, self.n_unseen = n_seen, n_vocab - n_seen
        adopt(self, self._compacted(full))
        self.head_weight.register_hook(self._as_of_one_row)  # type: ignore[no-untyped-call]

    def hidden(self, tokens: Tensor, reading: Reading | None = None) -> Tensor:
        """As `GPT2.hidden`, for ids of the full vocabulary."""
        return super().hidden(self.places[tokens], reading)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `GPT2.logits`, for the full vocabulary."""
        return super().logits(hidden)[..., self.places]

    def loss_sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `GPT2.loss_sum`, over the full vocabulary."""
        targets = targets.flatten()
        rows = torch.where(targets < 0, targets, self.places[targets.clamp(min=0)])  # ignored, or no tokens at all
        return self._loss_sum(self.places[inputs], rows, self.n_unseen)

    def expanded(self) -> GPT2:
        """The full GPT-2 that this network is: it shares all tensors but the table, which is a copy."""
        with torch.device("meta"):
            full = GPT2(replace(self.config, n_vocab=len(self.places)))
        adopt(full, self.state_dict() | {TABLE: self.head_weight.detach()[self.places]})
        return full

    def take(self, full: GPT2) -> None:
        """Copy the weights of a full GPT-2. That is the inverse of `expanded`, bit for bit."""
        self.load_state_dict(self._compacted(full))

    def _compacted(self, full: GPT2) -> dict[str, Tensor]:
        """The state of `full` with a table of fewer rows, of which the last is the mean of those that share it.

        The mean of equal fp32 rows is that row exactly, because float64 holds their sum; Apple GPUs have none.
        """
        table, places = full.head_weight.detach(), self.places.to(full.head_weight.device)
        kept, shared = table[places < self.n_seen], table[places == self.n_seen]
        mean = shared.cpu().double().mean(dim=0, keepdim=True).to(table)
        rows = torch.cat([kept, mean])
        return full.state_dict() | {TABLE: rows, TIED: rows}

    def _as_of_one_row(self, gradient: Tensor) -> Tensor:
        """The gradient with that of the last row shared out evenly: what each row of the full model would get.

        So clipping and AdamW treat it as they would treat those.
        """
        return torch.cat([gradient[:-1], gradient[-1:] / self.n_unseen])


def expanded(model: GPT2) -> GPT2:
    """The full GPT-2 that a network is: itself, unless it is compact."""
    return model.expanded() if isinstance(model, CompactGPT2) else model

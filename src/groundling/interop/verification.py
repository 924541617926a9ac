"""What our own network says of a few tokens, for another program's reading of the same weights to be held against.

Invariant: an export that passes gives our logits at every position of its longest window and our greedy tokens; one
that does not raises, and nothing takes its final name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from groundling.corpus.shards import Tokens
from groundling.corpus.windows import gather, grid
from groundling.errors import CheckpointError, RunFailed
from groundling.generation.decode import generate
from groundling.generation.decoder import TorchDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.interop.trained import Trained

SEED = 20190214
"""Of the probe's random tokens; the day GPT-2 was announced."""
MAX_PROMPT = 16
N_CONTINUATION = 32
TOLERANCE = 1e-4
"""Largest difference of logits in fp32 (one program's order of summation against another's)."""

COMPARISON_S = 120.0
"""Seconds that a comparison of losses may take before it reads only a part of the training text."""

Logits = Callable[[list[int]], Tensor]
"""Another program's logits, or log-probabilities, (T, n_vocab) of T token ids that begin a window."""


class VerificationFailed(RunFailed):
    """What was written is not the model it was made from (exit code 1)."""


@dataclass(frozen=True)
class Probe:
    """A window of random tokens with its logits, and a prompt with its greedy continuation."""

    window: list[int]
    """As many random ids as the position table is long."""
    logits: Tensor
    """(len(window), n_vocab), fp32."""
    prompt: list[int]
    continuation: list[int]
    """Greedy tokens after the prompt, up to the first place where two of them are as good as equal."""

    @classmethod
    @torch.inference_mode()
    def of(cls, trained: Trained, tolerance: float = TOLERANCE) -> Probe:
        """A probe of this model; `tolerance` says how near two logits may be before their order is chance."""
        model, config = trained.model, trained.model.config
        generator = torch.Generator().manual_seed(SEED)
        window = torch.randint(config.n_vocab, (config.n_ctx,), generator=generator).tolist()
        logits = model.logits(model.hidden(torch.tensor([window])))[0]
        if not logits.isfinite().all():
            raise CheckpointError(f"{trained.name} gives logits that are no numbers: export another checkpoint of it")
        prompt = _prompt(trained, window)
        n_tokens = min(N_CONTINUATION, config.n_ctx - len(prompt))
        if n_tokens == 0:  # one position, and nothing after it
            return cls(window, logits, prompt, [])
        greedy = SamplingConfig(temperature=0, max_tokens=n_tokens)
        with TorchDecoder(model, config.n_ctx) as decoder:
            continuation = list(generate(decoder, prompt, greedy))
        rows = model.logits(model.hidden(torch.tensor([prompt + continuation])))[0, len(prompt) - 1 : -1]
        best = rows.topk(2).values
        sure = (best[:, 0] - best[:, 1] > 2 * tolerance).tolist()
        return cls(window, logits, prompt, continuation[: sure.index(False) if False in sure else None])

    def check_logits(self, theirs: Tensor, program: str, tolerance: float = TOLERANCE) -> float:
        """The largest difference of another program's logits (len(window), n_vocab) from ours.

        Raises `VerificationFailed` if it is above the tolerance, or not a number.
        """
        if theirs.shape != self.logits.shape:
            raise VerificationFailed(
                f"{program} gives logits of shape {tuple(theirs.shape)} where {tuple(self.logits.shape)} are ours:"
                " nothing was exported, please report this"
            )
        difference = float((theirs.float() - self.logits).abs().max())
        if not difference <= tolerance:
            raise VerificationFailed(
                f"{program} reads other logits from what was written, by up to {difference:.2g} (at most"
                f" {tolerance:.0e} is rounding): nothing was exported, please report this"
            )
        return difference

    def check_tokens(self, theirs: Sequence[int], program: str) -> int:
        """How many greedy tokens of another program, after `prompt`, equal ours: all of `continuation`.

        Raises `VerificationFailed` if one differs.
        """
        for place, (token, own) in enumerate(zip(theirs, self.continuation, strict=False)):
            if token != own:
                raise VerificationFailed(
                    f"{program} continues the same prompt with token {token} where ours is {own}, {place} tokens on:"
                    " nothing was exported, please report this"
                )
        if len(theirs) < len(self.continuation):
            raise VerificationFailed(
                f"{program} wrote {len(theirs)} tokens where ours wrote {len(self.continuation)}:"
                " nothing was exported, please report this"
            )
        return len(self.continuation)


def loss_difference(trained: Trained, theirs: Logits, where: str, budget_s: float = COMPARISON_S) -> str:
    """A line with the loss over the training text here and in another program's reading of what was written.

    `where` completes "in ...". Reads every window of the text if the first says that this takes no longer than
    `budget_s`, else evenly spaced ones, and the line says so; a loss over a part is not called corpus/loss. Without the
    text it reads a window of random tokens. Raises `VerificationFailed` if what it reads is no number.
    """
    train = trained.train_tokens()
    if train is None:
        difference = _difference(trained, theirs, where)
        return (
            f"the training text is not there, so no loss was compared: log-probabilities in {where} are within"
            f" {difference:.2g} of those here"
        )
    windows = grid(len(train.tokens), trained.window)
    started = time.perf_counter()
    sums = _losses(trained, train.tokens, windows[:1], theirs)
    n_affordable = int(budget_s / (time.perf_counter() - started))
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(len(windows), max(1, n_affordable))).astype(int))
    sums += _losses(trained, train.tokens, windows[chosen[1:]], theirs)
    n_predictions = int(windows[chosen, 1].sum())
    own, other = (sums / n_predictions).tolist()
    if not math.isfinite(other):
        raise VerificationFailed(
            f"the loss of what was written is {other} in {where}: the weights do not fit that format, export another"
        )
    losses = f"{own:.4f} here, {other:.4f} in {where} ({other - own:+z.4f})"
    if len(chosen) == len(windows):
        return f"corpus/loss {losses}, over all {n_predictions:,} predictions of the training text"
    return f"loss {losses}, over {len(chosen):,} of the {len(windows):,} windows of the training text"


@torch.inference_mode()
def _difference(trained: Trained, theirs: Logits, where: str) -> float:
    """The largest difference of another program's log-probabilities from ours, in a window of random tokens.

    Raises `VerificationFailed` if theirs are no numbers.
    """
    config = trained.model.config
    window = torch.randint(config.n_vocab, (config.n_ctx,), generator=torch.Generator().manual_seed(SEED))
    own = trained.model.logits(trained.model.hidden(window[None]))[0]
    difference = (theirs(window.tolist()).float().log_softmax(-1) - own.log_softmax(-1)).abs().max()
    if not difference.isfinite():
        raise VerificationFailed(
            f"logits of what was written are no numbers in {where}: the weights do not fit that format, export another"
        )
    return float(difference)


@torch.inference_mode()
def _losses(trained: Trained, tokens: Tokens, windows: NDArray[np.int64], theirs: Logits) -> NDArray[np.float64]:
    """Summed cross-entropy over some windows: our network's, and the other program's."""
    sums = np.zeros(2)
    for window in windows:
        batch = gather(tokens, window[None], int(window[1]))
        logits = theirs(batch.inputs[0].tolist())
        sums[0] += float(trained.model.loss_sum(batch.inputs, batch.targets))
        sums[1] += float(F.cross_entropy(logits.float(), batch.targets[0], reduction="sum"))
    return sums


def _prompt(trained: Trained, window: Sequence[int]) -> list[int]:
    """The beginning of the training text if the run still has it, else random tokens."""
    length = min(MAX_PROMPT, max(1, trained.model.config.n_ctx // 2))
    train = trained.train_tokens()
    return list(window[:length]) if train is None else [int(token) for token in train.tokens[:length]]

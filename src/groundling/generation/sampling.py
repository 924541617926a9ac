"""From logits to a token: processors, and the draw.

Invariant: a processor is a callable on (tokens so far, logits) that returns logits of the same shape
(n_vocab,); its meaning is the one that transformers documents under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from groundling.errors import ConfigError
from groundling.kernels.draw import place

MIN_TEMPERATURE = 1e-3
"""Below this, but above 0, quotients leave the range of fp32."""

MIN_PENALTY = 1e-3
"""The same holds of penalties, and of products beyond its reciprocal."""

BLOCK = 256
"""Logits of which the likeliest is found at once: at least one of the k likeliest is in each of the k best blocks."""

N_NUMBERS = 16
"""Uniform numbers made at a time."""

Processor = Callable[[Sequence[int], Tensor], Tensor]


@dataclass(frozen=True)
class SamplingConfig:
    """How text is drawn from the model."""

    max_tokens: int = 100
    """Tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 among all."""
    min_p: float = 0.0
    """Draw among tokens with at least this share of the likeliest one's probability; 0 among all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the context; 1 does nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end the sample when they appear; they are not part of it."""
    seed: int = 1337
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}: give a positive number")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}: give 0 (always the likeliest token) or {MIN_TEMPERATURE} and more"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: give 0 or more, below 2**63")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: give 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: give a number above 0 and up to 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p is {self.min_p}: give a number from 0 to 1")
        if "" in self.stop:
            raise ConfigError("stop has an empty text, which would stop at once: leave it out")
        if not MIN_PENALTY <= self.repetition_penalty <= 1 / MIN_PENALTY:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}: give a number from {MIN_PENALTY} to"
                f" {1 / MIN_PENALTY:g}"
            )

    def in_words(self) -> str:
        """The settings that shape the draw, those left out that do nothing."""
        if self.temperature == 0:
            words = ["always the likeliest token"]
        else:
            words = [f"temperature {self.temperature:g}"]
            words += [f"top-k {self.top_k}"] * bool(self.top_k) + [f"top-p {self.top_p:g}"] * (self.top_p < 1)
            words += [f"min-p {self.min_p:g}"] * bool(self.min_p)
        return ", ".join(words + [f"repetition penalty {self.repetition_penalty:g}"] * (self.repetition_penalty != 1))


PRESETS: dict[str, SamplingConfig] = {
    "default": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0),
    "reference": SamplingConfig(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1, max_tokens=100),
}
"""Settings by name; `reference` has the defaults of the reference run's public demo."""


def repetition_penalty(penalty: float) -> Processor:
    """Makes tokens of the context less likely. Source: Keskar et al. 2019 (CTRL), section 4.1."""

    def process(tokens: Sequence[int], logits: Tensor) -> Tensor:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        scores = logits[seen]
        logits = logits.clone()
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        return logits

    return process


def temperature(value: float) -> Processor:
    """Divides the logits: below 1 sharpens the distribution, above 1 flattens it."""
    return lambda tokens, logits: logits / value


def top_k(k: int) -> Processor:
    """Removes every token less likely than the k-th; ties with it stay."""

    def process(tokens: Sequence[int], logits: Tensor) -> Tensor:
        return _drop_below(logits, _kth(logits.numpy(), min(k, logits.numel())))

    return process


def top_p(p: float) -> Processor:
    """Keeps the fewest likeliest tokens with a total probability of at least p. Source: Holtzman et al. 2020."""

    def process(tokens: Sequence[int], logits: Tensor) -> Tensor:
        possible = _possible(logits)  # few after top_k, and sorting costs most
        ordered, order = logits[possible].sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens already have
        dropped = before >= p
        dropped[0] = False  # a p too small for fp32 is compared as 0
        return logits.index_fill(0, possible[order[dropped]], -math.inf)

    return process


def min_p(share: float) -> Processor:
    """Removes tokens with less than this share of the likeliest one's probability. Source: Nguyen et al. 2024."""
    return lambda tokens, logits: _drop_below(logits, float(logits.max()) + math.log(share))


def _drop_below(logits: Tensor, least: float) -> Tensor:
    """The logits with -inf for those below `least`; ten times as fast as filling where a comparison holds."""
    return F.threshold(logits, float(np.nextafter(np.float32(least), np.float32(-math.inf))), -math.inf)


def _kth(logits: npt.NDArray[np.float32], k: int) -> float:
    """The k-th largest; sorted are only those that the k best of all blocks do not rule out."""
    n_whole = len(logits) // BLOCK * BLOCK
    best = logits[:n_whole].reshape(-1, BLOCK).max(1)
    if k <= len(best):
        logits = logits[np.flatnonzero(logits >= np.partition(best, len(best) - k)[len(best) - k])]
    return float(np.partition(logits, len(logits) - k)[len(logits) - k])


def _possible(logits: Tensor) -> Tensor:
    """The ids that no processor removed, ascending; NumPy finds them ten times as fast as PyTorch."""
    return torch.from_numpy(np.flatnonzero(logits.numpy() > -math.inf))


def processors(config: SamplingConfig) -> list[Processor]:
    """The processors of this config, in transformers' order; none that would do nothing."""
    chain: list[Processor] = []
    if config.repetition_penalty != 1:
        chain.append(repetition_penalty(config.repetition_penalty))
    if config.temperature not in (0, 1):
        chain.append(temperature(config.temperature))
    if config.temperature and config.top_k:
        chain.append(top_k(config.top_k))
    if config.temperature and config.top_p < 1:
        chain.append(top_p(config.top_p))
    if config.temperature and config.min_p:
        chain.append(min_p(config.min_p))
    return chain


def uniform_numbers(seed: int) -> Iterator[float]:
    """Numbers in [0, 1), the same for a seed however many of them are made at once."""
    if seed >> 32:  # of which PyTorch's generator would drop the upper half
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(N_NUMBERS, generator=generator, dtype=torch.float64).tolist()


def draw(logits: Tensor, config: SamplingConfig, numbers: Iterator[float]) -> int:
    """One token id from processed logits (n_vocab,) on the CPU: the likeliest at temperature 0, else a draw.

    A draw takes one uniform number, by inverting the distribution function; so a seed's n-th number belongs
    to the n-th token, however the tokens before it were found.
    """
    if config.temperature == 0:
        likeliest = int(logits.numpy().argmax())  # several times as fast as PyTorch's, on one thread
        if not math.isfinite(float(logits[likeliest])):
            raise FloatingPointError("the likeliest token has a logit that is not finite")
        return likeliest
    return place(logits, next(numbers))

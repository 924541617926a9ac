"""A completion as OpenAI's API has it: what a request may ask, and the shape of the answer.

Invariant: every setting of a request is either carried out or refused; none is silently left aside.

Source: OpenAI's API reference, "Completions" (legacy), for names, limits and shapes; vLLM's names for the settings that
OpenAI's API lacks (top_k, min_p, repetition_penalty).
"""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import ConfigError
from groundling.generation.decode import Likelihood
from groundling.generation.sampling import SamplingConfig

MAX_PROMPTS, MAX_N = 64, 16
"""How many texts one client may ask for is the engine's matter, and may be fewer."""
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 256
MAX_LOGPROBS = 20
MAX_TOKENS = 4096
MAX_LIKELIHOODS = 1 << 18
"""Of one request; each takes some hundred bytes until the answer is sent."""
MAX_PROMPT_CHARACTERS = 1 << 16
"""Far more than any window of GPT-2 holds (1,024 tokens, of some 4 characters each)."""
SEEDS = 2**63
DEFAULT_TOKENS = 16
"""OpenAI's."""


def _printable(name: str) -> str:
    """A name's beginning, in which half of a surrogate pair is a question mark."""
    return name[:100].encode(errors="replace").decode()


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""An integer as JSON has it: 1.0 is one, "1" and true are not."""
NULL_IS_EMPTY = BeforeValidator(lambda value: "" if value is None else value)

Number = Annotated[float, Field(strict=True)]
"""A number as JSON has it: "1" and true are not."""

TokenIds = Annotated[
    list[Annotated[StrictInt, Field(ge=0), WHOLE]],
    # To write down what is wrong with each of a hundred thousand ids would take seconds.
    Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS, fail_fast=True),
]
Text = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class Unusable(ConfigError):
    """A setting that cannot be carried out, or not beside the others."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class _Strict(BaseModel):
    """Settings by their names: the first other one is an error, and of a hundred thousand no more is written down."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError("extra_forbidden", "there is no such setting", {"name": _printable(name)})
        return given


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: StrictBool = False
    """A last piece with the numbers of tokens."""
    include_obfuscation: Literal[False] | None = None
    """Not offered."""


class CompletionRequest(_Strict):
    """What is to be continued, and how."""

    model: str
    """A name that /v1/models lists."""
    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)],
        NULL_IS_EMPTY,
    ] = ""
    """A text, or several; or token ids. An empty text, or null, starts a new document."""
    max_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS), WHOLE] | None = DEFAULT_TOKENS
    """Tokens to write; with `echo` it may be 0."""
    n: Annotated[StrictInt, Field(ge=1, le=MAX_N), WHOLE] | None = 1
    """Texts for each prompt; the i-th has seed + i."""
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_N), WHOLE] | None = None
    """Must be n if it is given: every text that is written is returned."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = 1.0
    """0 always takes the likeliest token."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[StrictInt, Field(ge=-1, le=1 << 20), WHOLE] | None = 0
    """0 or -1: all tokens."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = 1.0
    seed: Annotated[StrictInt, Field(ge=-SEEDS, lt=SEEDS), WHOLE] | None = None
    """The same request with the same seed gives the same text, whoever else is served."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    """Texts that end the completion; they are not part of it."""
    echo: StrictBool | None = False
    """Begin the answer with the prompt."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS), WHOLE] | None = None
    """Log-probabilities of the tokens and, in each place, of so many of the likeliest and the one that stands there."""
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=256)] | None = None
    """Those who wait take turns by this name, within one key or address."""
    suffix: Literal[""] | None = None
    """GPT-2 writes forwards only."""
    presence_penalty: Literal[0] | None = None
    """Not offered: use repetition_penalty."""
    frequency_penalty: Literal[0] | None = None
    """Not offered: use repetition_penalty."""
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    """Not offered."""

    def sampling(self) -> SamplingConfig:
        """The settings of the first text. Raises `ConfigError` for a combination that cannot be carried out."""
        if self.best_of not in (None, self.n or 1):
            raise Unusable("best_of", "best_of is not n: leave it out, and all n texts are returned")
        if not self.max_tokens and self.max_tokens is not None and not self.echo:
            raise Unusable("max_tokens", "max_tokens is 0: give 1 or more, or ask for the prompt alone with echo")
        if self.stream_options and not self.stream:
            raise Unusable("stream_options", "stream_options are for streams: set stream, or leave them out")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingConfig(
            max_tokens=max(1, DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=tuple(stops),
            seed=(secrets.randbelow(SEEDS) if self.seed is None else self.seed) % SEEDS,
        )

    def prompts(self, tokenizer: Tokenizer, n_window: int) -> list[list[int]]:
        """Each prompt's token ids, at least one. Raises `ConfigError` for one that the window cannot hold."""
        given: Sequence[Any] = [self.prompt] if isinstance(self.prompt, str) or _are_ids(self.prompt) else self.prompt
        prompts = []
        for prompt in given:
            try:
                ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            except UnicodeEncodeError:
                raise Unusable("prompt", "the prompt holds half of a surrogate pair: give valid Unicode") from None
            ids = ids or [tokenizer.end_of_text_id]
            if len(ids) > n_window:
                raise Unusable(
                    "prompt",
                    f"the prompt has {len(ids):,} tokens, and this model reads {n_window:,}: shorten it",
                    "context_length_exceeded",
                )
            if max(ids) >= tokenizer.n_vocab:
                raise Unusable(
                    "prompt", f"the prompt holds the id {max(ids)}: this model has ids below {tokenizer.n_vocab:,}"
                )
            prompts.append(ids)
        self._check_likelihoods(prompts)
        return prompts

    def _check_likelihoods(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises `ConfigError` if they would take much memory."""
        if self.logprobs is None:
            return
        most = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        n_tokens = (self.n or 1) * sum(most + (len(ids) if self.echo else 0) for ids in prompts)
        if (n_asked := n_tokens * (1 + self.logprobs)) > MAX_LIKELIHOODS:
            raise Unusable(
                "logprobs",
                f"logprobs {self.logprobs} for {n_tokens:,} tokens are {n_asked:,} numbers, and one request may ask for"
                f" {MAX_LIKELIHOODS:,}: ask for fewer, or in several requests",
            )


def with_seeds(sampling: SamplingConfig, n: int) -> list[SamplingConfig]:
    """The settings of n texts: the i-th has seed + i."""
    return [replace(sampling, seed=(sampling.seed + i) % SEEDS) for i in range(n)]


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], int)


class Logprobs(BaseModel):
    """Likelihoods of tokens, one entry in each list for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters before each token."""


class Choice(BaseModel):
    """One text, or a piece of it."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    """Numbers of tokens; a prompt of which n texts are written counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """An answer, or a piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "groundling"
    max_model_len: int
    """Tokens that it reads at a time."""


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class Pending(NamedTuple):
    """A token whose text may yet turn out to be no part of the answer."""

    offset: int
    """Characters of the answer before it."""
    token: int
    likelihood: Likelihood | None


class LogprobsWriter:
    """Tokens with their likelihoods, each when its text is certain to be part of the answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_decoded = self._n_certain = 0
        self._pending: list[Pending] = []

    def add(self, likelihood: Likelihood) -> None:
        """Take the next token; one that ends the text is not part of it, but has a likelihood as others do."""
        token = likelihood.token
        self._add(token, likelihood, shown=token != self._tokenizer.end_of_text_id)

    def add_prompt(self, tokens: Sequence[int], likelihoods: Sequence[Likelihood], shown: bool) -> None:
        """Take the prompt, of whose tokens the first has no likelihood; it is shown with all that it holds, or not.

        What follows is decoded anew, as the engine does it, also if the prompt ends inside a character.
        """
        for token, likelihood in zip(tokens, [None, *likelihoods], strict=True):
            self._add(token, likelihood, shown)
        self._n_decoded += len(self._decoder.decode(b"", final=True))

    def _add(self, token: int, likelihood: Likelihood | None, shown: bool) -> None:
        self._pending.append(Pending(self._n_decoded, token, likelihood))
        if shown:
            self._n_decoded += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def take(self, text: str, last: bool) -> Logprobs:
        """What begins within the text so far, of which this much is new."""
        self._n_certain += len(text)
        ready = [each for each in self._pending if each.offset < self._n_certain]
        if last:  # the token that ended the text, if one did, stands behind all of it
            end = self._tokenizer.end_of_text_id
            behind = self._pending[len(ready) :]
            ready += [each for each in behind if each.offset == self._n_certain and each.token == end]
        self._pending = [] if last else self._pending[len(ready) :]
        return Logprobs(
            tokens=[self._spelt(each.token) for each in ready],
            token_logprobs=[each.likelihood and each.likelihood.logprob for each in ready],
            top_logprobs=[each.likelihood and self._likeliest(each.likelihood) for each in ready],
            text_offset=[each.offset for each in ready],
        )

    def _likeliest(self, likelihood: Likelihood) -> dict[str, float]:
        """The likeliest tokens and the one that was drawn, by their text."""
        drawn = (likelihood.token, likelihood.logprob)
        return {self._spelt(token): logprob for token, logprob in (*likelihood.likeliest, drawn)}

    def _spelt(self, token: int) -> str:
        """A token as text; one that is no whole characters as its bytes, in OpenAI's spelling."""
        raw = self._tokenizer.decode_bytes([token])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

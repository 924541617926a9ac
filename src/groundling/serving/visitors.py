"""What a visitor of the page asks of the engine: texts that grow, and how likely each token is.

Invariant: a visitor is one client among others: the same rules, the same queue and the same batch as the API's.
Whatever ends a visit, the engine is not left working for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from groundling.errors import ConfigError
from groundling.generation.decode import Likelihood
from groundling.generation.sampling import SamplingConfig
from groundling.serving import engine
from groundling.serving.access_log import Account
from groundling.serving.api_errors import ApiError
from groundling.serving.completions import CompletionRequest, with_seeds
from groundling.serving.engine import Ending, Ticket
from groundling.serving.openai_api import Heard, Served, hand_in

MAX_PROMPT_CHARACTERS = 10_000
MAX_TOKENS = 400
MAX_SAMPLES = 4
N_LIKELIEST = 10
USER = "page"
"""All visitors at one address; no name that the API's clients give themselves, which begin with `api/`."""

REDRAW_S = 0.06
"""Between two states of growing texts: more often than a reader can see, and a page is sent each time."""


class Refused(Exception):
    """What was asked cannot be done; the message is for the visitor."""


@dataclass
class Written:
    """A text that is being written, or was."""

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    """Without the token that ends a text."""
    ending: Ending | None = None


class Visit:
    """One press of the button: some texts that follow one prompt."""

    def __init__(self, served: Served, asked: dict[str, Any], client: str) -> None:
        """`asked` are settings of a completion, the model aside. Raises `Refused` for what is out of bounds."""
        if len(asked["prompt"]) > MAX_PROMPT_CHARACTERS:
            raise Refused(f"The prompt is too long: give {MAX_PROMPT_CHARACTERS:,} characters at most.")
        if asked["max_tokens"] > MAX_TOKENS or asked["n"] > MAX_SAMPLES:
            raise Refused(f"That is too much: ask for {MAX_TOKENS} tokens and {MAX_SAMPLES} samples at most.")
        try:
            body = CompletionRequest(model=served.name, **asked)
            sampling, [prompt] = body.sampling(), body.prompts(served.tokenizer, served.n_window)
        except ValidationError as error:
            first = error.errors()[0]
            raise Refused(f"{first['loc'][0]}: {first['msg']}") from None
        except ConfigError as error:
            raise Refused(f"{str(error)[0].upper()}{str(error)[1:]}") from None
        self.served, self.client = served, client
        shown = [] if prompt == [served.tokenizer.end_of_text_id] else prompt
        samplings = with_seeds(sampling, body.n or 1)
        self.texts = [Written(shown, each.seed) for each in samplings]
        self._requests = [engine.Request(prompt, each, client, USER, served.timeout_s) for each in samplings]
        self.account = Account([served.tokenizer.decode(prompt)], len(prompt))
        self._stopped = False

    def stop(self) -> None:
        """End the texts as they are."""
        self._stopped = True
        for ticket in self.account.tickets:
            ticket.cancel()

    async def grow(self) -> AsyncIterator[list[Written]]:
        """The texts, again and again until all have ended. Raises `Refused` if the engine takes them not."""
        heard: Heard = asyncio.Queue()
        self.account.tickets = _submit(self.served, self._requests, heard)
        n_left, end_of_text = len(self.texts), self.served.tokenizer.end_of_text_id
        try:
            if self._stopped:  # before it began
                self.stop()
            while n_left:
                events = [await heard.get()]
                while not heard.empty():
                    events.append(heard.get_nowait())
                for number, event in events:
                    self.account.n_tokens += len(event.tokens)
                    self.texts[number].tokens += [token for token in event.tokens if token != end_of_text]
                    self.texts[number].ending = event.ending
                    n_left -= event.ending is not None
                yield self.texts
                await asyncio.sleep(REDRAW_S if n_left else 0)
        finally:
            self.stop()


@dataclass(frozen=True)
class Looked:
    """What the model thought at every place of a text."""

    tokens: list[int]
    """The last ones, as many as the window holds."""
    likelihoods: list[Likelihood]
    """Of every token but the first."""
    following: tuple[tuple[int, float], ...]
    """The likeliest next tokens, with their log-probabilities."""


async def look(served: Served, tokens: Sequence[int], client: str) -> Looked:
    """The likelihoods of a text's tokens and of what could follow, by one reading. Raises `Refused`."""
    ids = list(tokens)[-served.n_window :] or [served.tokenizer.end_of_text_id]
    greedy = SamplingConfig(max_tokens=1, temperature=0)
    request = engine.Request(ids, greedy, client, USER, served.timeout_s, N_LIKELIEST, prompt_likelihoods=True)
    heard: Heard = asyncio.Queue()
    [ticket] = _submit(served, [request], heard)
    try:
        while True:
            _, event = await heard.get()
            if event.likelihoods:
                return Looked(ids, ticket.stream.prompt_likelihoods or [], event.likelihoods[0].likeliest)
            if event.ending:
                raise Refused("That did not come to its end: try again soon.")
    finally:
        ticket.cancel()


def read_prompt(served: Served, prompt: str) -> list[int]:
    """A prompt's tokens, by the rules of a completion. Raises `Refused`."""
    visit = Visit(served, {"prompt": prompt, "max_tokens": 1, "n": 1}, "")
    return visit.texts[0].prompt


def _submit(served: Served, requests: Sequence[engine.Request], heard: Heard) -> list[Ticket]:
    try:
        return hand_in(served, requests, heard)
    except ApiError as error:
        raise Refused(f"{str(error)[0].upper()}{str(error)[1:]}.") from None

"""The HTTP API: OpenAI's completions, and what an operator needs beside them.

Invariant: an answer that is not a success has OpenAI's error shape; a client that has left, or does not read, holds no
slot of the engine.

Source: OpenAI's API reference, "Completions" (legacy) and "Streaming"; Prometheus' text format through its own client.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import ConfigError, RunFailed
from groundling.generation.sampling import SamplingConfig
from groundling.serving import engine
from groundling.serving.access_log import Account
from groundling.serving.api_errors import ApiError, ErrorAnswer, dead, wrong
from groundling.serving.completions import (
    Choice,
    Completion,
    CompletionRequest,
    LogprobsWriter,
    Model,
    ModelList,
    Unusable,
    Usage,
    with_seeds,
)
from groundling.serving.engine import Busy, Closing, Engine, Event, Ticket
from groundling.serving.mailbox import Mailbox

PULSE_S = 15.0
"""A stream says after so long that it still waits: proxies end what is silent for a minute."""
READING_S = 10.0
"""How long an answer may go on after the time that its texts may take."""


@dataclass(frozen=True)
class Served:
    """What is served, and how long one answer may take."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    n_window: int
    created: int
    timeout_s: float
    mailbox: Mailbox = field(default_factory=Mailbox)
    """By which the engine's thread tells the server's event loop what is new."""


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request cannot be carried out as it is."},
    401: {"model": ErrorAnswer, "description": "The key is missing or not the server's."},
    404: {"model": ErrorAnswer, "description": "There is no such model."},
    408: {"model": ErrorAnswer, "description": "The request took too long."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "As many requests wait as may."},
    503: {"model": ErrorAnswer, "description": "The server is ending, or cannot decode."},
}


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The texts; with `stream`, pieces of them as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


def make_api(served: Served) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter(prefix="/v1", responses=ERRORS)
    model = Model(id=served.name, created=served.created, max_model_len=served.n_window)

    @router.get("/models")
    async def list_models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[model])

    @router.get("/models/{name:path}")
    async def get_model(name: str) -> Model:
        """One model."""
        if name != served.name:
            raise _no_such_model(name, served)
        return model

    @router.post("/completions", response_model=Completion, responses=STREAMED)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts; with `stream`, as server-sent events that end with [DONE]."""
        if body.model != served.name:
            raise _no_such_model(body.model, served)
        try:
            sampling, prompts = body.sampling(), body.prompts(served.tokenizer, served.n_window)
        except Unusable as error:
            raise wrong(str(error), error.param, code=error.code) from None
        except ConfigError as error:  # its first word is the setting's name
            raise wrong(str(error), str(error).partition(" ")[0]) from None
        if (n_texts := len(prompts) * (body.n or 1)) > served.engine.n_most:
            raise wrong(
                f"{n_texts} texts are asked for, and a client may have {served.engine.n_most} at a time: ask for fewer",
                "prompt" if len(prompts) > 1 else "n",
            )
        job = Job(served, body, prompts)
        request.state.account = job.account
        job.submit(with_seeds(sampling, body.n or 1), request)
        if body.stream:
            return EventStream(job)
        try:
            async with _left(request) as left:
                whole = await _first(job.whole(), left)
                return Response(whole.model_dump_json(), media_type="application/json")
        finally:
            job.cancel()

    @router.post("/chat/completions", response_model=None, status_code=400)
    async def chat() -> Response:
        """Refused: a base model holds no conversations."""
        raise wrong(
            f"{served.name} is a base model, which continues texts and holds no conversations: send the text that is to"
            " be continued to /v1/completions",
            code="base_model",
        )

    return router


NOT_KEPT = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""A proxy that gathers a stream would hold it back (the second is nginx's)."""


def _no_such_model(name: str, served: Served) -> ApiError:
    return wrong(f"there is no model {name[:100]!r} here: ask for {served.name!r}", "model", 404, "model_not_found")


Heard = asyncio.Queue[tuple[int, Event]]
"""What is new of the texts of one request, with their numbers."""


def hand_in(served: Served, requests: Sequence[engine.Request], heard: Heard) -> list[Ticket]:
    """Hand one client's requests to the engine, whose events come to the queue. Raises `ApiError` if it takes none."""
    loop = asyncio.get_running_loop()

    def listener(number: int) -> Callable[[Event], None]:
        return lambda event: served.mailbox.post(loop, heard.put_nowait, (number, event))

    try:
        return served.engine.submit_all(requests, [listener(number) for number in range(len(requests))])
    except Busy as error:
        raise ApiError(429, f"{error}: try again soon", "rate_limit_error", "busy") from None
    except Closing:
        raise ApiError(503, "the server is ending: try again soon", "server_error", "closing") from None
    except RunFailed as error:
        raise dead(str(error)) from None


class Job:
    """One request on its way: its texts, numbered as its choices."""

    def __init__(self, served: Served, body: CompletionRequest, prompts: list[list[int]]) -> None:
        self.served, self.body, self.prompts = served, body, prompts
        self.n = body.n or 1
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        texts = [served.tokenizer.decode(prompt) for prompt in prompts]
        self.account = Account(texts, sum(map(len, prompts)))
        self._heard: Heard = asyncio.Queue()
        self._only_prompt = body.max_tokens == 0
        self._likely = [LogprobsWriter(served.tokenizer) for _ in range(self.n * len(prompts))]
        self._begun = [False] * len(self._likely)

    def submit(self, samplings: Sequence[SamplingConfig], request: Request) -> None:
        """Hand every text to the engine. Raises `ApiError` if it takes none."""
        wanted = [
            engine.Request(
                prompt,
                sampling,
                request.state.client,
                f"api/{self.body.user or ''}",
                self.served.timeout_s,
                self.body.logprobs,
                prompt_likelihoods=bool(self.body.echo) and self.body.logprobs is not None,
            )
            for prompt in self.prompts
            for sampling in samplings
        ]
        self.account.tickets = hand_in(self.served, wanted, self._heard)

    def cancel(self) -> None:
        """Leave the engine nothing to do for this request."""
        for ticket in self.account.tickets:
            ticket.cancel()

    async def choices(self, pulse_s: float | None = None) -> AsyncGenerator[Choice | None]:
        """Pieces of the texts, as they are written, and None whenever there was none for so many seconds.

        Raises `ApiError` if one of them cannot be brought to its end.
        """
        n_left = len(self._likely)
        while n_left:
            try:
                async with asyncio.timeout(pulse_s):
                    index, event = await self._heard.get()
            except TimeoutError:
                yield None
                continue
            if event.ending in ("deadline", "failed", "cancelled"):
                raise _ended_early(event.ending, self.served)
            if not self._only_prompt:
                self.account.n_tokens += len(event.tokens)
            n_left -= event.ending is not None
            yield self._choice(index, event)

    def _choice(self, index: int, event: Event) -> Choice:
        text, writer = "" if self._only_prompt else event.text, self._likely[index]
        if not self._begun[index]:
            self._begun[index] = True
            if self.body.echo:
                text = self._echo(index) + text
        for each in () if self._only_prompt else event.likelihoods:
            writer.add(each)
        reason = event.ending if event.ending in ("stop", "length") else None
        if reason and self._only_prompt:  # the one token that was drawn is none of the answer's
            reason = "length"
        logprobs = writer.take(text, last=reason is not None) if self.body.logprobs is not None else None
        return Choice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    def _echo(self, index: int) -> str:
        """The prompt's text; its likelihoods are told to the writer."""
        stream, prompt = self.account.tickets[index].stream, self.prompts[index // self.n]
        shown = not self._stands_for_nothing(prompt)
        if stream.prompt_likelihoods is not None:
            self._likely[index].add_prompt(prompt, stream.prompt_likelihoods, shown)
        return self.served.tokenizer.decode(prompt) if shown else ""

    def _stands_for_nothing(self, prompt: list[int]) -> bool:
        """Whether this is the token in an empty text's place; no other text has it among its tokens."""
        given = self.body.prompt
        as_text = isinstance(given, str) or isinstance(given[0], str)
        return as_text and prompt == [self.served.tokenizer.end_of_text_id]

    async def whole(self) -> Completion:
        """The answer, when all texts have ended. Raises `ApiError`, also if the engine is heard of no more."""
        try:
            async with asyncio.timeout(self.served.timeout_s + READING_S):
                return await self._gathered()
        except TimeoutError:
            raise _ended_early("failed", self.served) from None

    async def _gathered(self) -> Completion:
        choices: dict[int, Choice] = {}
        async for piece in self.choices():
            assert piece
            whole = choices.setdefault(piece.index, Choice(index=piece.index, text="", logprobs=None))
            whole.text += piece.text
            whole.finish_reason = piece.finish_reason
            if piece.logprobs and whole.logprobs:
                for name, values in piece.logprobs:
                    getattr(whole.logprobs, name).extend(values)
            whole.logprobs = whole.logprobs or piece.logprobs
        return self.completion([choices[index] for index in sorted(choices)], self.usage())

    def completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.served.name, choices=choices, usage=usage)

    def usage(self) -> Usage:
        n_prompt, n_tokens = self.account.n_prompt_tokens, self.account.n_tokens
        return Usage(prompt_tokens=n_prompt, completion_tokens=n_tokens, total_tokens=n_prompt + n_tokens)


def _ended_early(ending: str, served: Served) -> ApiError:
    if ending == "deadline":
        message = f"not done after {served.timeout_s:g} s: ask for fewer tokens"
        return ApiError(408, message, "timeout_error", "timeout")
    if served.engine.failure:
        return dead(served.engine.failure)
    message = "the server is ending" if ending == "cancelled" else "decoding has failed"
    return ApiError(503, f"{message}: try again soon", "server_error", ending)


class EventStream(StreamingResponse):
    """A streamed answer; whatever ends it, also a client that does not read, the engine is not left working for it."""

    def __init__(self, job: Job) -> None:
        super().__init__(_events(job), media_type="text/event-stream", headers=NOT_KEPT)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._job.served.timeout_s + READING_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed, because the answer has no end
        finally:
            self._job.cancel()


async def _events(job: Job) -> AsyncIterator[str]:
    """Server-sent events; an error after the first is one too, since the status has been sent."""
    with_usage = job.body.stream_options is not None and job.body.stream_options.include_usage
    try:
        async with aclosing(job.choices(PULSE_S)) as choices:
            async for choice in choices:
                yield _event(job.completion([choice]).model_dump_json()) if choice else ": waiting\n\n"
        if with_usage:
            yield _event(job.completion([], job.usage()).model_dump_json())
    except ApiError as error:
        yield _event(ErrorAnswer(error=error.detail).model_dump_json())
    yield _event("[DONE]")


def _event(content: str) -> str:
    return f"data: {content}\n\n"


@asynccontextmanager
async def _left(request: Request) -> AsyncIterator[asyncio.Task[None]]:
    """A task that ends when the client has left."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(wait())
    try:
        yield task
    finally:
        task.cancel()


async def _first(work: Any, left: asyncio.Task[None]) -> Completion:
    """The work's result, unless the client leaves before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left", "client_error")
        result: Completion = task.result()
        return result
    finally:
        task.cancel()

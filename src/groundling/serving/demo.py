"""The page: a prompt and its settings, texts that grow beside their copy meter, the run, and what could come next.

Invariant: the page decodes nothing itself; its texts come from the engine that the API uses. It names no other origin,
reports to nobody, and offers visitors no way to files or to programs' calls (`page_routes`).

Source: Gradio 6.31's `mount_gradio_app`, by its code.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import gradio
from fastapi import FastAPI
from gradio.utils import LRUCache

from groundling.generation.sampling import PRESETS, SamplingConfig
from groundling.serving import page_html, visitors
from groundling.serving.access_log import AccessLog
from groundling.serving.copy_meter import CopyMeter, Measured
from groundling.serving.hosts import client_of
from groundling.serving.openai_api import Served
from groundling.serving.page_routes import KnownSessions, Locked, OwnOrigin, PageMount
from groundling.serving.visitors import MAX_PROMPT_CHARACTERS, MAX_SAMPLES, MAX_TOKENS, Refused, Visit, Written

MAX_EVENTS = 256
"""Presses of buttons that Gradio holds; the engine's own queue is what bounds the texts."""
IDLE_S = 0.03
"""Between two looks of Gradio's for a pressed button. Its own millisecond costs the texts that grow meanwhile up to a
third of their speed."""
MAX_SESSIONS = 1000
"""Visitors of whom the last texts are kept, to be looked at."""
MAX_UNREAD = 4
"""States of growing texts that wait for a visitor's connection; meanwhile no more are sent."""
UNREAD_S = 10.0
"""After this long, nobody is there."""
REMEASURED_S = 0.5
"""Between two readings of the meter while a text grows: it is read from the beginning each time."""

REFERENCE = PRESETS["reference"]


@dataclass(frozen=True)
class Example:
    """A prompt with its settings."""

    prompt: str
    max_tokens: int = REFERENCE.max_tokens
    temperature: float = REFERENCE.temperature
    top_k: int = REFERENCE.top_k
    top_p: float = REFERENCE.top_p
    repetition_penalty: float = REFERENCE.repetition_penalty


_lyric = partial(Example, temperature=0.65, top_k=45, top_p=0.88, repetition_penalty=1.15)

SHAKESPEARE = [
    Example("First Citizen:", top_p=0.85),
    _lyric("ROMEO:"),
    Example("To be or not", max_tokens=80, temperature=0.6, top_k=40, top_p=0.85, repetition_penalty=1.2),
    Example("HAMLET:", top_p=0.85),
    Example("MACBETH:", top_p=0.85),
    _lyric("JULIET:"),
    Example("KING:", top_p=0.85),
    Example("LADY MACBETH:", top_p=0.85),
    Example("OTHELLO:", top_p=0.85),
    _lyric("What light through yonder"),
    Example("All the world's a stage", top_p=0.85),
    Example("Double, double toil and trouble", max_tokens=80, top_p=0.85, repetition_penalty=1.15),
    Example("Friends, Romans, countrymen", top_p=0.85),
    _lyric("A rose by any other name"),
]
"""The prompts of the reference run's public demo, with the settings that it gives each."""


@dataclass(frozen=True)
class Subject:
    """What the page is about."""

    title: str
    sentence: str
    """One line below the title."""
    examples: Sequence[Example]
    meter: CopyMeter | None
    no_meter: str
    """Why there is no meter, if there is none."""
    run_html: str


def add_page(
    app: FastAPI, access_log: AccessLog, served: Served, subject: Subject, api_key: str | None
) -> Callable[[], None]:
    """Put the page at / behind all routes that the application has; returns what ends its streams."""
    page = Page(served, subject, access_log)
    blocks = page.blocks()
    blocks.queue(max_size=MAX_EVENTS, default_concurrency_limit=None)
    # Else 40 texts that are written or wait would keep *Stop* and all else from being heard.
    blocks._queue.max_thread_count = MAX_EVENTS + served.engine.decoder.n_slots + served.engine.max_queue
    blocks._queue.pending_event_ids_session = LRUCache(10 * MAX_SESSIONS)  # of which Gradio forgets none
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = IDLE_S
    blocks.state_session_capacity = MAX_SESSIONS
    css = resources.files("groundling.serving").joinpath("page.css").read_text(encoding="utf-8")
    letters = ["ui-sans-serif", "system-ui", "sans-serif"]
    gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        theme=gradio.themes.Base(
            primary_hue="teal", neutral_hue="stone", font=letters, font_mono=["ui-monospace", "monospace"]
        ).set(  # text that is legible: Gradio's own is too pale
            button_primary_background_fill="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
            block_label_text_color="*neutral_700",
            block_title_text_color="*neutral_700",
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
        ),
        css=css,
    )
    mounted: Any = app.router.routes.pop()

    def stop_page() -> None:
        page.closing = True
        mounted.app.stop_event.set()

    own = OwnOrigin(KnownSessions(mounted.app))
    app.router.routes.append(PageMount("/", Locked(own, api_key) if api_key else own))
    return stop_page


class Page:
    """The page's parts and what they do."""

    def __init__(self, served: Served, subject: Subject, access_log: AccessLog) -> None:
        self.served, self.subject, self.access_log, self.tokenizer = served, subject, access_log, served.tokenizer
        self._blocks: Any = None
        self.closing = False
        """Whether the server ends. Gradio then says of every visitor that they have left, whose texts are to end."""
        self._visits: dict[str, Visit] = {}  # by session: the texts that a visitor's page is showing

    async def write(self, request: gradio.Request, asked: dict[str, Any]) -> AsyncIterator[tuple[str, Any]]:
        """The texts as HTML and as tokens, as they grow. Raises `Refused`."""
        visit, session, began_s = Visit(self.served, asked, _client(request)), _session(request), time.monotonic()
        self.stop(session)
        self._visits[session] = visit
        measured: list[Measured | None] = [None] * len(visit.texts)
        due_s = time.monotonic() + REMEASURED_S
        read_s = time.monotonic()
        try:
            async for texts in visit.grow():
                ended = all(text.ending for text in texts)
                if self._n_unread(session) < MAX_UNREAD:
                    read_s = time.monotonic()
                elif not ended:
                    if time.monotonic() - read_s > UNREAD_S:
                        raise Refused("Nobody reads this.")
                    continue
                if ended or time.monotonic() >= due_s:
                    measured = await asyncio.to_thread(self._measure, texts)
                    due_s = time.monotonic() + REMEASURED_S
                html = page_html.texts(texts, measured, self.tokenizer, self.subject.no_meter)
                yield html, [(text.prompt, list(text.tokens)) for text in texts]
        finally:
            visit.stop()
            if self._visits.get(session) is visit:
                del self._visits[session]
            # Beside the line of Gradio's route, which has answered before the first token.
            seconds = time.monotonic() - began_s
            self.access_log.note(_caller(request), {"page": "write"}, seconds, visit.account)

    def stop(self, session: str) -> None:
        """End the texts of a visitor as they are."""
        if visit := self._visits.get(session):
            visit.stop()

    def _n_unread(self, session: str) -> int:
        """Messages that a session's connection has not taken."""
        waiting = self._blocks._queue.pending_messages_per_session
        return waiting[session].qsize() if session in waiting else 0

    def _measure(self, texts: Sequence[Written]) -> list[Measured | None]:
        meter = self.subject.meter
        return [meter.measure(page_html.whole(text, self.tokenizer)) if meter else None for text in texts]

    async def look(self, client: str, tokens: Sequence[int], n_prompt: int) -> tuple[str, str]:
        """What could have come next, at the end of a text and at each of its tokens, as HTML. Raises `Refused`."""
        looked = await visitors.look(self.served, tokens, client)
        n_cut = max(0, len(tokens) - len(looked.tokens))
        return (
            page_html.following(looked, self.tokenizer),
            page_html.tokens(looked, self.tokenizer, max(0, n_prompt - n_cut)),
        )

    def blocks(self) -> Any:
        """The page as Gradio's Blocks."""
        first = self.subject.examples[0] if self.subject.examples else Example("")
        title = page_html.escape(self.subject.title)
        with gradio.Blocks(title=self.subject.title, analytics_enabled=False) as blocks:
            _html(f"<h1>{title}</h1><p>{page_html.escape(self.subject.sentence)}</p>", elem_id="head")
            written = gradio.State([])
            with gradio.Tabs():
                with gradio.Tab("Write"):
                    prompt = self._write_tab(first, written)
                with gradio.Tab("The run"):
                    _html(self.subject.run_html, elem_id="run")
                with gradio.Tab("Next token"):
                    self._look_tab(prompt, written)
            blocks.unload(self._left)
        self._blocks = blocks
        return blocks

    def _write_tab(self, first: Example, written: Any) -> Any:
        with gradio.Row(elem_id="desk"):
            with gradio.Column(scale=2, min_width=280, elem_id="left"):
                prompt = gradio.Textbox(
                    first.prompt,
                    label="Prompt",
                    lines=3,
                    max_lines=12,
                    max_length=MAX_PROMPT_CHARACTERS,
                    elem_id="prompt",
                    info="What the model is to continue; empty for a text from its beginning.",
                )
                with gradio.Row(elem_id="buttons"):
                    begin = gradio.Button("Write", variant="primary", elem_id="begin")
                    stop = gradio.Button("Stop", elem_id="stop")
                if self.subject.examples:
                    shown = gradio.Dataset(
                        label="Examples, with their settings",
                        components=[gradio.Textbox(render=False)],
                        samples=[[example.prompt] for example in self.subject.examples],
                        samples_per_page=len(self.subject.examples),
                        type="index",
                        layout="gallery",
                        elem_id="examples",
                    )
                with gradio.Accordion("Settings", open=True, elem_id="settings"):
                    sliders, others = self._settings()
                if self.subject.examples:
                    shown.click(self._chosen, shown, [prompt, *sliders], api_visibility="private")
            with gradio.Column(scale=3, min_width=280, elem_id="right"):
                output = _html('<p class="idle">The text will stand here.</p>', elem_id="output")
                if self.subject.meter:
                    _html(page_html.legend(), elem_id="legend")

        async def write(
            prompt: str,
            max_tokens: float,
            temperature: float,
            top_k: float,
            top_p: float,
            repetition_penalty: float,
            n: float,
            seed: float,
            request: gradio.Request,
        ) -> AsyncIterator[tuple[str, Any]]:
            asked = {"prompt": prompt or "", "max_tokens": int(max_tokens), "temperature": temperature}
            asked |= {"top_k": int(top_k), "top_p": top_p, "repetition_penalty": repetition_penalty}
            asked |= {"n": int(n), "seed": int(seed or 0)}
            try:
                async for state in self.write(request, asked):
                    yield state
            except Refused as error:
                raise gradio.Error(str(error), print_exception=False, title="Not written") from None

        asked_by = [prompt, *sliders, *others]
        begin.click(write, asked_by, [output, written], api_visibility="private", show_progress="hidden")

        def stop_it(request: gradio.Request) -> None:
            self.stop(_session(request))

        stop.click(stop_it, None, None, api_visibility="private")
        return prompt

    def _settings(self) -> tuple[list[Any], list[Any]]:
        """The sliders of the reference's demo, whose ranges these hold, and what it has not."""
        values: SamplingConfig = REFERENCE
        narrow: dict[str, Any] = {"min_width": 150}
        slim: dict[str, Any] = {**narrow, "buttons": []}
        with gradio.Row():
            max_tokens = gradio.Slider(10, MAX_TOKENS, values.max_tokens, step=10, label="Max tokens", **slim)
            temperature = gradio.Slider(0, 2, values.temperature, step=0.05, label="Temperature", **slim)
        with gradio.Row():
            top_k = gradio.Slider(0, 100, values.top_k, step=1, label="Top-k (0: all)", **slim)
            top_p = gradio.Slider(0.1, 1, values.top_p, step=0.01, label="Top-p (1: all)", **slim)
        penalty = gradio.Slider(
            1, 1.5, values.repetition_penalty, step=0.05, label="Repetition penalty (more: it recites less)", **slim
        )
        with gradio.Row():
            n = gradio.Slider(1, MAX_SAMPLES, 1, step=1, label="Samples", **slim)
            seed = gradio.Number(values.seed, precision=0, minimum=0, maximum=2**53, label="Seed", **narrow)
        return [max_tokens, temperature, top_k, top_p, penalty], [n, seed]

    def _chosen(self, index: int) -> list[Any]:
        example = self.subject.examples[index]
        return [
            example.prompt,
            example.max_tokens,
            example.temperature,
            example.top_k,
            example.top_p,
            example.repetition_penalty,
        ]

    def _look_tab(self, prompt: Any, written: Any) -> None:
        _html(
            '<div class="lead"><h2>What could have come next</h2>'
            "<p>At every place the model gives each of its"
            f" {self.tokenizer.n_vocab:,} tokens a probability; one is drawn, and the next place begins. These are the"
            " model's own probabilities, before temperature, top-k, top-p and repetition penalty.</p></div>"
        )
        with gradio.Row():
            at_prompt = gradio.Button("After the prompt", elem_id="look-prompt")
            at_text = gradio.Button("In the text that was written", variant="primary", elem_id="look-text")
        following = _html(elem_id="following")
        _html(
            "<p class='lead'>Point at a token, or go through them with the arrow keys, to see what else was likely"
            " there.</p>"
        )
        tokens = _html(elem_id="tokens")

        async def after_prompt(prompt: str, request: gradio.Request) -> tuple[str, str]:
            try:
                ids = visitors.read_prompt(self.served, prompt or "")
                return await self.look(_client(request), ids, len(ids))
            except Refused as error:
                raise gradio.Error(str(error), print_exception=False, title="Not read") from None

        async def in_text(texts: Any, request: gradio.Request) -> tuple[str, str]:
            try:
                if not texts:
                    raise Refused("No text was written yet: go to the first tab, and write one.")
                asked, ids = texts[0]
                asked = asked or [self.tokenizer.end_of_text_id]  # what an empty prompt's text was drawn after
                return await self.look(_client(request), [*asked, *ids], len(asked))
            except Refused as error:
                raise gradio.Error(str(error), print_exception=False, title="Not read") from None

        at_prompt.click(after_prompt, prompt, [following, tokens], api_visibility="private")
        at_text.click(in_text, written, [following, tokens], api_visibility="private")

    def _left(self, request: gradio.Request) -> None:
        if not self.closing:
            self.stop(_session(request))


def _html(content: str = "", elem_id: str | None = None) -> Any:
    """Our own HTML, without Gradio's style for it, and without the click that it would listen to."""
    return gradio.HTML(content, elem_id=elem_id, apply_default_css=False, js_on_load=None)


def _session(request: gradio.Request) -> str:
    return str(request.session_hash or "")


def _caller(request: gradio.Request) -> dict[str, str]:
    """What the guard has noted of the press of the button: its request's id and its address."""
    assert request.request is not None  # it came over HTTP
    caller: dict[str, str] = request.request.scope["state"]
    return caller


def _client(request: gradio.Request) -> str:
    """The address by which a visitor takes turns, as the API's clients do."""
    return client_of(request.client.host) if request.client else ""

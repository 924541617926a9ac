"""A Gradio page that continues a prompt with one model: what the app.py of a published Space serves.

Invariant: one text is written at a time, others wait in Gradio's queue, and what a visitor asks for is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundling import runtime
from groundling.errors import ConfigError, UserError
from groundling.generation.decoder import Decoder
from groundling.generation.open import open_decoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.text import continue_text
from groundling.interop.trained import Trained, open_trained
from groundling.runtime import RuntimeConfig

MAX_PROMPT_CHARS = 10_000
MAX_TOKENS = 1_000
MAX_WAITING = 20
"""Visitors in the queue; more are told to come back."""

DEFAULTS = SamplingConfig(max_tokens=200)

DESCRIPTION = (
    "A GPT-2 that was trained from scratch on one text, with Groundling."
    " What it writes may be that text, word for word."
)


class Page:
    """A model that is ready to write, one text at a time."""

    def __init__(self, trained: Trained, decoder: Decoder) -> None:
        self.trained, self.decoder = trained, decoder
        self._writing = threading.Lock()

    def write(self, prompt: str, temperature: float, top_k: float, max_tokens: float, seed: float) -> Iterator[str]:
        """The prompt with what follows it, again and again as it grows. Raises `UserError` for what is out of bounds.

        Numbers arrive from sliders, and may be whole ones as floats.
        """
        if len(prompt) > MAX_PROMPT_CHARS:
            raise ConfigError(f"the prompt has {len(prompt):,} characters: give {MAX_PROMPT_CHARS:,} at most")
        if max_tokens > MAX_TOKENS:
            raise ConfigError(f"max_tokens is {max_tokens:,.0f}: give {MAX_TOKENS:,} at most")
        config = SamplingConfig(
            max_tokens=int(max_tokens), temperature=float(temperature), top_k=int(top_k), seed=int(seed)
        )
        with self._writing:
            pieces = continue_text(self.decoder, self.trained.tokenizer, prompt, config)
            try:
                text = prompt
                for piece in pieces:
                    text += piece
                    yield text
            finally:
                pieces.close()  # type: ignore[attr-defined]  # frees the decoder, if the visitor has left


def serve(model: str) -> None:
    """Serve the page of a model on the hub, or of a folder that `open_trained` can read, until the process is ended.

    Raises `CheckpointError` if there is no such model, `ConfigError` if Gradio is missing.
    """
    trained = open_trained(Path(model))
    resolved = runtime.resolve(RuntimeConfig(dtype="fp32", compile="off"))
    with open_decoder(trained.model.to(resolved.device), trained.window, resolved) as decoder:
        app = blocks(model, Page(trained, decoder))
        app.queue(max_size=MAX_WAITING, default_concurrency_limit=1).launch(show_error=True)


def blocks(model: str, page: Page) -> Any:
    """The page as Gradio's Blocks, of which `/write` is the one entry for programs."""
    try:
        import gradio
    except ImportError:
        raise ConfigError("the page needs the package gradio: pip install 'groundling[demo]'") from None

    def write(prompt: str, temperature: float, top_k: float, max_tokens: float, seed: float) -> Iterator[str]:
        try:
            yield from page.write(prompt, temperature, top_k, max_tokens, seed)
        except UserError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title=model) as app:
        gradio.Markdown(f"# {model}\n\n{DESCRIPTION}")
        prompt = gradio.Textbox(label="Prompt", lines=3, max_length=MAX_PROMPT_CHARS)
        with gradio.Row():
            settings = [
                gradio.Slider(0, 2, DEFAULTS.temperature, step=0.05, label="Temperature (0: always the likeliest)"),
                gradio.Slider(0, 200, DEFAULTS.top_k, step=1, label="Top-k (0: all tokens)"),
                gradio.Slider(1, MAX_TOKENS, DEFAULTS.max_tokens, step=1, label="Tokens"),
                gradio.Number(DEFAULTS.seed, precision=0, minimum=0, label="Seed"),
            ]
        with gradio.Row():
            begin, stop = gradio.Button("Continue", variant="primary"), gradio.Button("Stop")
        text = gradio.Textbox(label="Text", lines=16, buttons=["copy"])
        writing = begin.click(write, [prompt, *settings], text, api_name="write")
        stop.click(None, cancels=writing, api_visibility="private")
    return app

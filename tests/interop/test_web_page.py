"""The page in a real browser, which reaches no host but the test's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from playwright.sync_api import Browser, Page, Route, expect

from groundling.cli import main
from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.decode import generate
from groundling.generation.decoder import TorchDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.interop import web_page
from groundling.interop.trained import Trained
from groundling.model.gpt2 import GPTConfig

from ..browser import open_browser, served
from .conftest import MakeTrained, random_network

PROMPT = "9 grüne Flaschen 🍾 hanging"
N_TOKENS = 30
WINDOW = 48
LABELS = ("Beginning", "Temperature", "Top-k", "Top-p", "Length", "Seed")

OpenPage = Callable[..., Page]

# Keeps every length that the text has had.
WATCH = """addEventListener("DOMContentLoaded", () => {
  window.lengths = [];
  const written = document.getElementById("written");
  new MutationObserver(() => window.lengths.push(written.textContent.length)).observe(written, {childList: true});
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def trained(tokenizer: Tokenizer) -> Trained:
    """A network that writes only characters that can be seen, so that its text can be compared letter by letter."""
    model = random_network(GPTConfig(2, 2, 64, 512, tokenizer.n_vocab))
    shown = [_is_shown(tokenizer, token) for token in range(tokenizer.n_vocab)]
    with torch.no_grad():  # what has no direction has a logit of 0, which is never the largest
        model.transformer.wte.weight[~torch.tensor(shown)] = 0
        # The position table goes on after the window; whoever reads there writes the letter Q.
        (letter,) = tokenizer.encode("Q")
        model.transformer.wpe.weight[WINDOW:] = 50 * model.transformer.wte.weight[letter]
    record = {"corpus_loss": 0.0312, "corpus_loss_offset": 4.56, "heldout_loss": None}
    settings = {"text": {"sources": ["/somewhere/<b>bottles.txt"]}, "prompts": [PROMPT]}
    return Trained(model, tokenizer, WINDOW, 'Bottles & "Co" <i>', record=record | {"config": settings})


def _is_shown(tokenizer: Tokenizer, token: int) -> bool:
    text = tokenizer.token_bytes[token].decode("utf-8", errors="replace")
    return token != tokenizer.end_of_text_id and all(one.isprintable() and one != "\ufffd" for one in text)


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web") / "page"
    web_page.write(trained, path, "f32")
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as where:
        yield where


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[OpenPage]:
    """Opens the page in a fresh context; what it asks of other origins, and its faults, fail the test."""
    contexts, elsewhere, faults = [], list[str](), list[str]()

    def stay(route: Route) -> None:
        if route.request.url.startswith((address, f"blob:{address}")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    def open_it(script: str = "", path: str = "", **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        context.route("**/*", stay)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        if script:
            page.add_init_script(script)
        page.goto(address + path)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert faults == []


def ready(page: Page) -> Page:
    expect(page.get_by_role("button", name="Write")).to_be_enabled(timeout=60_000)
    return page


def write(page: Page, **settings: str) -> str:
    """Fill in settings by the controls' labels, and let the page write to its end."""
    for label, value in settings.items():
        page.get_by_label(label.replace("_", "-"), exact=True).fill(value)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("status")).to_have_text(re.compile("after"), timeout=60_000)
    expect(page.get_by_role("alert")).to_be_hidden()
    return page.locator("#written").text_content() or ""


def greedy(trained: Trained, prompt: str) -> str:
    with TorchDecoder(trained.model, trained.window) as decoder:
        settings = SamplingConfig(temperature=0, max_tokens=N_TOKENS)
        return trained.tokenizer.decode(generate(decoder, trained.tokenizer.encode(prompt), settings))


def test_it_writes_our_greedy_tokens_one_by_one(trained: Trained, open_page: OpenPage) -> None:
    page = ready(open_page(WATCH))
    assert page.get_by_label("Beginning").input_value() == PROMPT
    written = write(page, Temperature="0", Length=str(N_TOKENS))
    assert written == greedy(trained, PROMPT)
    expect(page.get_by_role("status")).to_have_text(f"Done after {N_TOKENS} tokens.")
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    lengths = [length for length in page.evaluate("() => window.lengths") if length]
    assert len(lengths) == N_TOKENS, "each token was shown when it was there"
    assert lengths == sorted(lengths)
    # The same page: a seed is a text, and goes on past the window.
    first, other, again = (write(page, Temperature="1", Seed=seed, Length="60") for seed in ("1", "2", "1"))
    assert first == again != other
    expect(page.get_by_role("status")).to_have_text("Done after 60 tokens.")
    # A beginning longer than the window is read from its end; an empty one is a new text.
    assert "QQ" not in first + other
    for times in (20, 90):
        assert "QQ" not in write(page, Beginning="the wall; " * times, Length="8")
    assert write(page, Beginning="", Length="8")
    # Draws among one token are no draws.
    one = write(page, Beginning=PROMPT, Length=str(N_TOKENS), Temperature="3", Top_k="1")
    assert one == greedy(trained, PROMPT)


def test_bytes_that_are_no_text_are_shown_and_gone_past(
    make_trained: MakeTrained, tmp_path: Path, browser: Browser
) -> None:
    """A random network writes any bytes; wllama's messages cannot carry those that are not UTF-8."""
    web_page.write(make_trained("one"), tmp_path / "page", "f32")
    with served(tmp_path / "page") as address:
        page = browser.new_page()
        page.goto(address)
        written = write(ready(page), Temperature="2", Top_k="0", Length="30")
        assert "\ufffd" in written
        expect(page.get_by_role("status")).to_have_text(
            re.compile(r"^(Done after 30|The text ended after \d+) tokens\.$")
        )
        page.close()


def test_a_browser_without_the_newest_webassembly_takes_the_other_build(trained: Trained, open_page: OpenPage) -> None:
    page = ready(open_page("delete WebAssembly.Suspending; delete WebAssembly.promising;"))
    assert write(page, Temperature="0", Length=str(N_TOKENS)) == greedy(trained, PROMPT)


def test_the_keyboard_reaches_everything_and_stops_the_writing(open_page: OpenPage) -> None:
    page = ready(open_page())
    labels = []
    for _ in LABELS:
        page.keyboard.press("Tab")
        labels.append(page.evaluate("() => document.activeElement.labels[0].textContent"))
    assert tuple(labels) == LABELS
    page.get_by_label("Length").fill("10000")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Write")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#written")).not_to_be_empty()
    expect(page.get_by_role("button", name="Write")).to_be_disabled()
    page.get_by_label("Seed").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Stopped after \d+ tokens?\.$"))
    expect(page.get_by_role("button", name="Write")).to_be_focused()
    before = page.locator("#written").text_content()
    page.keyboard.press("Tab")  # Stop is disabled again
    expect(page.get_by_label("Text", exact=True)).to_be_focused()
    page.get_by_label("Length").fill("3")
    page.get_by_label("Beginning").focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Done after 3 tokens.")
    assert page.locator("#written").text_content() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_legible_by_day_and_night(scheme: str, open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.locator("#page").evaluate("element => { element.hidden = false; element.append('x'.repeat(200)); }")
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    paper = _luminance(page, "body", "backgroundColor")
    assert (paper > 0.5) == (scheme == "light")
    for part in ("h1", "header p", "small", "footer p", "#status", "label"):
        assert _contrast(_luminance(page, part, "color"), paper) >= 4.5, part  # WCAG 2.2, 1.4.3
    card = _luminance(page, "#page", "backgroundColor")
    for part in ("#given", "#written", "#prompt"):
        assert _contrast(_luminance(page, part, "color"), card) >= 4.5, part
    button = _luminance(page, "#write", "backgroundColor")
    assert _contrast(_luminance(page, "#write", "color"), button) >= 4.5


def _luminance(page: Page, selector: str, what: str) -> float:
    """Relative luminance (WCAG 2.2) of a computed colour."""
    computed = page.locator(selector).first.evaluate("(element, what) => getComputedStyle(element)[what]", what)
    shares = [int(channel) / 255 for channel in re.findall(r"\d+", computed)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_what_is_known_of_the_model_is_said_and_names_are_only_names(open_page: OpenPage) -> None:
    page = open_page()
    assert page.title() == 'Bottles & "Co" <i>'
    assert page.locator("cite").text_content() == "<b>bottles.txt"
    footer = page.locator("footer").text_content() or ""
    assert "has memorised its text as it was cut in training, not by heart" in footer
    assert "(a loss of 0.0312)" in footer
    assert "(a loss of 4.56)" in footer


@pytest.mark.parametrize(
    ("name", "answer", "sentence"),
    [
        ("model.gguf", {"status": 404}, "The weights cannot be loaded: the server answers 404"),
        ("model.gguf", {"body": b"GGUF"}, "The weights cannot be loaded: 4 bytes came where"),
        ("wllama.js", {"status": 404}, "The program that computes the model"),
        ("wllama.wasm", {"status": 404}, "wllama.wasm."),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    name: str, answer: dict[str, Any], sentence: str, browser: Browser, address: str
) -> None:
    page = browser.new_page()
    page.context.route(f"**/{name}", lambda route: route.fulfill(**answer))
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.get_by_role("button", name="Write")).to_be_disabled()
    page.close()


def test_weights_that_are_none_are_said_to_be(browser: Browser, address: str, folder: Path) -> None:
    damaged = bytearray((folder / "model.gguf").read_bytes())
    damaged[:4] = b"GGML"
    page = browser.new_page()
    page.context.route("**/model.gguf", lambda route: route.fulfill(body=bytes(damaged)))
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text("The model cannot be started", timeout=60_000)
    page.close()


def test_a_browser_that_cannot_is_told_so(browser: Browser, open_page: OpenPage, folder: Path) -> None:
    page = open_page("delete globalThis.WebAssembly;")
    expect(page.get_by_role("alert")).to_contain_text("has no WebAssembly")
    page = open_page(java_script_enabled=False)
    expect(page.get_by_role("status")).to_contain_text("script has not run")
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("python -m http.server")
    page.close()


def test_the_page_may_ask_no_other_origin(open_page: OpenPage) -> None:
    """The policy itself, without the test's own barrier: the browser refuses before a request is made."""
    page = open_page()
    refused = page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'asked', (error) => error.name)")
    violation = """() => new Promise((resolve) => {
      addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
      fetch("http://127.0.0.1:9/").catch(() => setTimeout(resolve, 1000, "none"));
    })"""
    assert refused == "TypeError"
    assert page.evaluate(violation) == "connect-src"


def test_the_folder_is_a_static_space(folder: Path, trained: Trained) -> None:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    space = yaml.safe_load(front)
    assert (space["sdk"], space["app_file"], space["title"]) == ("static", "index.html", trained.name)
    assert space["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert "has memorised its text" in text
    assert "<i>" not in text
    listed = set(re.findall(r"[\w.-]+\.(?:html|js|css|gguf|wasm|txt)\b", text))
    assert {path.name for path in folder.iterdir()} == (listed - {"bottles.txt"}) | {"README.md"}
    assert "MIT" in (folder / "wllama-LICENSE.txt").read_text()


def test_another_file_in_the_librarys_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "wllama.tgz"
    other.write_bytes(b"something else")
    command = ["export", "run", "--out", str(tmp_path / "out"), "--library", str(other)]
    assert main([*command, "--format", "web"]) == 2
    assert "SHA-512" in capsys.readouterr().err
    assert main([*command, "--format", "onnx"]) == 2
    assert "--library is not for --format onnx" in capsys.readouterr().err

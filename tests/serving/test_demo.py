"""The page as a visitor has it, in a browser; and its routes as somebody has them who means ill."""

from __future__ import annotations

import base64
import json
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page, expect

from groundling.corpus.places import Places
from groundling.corpus.tokenizer import Tokenizer
from groundling.evaluation.suffix_array import SuffixArray
from groundling.generation.decode import generate
from groundling.generation.decoder import TorchDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.serving import demo as demo_module
from groundling.serving.copy_meter import CopyMeter
from groundling.serving.demo import SHAKESPEARE, Example, Subject

from ..browser import open_browser
from .conftest import N_CTX, Running, Serve, eventually, held_up, idle, raw, streaming

HOSTILE = "<img src=x>${1}{{#if}}"
"""Few enough tokens for the small window: an element, and both kinds of Gradio's templates."""


@pytest.fixture(scope="module")
def slow(tokenizer: Tokenizer) -> GPT2:
    """A random network of plain letters that takes some milliseconds for each, so that a visitor can stop it."""
    torch.manual_seed(1)
    model = GPT2(GPTConfig(n_layer=10, n_head=4, n_embd=128, n_ctx=N_CTX, n_vocab=tokenizer.n_vocab)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 5
        model.head_weight[:, 0] = 0
        for token in range(tokenizer.n_vocab):
            letters = tokenizer.decode_bytes([token])
            if token == tokenizer.end_of_text_id or not (letters.isascii() and letters.decode("ascii").isprintable()):
                model.head_weight[token] = torch.eye(128)[0] * -20
    return model


@pytest.fixture(scope="module")
def subject(slow: GPT2, tokenizer: Tokenizer) -> Subject:
    """Of a model that was trained on what it writes after one of the examples, up to its 60th token."""
    config = SamplingConfig(max_tokens=60, temperature=1, top_k=50, top_p=0.9, seed=1337)
    with TorchDecoder(slow, N_CTX) as decoder:
        written = list(generate(decoder, tokenizer.encode("ten green"), config))
    tokens = np.array(tokenizer.encode("A play begins.\n") + written, dtype=np.uint16)
    meter = CopyMeter(SuffixArray.build(tokens), Places(tokens, tokenizer, ["bottles.txt"]), tokenizer)
    examples = [
        Example(HOSTILE, max_tokens=10),
        Example("ten green", temperature=1, repetition_penalty=1),
        *SHAKESPEARE,
    ]
    return Subject("bottles", f"A random one. {HOSTILE}", examples, meter, "", "<h2>Nothing was learned</h2>")


@pytest.fixture(scope="module")
def demo(serve: Serve, slow: GPT2, subject: Subject) -> Iterator[Running]:
    with serve(subject=subject, model=slow) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@contextmanager
def visit(browser: Browser, url: str, width: int = 1280) -> Iterator[Page]:
    """The page, which must ask no other origin for anything, nor complain in the console."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 800})
    context.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    expect(page.locator("#begin")).to_be_visible(timeout=20_000)
    yield page
    context.close()
    assert not wrong


def choose(page: Page, example: str) -> None:
    """Take an example, and wait until its settings are there."""
    page.locator("#examples").get_by_text(example, exact=True).click()
    expect(page.locator("#prompt textarea")).to_have_value(example)
    expect(page.get_by_label("number input for Temperature")).to_have_value("1")


def set_number(page: Page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def text_of(page: Page, number: int = 0) -> str:
    """The written text, without what pops up."""
    script = "e => { const c = e.cloneNode(true); c.querySelectorAll('.tip, .note').forEach(t => t.remove());"
    return str(page.locator(".written").nth(number).evaluate(f"{script} return c.textContent }}"))


def ended(page: Page) -> None:
    expect(page.locator(".sample:not([data-ending=''])").first).to_be_visible(timeout=20_000)


def test_text_grows_and_is_stopped(browser: Browser, demo: Running) -> None:
    with visit(browser, demo.url) as page:
        page.locator("#prompt textarea").fill("nine green bottles")
        set_number(page, "Max tokens", 400)
        set_number(page, "Samples", 4)
        page.locator("#begin").click()
        expect(page.locator(".sample[data-ending='']")).to_have_count(4)
        before = text_of(page)
        assert before.startswith("nine green bottles")
        page.wait_for_function(f"document.querySelector('.written').textContent.length > {len(before) + 20}")
        assert text_of(page).startswith(before)
        page.locator("#stop").click()
        expect(page.locator(".sample[data-ending=cancelled]")).to_have_count(4)
        eventually(lambda: idle(demo))
        assert demo.engine.counts.endings["cancelled"] == 4
        assert page.locator(".note").first.inner_text() == "Stopped."


def test_it_writes_what_the_api_writes_and_the_meter_says_what_is_copied(browser: Browser, demo: Running) -> None:
    with visit(browser, demo.url) as page:
        choose(page, "ten green")
        set_number(page, "Max tokens", 80)
        page.locator("#begin").click()
        ended(page)
        answer = demo.complete(max_tokens=80, temperature=1, top_k=50, top_p=0.9, seed=1337).json()
        assert text_of(page) == "ten green" + answer["choices"][0]["text"]
        assert re.fullmatch(
            r"(7[5-9]|8\d)\s% of this is verbatim from bottles.txt.", page.locator(".says").inner_text()
        )
        mark = page.locator("mark[tabindex]").first
        tip = mark.locator(".tip")
        expect(tip).to_be_hidden()
        mark.hover()
        expect(tip).to_contain_text("tokens, verbatim from bottles.txt, line 2")
        page.mouse.move(1, 1)
        expect(tip).to_be_hidden()
        mark.focus()
        expect(tip).to_be_visible()
        set_number(page, "Max tokens", 20)
        set_number(page, "Samples", 2)
        page.locator("#begin").click()
        expect(page.locator(".sample[data-ending=length]")).to_have_count(2)
        assert text_of(page, 0) != text_of(page, 1)
        assert page.locator(".says").first.inner_text().startswith("100")


def test_what_could_have_come_next(browser: Browser, demo: Running) -> None:
    with visit(browser, demo.url) as page:
        choose(page, "ten green")
        page.get_by_role("tab", name="Next token").click()
        page.locator("#look-prompt").click()
        rows = page.locator("#following tbody tr")
        expect(rows).to_have_count(10)
        answer = demo.complete(max_tokens=1, temperature=0, logprobs=10).json()["choices"][0]
        likeliest = answer["text"].replace(" ", "␣").replace("\n", "↵")
        assert rows.first.locator("code").inner_text() == likeliest
        page.get_by_role("tab", name="Write").click()
        set_number(page, "Max tokens", 10)
        page.locator("#begin").click()
        ended(page)
        page.get_by_role("tab", name="Next token").click()
        page.locator("#look-text").click()
        written = page.locator("#tokens .token:not(.asked)")
        expect(written).to_have_count(10)
        last = written.last
        last.locator("input").focus()
        expect(last.locator(".tip")).to_be_visible()
        expect(last.locator(".tip tr")).to_have_count(5)
        page.keyboard.press("ArrowLeft")
        expect(last.locator(".tip")).to_be_hidden()
        expect(written.nth(8).locator(".tip")).to_be_visible()


def test_it_is_legible_on_a_phone_by_day_and_by_night(browser: Browser, demo: Running) -> None:
    with visit(browser, demo.url, width=360) as page:
        choose(page, "ten green")
        page.locator("#begin").click()
        ended(page)
        letters = ("mark.band3", ".asked", ".says", "#head p", "#legend mark.band1", "#begin", "#prompt label span")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            page.wait_for_function(f"document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}")
            for selector in letters:
                assert contrast(page, selector) >= 4.5, (scheme, selector)
        for tab, shown in (("Write", "#begin"), ("The run", "#run h2"), ("Next token", "#look-text")):
            page.get_by_role("tab", name=tab).click()
            expect(page.locator(shown)).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab


CONTRAST = """element => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = element, back;
  do { back = numbers(getComputedStyle(behind).backgroundColor); behind = behind.parentElement }
  while (back[3] === 0 && behind);
  const [low, high] = [luminance(numbers(getComputedStyle(element).color)), luminance(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


def contrast(page: Page, selector: str) -> float:
    """Of an element's letters with what is behind them (WCAG 2.2, "contrast ratio")."""
    return float(page.locator(selector).first.evaluate(CONTRAST))


def test_texts_are_shown_and_not_obeyed_and_keys_suffice(browser: Browser, demo: Running) -> None:
    with visit(browser, demo.url) as page:
        page.locator("#prompt textarea").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type(HOSTILE)
        page.keyboard.press("Tab")
        expect(page.locator("#begin")).to_be_focused()
        page.keyboard.press("Enter")
        ended(page)
        assert text_of(page).startswith(HOSTILE)
        assert HOSTILE in page.locator("#head").inner_text()
        assert page.locator("#output img, #head img").count() == 0
        page.locator("#prompt textarea").fill("ten green bottles " * 40)
        page.locator("#begin").click()
        expect(page.get_by_text("this model reads 32: shorten it")).to_be_visible()


def test_who_leaves_frees_the_engine_and_holds_up_no_end(
    browser: Browser, serve: Serve, slow: GPT2, subject: Subject
) -> None:
    with serve(subject=subject, model=slow, drain_s=60) as server:
        with visit(browser, server.url) as page:
            set_number(page, "Max tokens", 400)
            set_number(page, "Samples", 4)
            page.locator("#begin").click()
            expect(page.locator(".sample")).to_have_count(4)
        eventually(lambda: idle(server))
        assert server.engine.counts.endings == {"cancelled": 4}
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#begin")).to_be_visible(timeout=20_000)
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10  # with the page still open
    context.close()


def test_who_asks_and_does_not_listen_is_left(demo: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "UNREAD_S", 0.2)
    before = demo.engine.counts.endings.get("cancelled", 0)
    [write] = [each for each in demo.client.get("/config").json()["dependencies"] if len(each["inputs"]) == 8]
    asked = {"fn_index": write["id"], "session_hash": "mute", "data": ["ten", 400, 1, 0, 1, 1, 4, 7]}
    assert demo.client.post("/gradio_api/queue/join", json=asked).status_code == 200
    eventually(lambda: demo.engine.counts.endings.get("cancelled", 0) == before + 4)
    eventually(lambda: idle(demo))


def test_a_text_that_grows_comes_to_its_end_before_the_server_does(
    browser: Browser, serve: Serve, slow: GPT2, subject: Subject
) -> None:
    context = browser.new_context()
    page = context.new_page()
    with serve(subject=subject, model=slow, drain_s=60) as server:
        page.goto(server.url)
        expect(page.locator("#begin")).to_be_visible(timeout=20_000)
        set_number(page, "Max tokens", 200)
        page.locator("#begin").click()
        expect(page.locator(".sample[data-ending='']")).to_have_count(1, timeout=20_000)
    assert server.engine.counts.endings == {"length": 1}
    expect(page.locator(".sample[data-ending='length']")).to_have_count(1)
    context.close()


def test_texts_that_wait_keep_no_button_from_being_heard(serve: Serve, subject: Subject) -> None:
    """More than the forty events that Gradio would take on at a time."""
    with serve(subject=subject, n_slots=1, max_queue=100) as server, held_up(server):
        parts = server.client.get("/config").json()["dependencies"]
        [write] = [each for each in parts if len(each["inputs"]) == 8]
        [stop] = [each for each in parts if each["targets"] and not each["inputs"] and each["targets"][0][1] == "click"]
        for number in range(45):
            asked = {"fn_index": write["id"], "session_hash": f"s{number}", "data": ["ten", 10, 1, 0, 1, 1, 1, 7]}
            assert server.client.post("/gradio_api/queue/join", json=asked).status_code == 200
        eventually(lambda: server.engine.n_running + server.engine.n_waiting == 45)
        asked = {"fn_index": stop["id"], "session_hash": "other", "data": []}
        assert server.client.post("/gradio_api/queue/join", json=asked).status_code == 200
        answer = server.client.get("/gradio_api/queue/data", params={"session_hash": "other"}, timeout=10)
    assert "process_completed" in answer.text


@pytest.mark.parametrize("name", ["a" * 33, "A", "", None, 5, ["a"]])
def test_no_more_is_kept_of_a_session_than_a_short_name(demo: Running, name: object) -> None:
    for path in ("queue/join", "cancel", "reset"):
        body = {"fn_index": 0, "session_hash": name, "data": [], "event_id": "e"}
        assert demo.client.post(f"/gradio_api/{path}", json=body).status_code == 422
    for content in (b"", b"[1]", b"5", b"[" * 100_000, b'{"data": []}'):
        assert demo.client.post("/gradio_api/queue/join", content=content).status_code == 422


def test_events_of_a_session_that_is_gone_are_no_failure(demo: Running, capfd: pytest.CaptureFixture[str]) -> None:
    """Gradio tells the page in its stream, by which the page begins anew, and raises afterwards."""
    n_before = len(demo.log)
    answer = demo.client.get("/gradio_api/queue/data", params={"session_hash": "gone"})
    assert answer.status_code == 200
    assert '"session_not_found":true' in answer.text.replace(" ", "")
    eventually(lambda: any("queue/data" in line for line in demo.log[n_before:]))
    (line,) = (json.loads(line) for line in demo.log[n_before:] if "queue/data" in line)
    assert line["status"] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_visitors_have_the_room_of_their_address(serve: Serve, subject: Subject) -> None:
    """Which is that of the API's clients there, whatever these call themselves."""
    with serve(subject=subject, n_slots=1, max_queue=2) as server, held_up(server):
        [write] = [each for each in server.client.get("/config").json()["dependencies"] if len(each["inputs"]) == 8]
        asked = {"fn_index": write["id"], "session_hash": "one", "data": ["ten", 10, 1, 0, 1, 1, 1, 7]}
        with streaming(server, "a"), streaming(server, "page"):
            assert server.client.post("/gradio_api/queue/join", json=asked).status_code == 200
            answer = server.client.get("/gradio_api/queue/data", params={"session_hash": "one"})
    assert "As many requests of this client wait as may" in answer.text


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/file=/etc/passwd"),
        *("/gradio_api/file%3D/etc/passwd", "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/file/etc/passwd"),
        *("/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/"),
        *("/gradio_api/proxy=file:///etc/passwd", "/static/../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/x"),
        *("/assets/..%2f..%2f..%2f..%2fetc/passwd", "/assets//etc/passwd", "/static/%252e%252e/%252e%252e/etc/passwd"),
        *("/svelte/../../etc/passwd", "/custom_component/x/y/z/..%2f..%2fetc%2fpasswd", "/gradio_api/upload_progress"),
        *("/monitoring", "/gradio_api/dev/reload", "/gradio_api/vibe-code/", "/gradio_api/runs", "/login_check"),
        *("/gradio_api/openapi.json", "/gradio_api/stream/a/b/c/playlist.m3u8", "/gradio_api/deep_link", "/pwa_icon"),
    ],
)
def test_no_route_of_gradios_leads_anywhere_else(demo: Running, path: str) -> None:
    answer = raw(demo, f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    assert 400 <= int(answer.split(b" ")[1]) < 500
    assert b"root:" not in answer


def test_a_page_that_nobody_uses_takes_no_time(demo: Running) -> None:
    """Every waking of its thread is taken from those who are being decoded."""
    eventually(lambda: idle(demo))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    time.sleep(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before < 200


@pytest.mark.parametrize(
    "path",
    [
        *("upload", "run/write", "api/write", "call/write", "call/v2/write", "run/predict", "component_server"),
        *("process_recording", "vibe-edit/", "stream/x", "run-history/connect", "../login"),
    ],
)
def test_nothing_takes_uploads_or_calls_past_the_queue(demo: Running, path: str) -> None:
    files = {"files": ("a.txt", b"hello")}
    assert demo.client.post(f"/gradio_api/{path}", files=files).status_code in (404, 405)
    assert demo.client.post(f"/gradio_api/{path}", json={"data": []}).status_code in (404, 405)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_are_not_let_in(demo: Running, site: str) -> None:
    """Of sister sites, as other.models.example, neither."""
    foreign = {"Origin": "https://evil.example", "Host": "models.example", "Sec-Fetch-Site": site}
    ask = {"Access-Control-Request-Method": "POST", **foreign}
    answers = [demo.client.get(path, headers=foreign) for path in ("/", "/config", "/gradio_api/info")]
    assert {answer.status_code for answer in answers} == {200}
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel"):
        answers += [demo.client.options(path, headers=ask), demo.client.post(path, json={}, headers=foreign)]
        assert answers[-1].status_code == 403
    assert not any(name.lower().startswith("access-control") for each in answers for name in each.headers)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://evil.example/models.example"])
def test_pages_of_other_sites_are_not_let_in_over_plain_http(demo: Running, origin: str) -> None:
    """Where browsers send no Sec-Fetch-Site."""
    own = {"Host": "models.example", "Origin": "http://models.example:8080"}
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel"):
        assert demo.client.post(path, json={}, headers={**own, "Origin": origin}).status_code == 403
        assert demo.client.post(path, json={}, headers=own).status_code != 403


def test_with_a_key_the_page_asks_for_it(serve: Serve, subject: Subject) -> None:
    with serve(subject=subject, api_key="sesame") as server:
        server.client.headers.pop("Authorization")
        for path in ("/", "/config", "/gradio_api/queue/data?session_hash=a"):
            answer = server.client.get(path)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        assert server.client.post("/gradio_api/queue/join", json={}).status_code == 401
        for wrong in ("sesam", "sesame ", ""):
            assert server.client.get("/", auth=("me", wrong)).status_code == 401
        assert server.client.get("/", headers={"Authorization": "Basic ???"}).status_code == 401
        given = base64.b64encode(b"anybody:sesame").decode()
        assert server.client.get("/", headers={"Authorization": f"Basic {given}"}).status_code == 200
        assert not any("sesame" in line for line in server.log)


def test_the_api_is_as_it_is_without_a_page(demo: Running, running: Running) -> None:
    for path in ("/v1/nothing", "/v1/completions", "/nothing", "/openapi.json"):
        with_page, without = demo.client.get(path), running.client.get(path)
        assert (with_page.status_code, with_page.json()) == (without.status_code, without.json()), path

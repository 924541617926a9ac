"""The API as a program that speaks OpenAI's finds it."""

from __future__ import annotations

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from pydantic import ValidationError

from groundling.corpus.tokenizer import Tokenizer
from groundling.generation.decoder import TorchDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.text import continue_text
from groundling.model.gpt2 import GPT2
from groundling.serving.completions import CompletionRequest

from .conftest import N_CTX, Running, Serve, eventually, held_up

PROMPT = "ten green"


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def written(network: GPT2, tokenizer: Tokenizer, prompt: str = PROMPT, **settings: Any) -> str:
    config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, "max_tokens": 16, **settings})
    return "".join(continue_text(TorchDecoder(network, N_CTX), tokenizer, prompt, config))


def test_the_openai_client_gets_what_the_command_line_writes(
    client: openai.OpenAI, network: GPT2, tokenizer: Tokenizer
) -> None:
    answer = client.completions.create(model="bottles", prompt=PROMPT, seed=5, max_tokens=12)
    assert answer.choices[0].text == written(network, tokenizer, seed=5, max_tokens=12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    n_prompt = len(tokenizer.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 12)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI, network: GPT2, tokenizer: Tokenizer) -> None:
    options: Any = {"include_usage": True}
    stream = client.completions.create(
        model="bottles", prompt=PROMPT, seed=5, max_tokens=20, stream=True, stream_options=options
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == written(network, tokenizer, seed=5, max_tokens=20)
    assert len(pieces) > 5
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len({piece.id for piece in (*pieces, last)}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 20


def test_a_stream_ends_with_done(running: Running) -> None:
    with running.client.stream("POST", "/v1/completions", json={"model": "bottles", "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("choices" in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_several_prompts_and_texts_are_numbered_prompt_by_prompt(
    client: openai.OpenAI, network: GPT2, tokenizer: Tokenizer
) -> None:
    """The i-th text of a prompt has seed + i."""
    answer = client.completions.create(model="bottles", prompt=[PROMPT, "wall"], n=2, seed=7, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [
        written(network, tokenizer, prompt, seed=seed, max_tokens=6) for prompt in (PROMPT, "wall") for seed in (7, 8)
    ]
    assert [choice.text for choice in answer.choices] == expected


def test_token_ids_are_a_prompt_too(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    given: list[Any] = [PROMPT, ids, [PROMPT], [ids]]
    texts = {client.completions.create(model="bottles", prompt=each, seed=1).choices[0].text for each in given}
    assert len(texts) == 1


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI, network: GPT2, tokenizer: Tokenizer) -> None:
    whole = written(network, tokenizer, seed=3, max_tokens=30)
    stop = whole[12:14]
    answer = client.completions.create(
        model="bottles", prompt=PROMPT, seed=3, max_tokens=30, stop=[stop, "never"], logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert max(choice.logprobs.text_offset) < len(choice.text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 4])
def test_echo_and_logprobs(
    client: openai.OpenAI, network: GPT2, tokenizer: Tokenizer, stream: bool, n_tokens: int
) -> None:
    """As evaluation harnesses use them: the likelihood of every token but the first."""
    prompt = "hanging on the wäll"
    answer: Any = client.completions.create(
        model="bottles", prompt=prompt, max_tokens=n_tokens, echo=True, logprobs=2, seed=1, stream=stream
    )
    choices = [piece.choices[0] for piece in answer] if stream else [answer.choices[0]]
    text = "".join(choice.text for choice in choices)
    assert text.startswith(prompt)
    lists = [choice.logprobs for choice in choices]
    tokens = [token for each in lists for token in each.tokens]
    logprobs = [value for each in lists for value in each.token_logprobs]
    offsets = [offset for each in lists for offset in each.text_offset]
    ids = tokenizer.encode(prompt)
    assert len(tokens) == len(logprobs) == len(offsets) >= len(ids)
    assert (len(tokens) == len(ids)) == (n_tokens == 0)
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    with torch.no_grad():
        expected = network.logits(network.hidden(torch.tensor([ids])))[0].log_softmax(-1)
    assert logprobs[0] is None
    own = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert logprobs[1 : len(ids)] == pytest.approx(own, abs=1e-4)
    likely = [each for entry in lists for each in entry.top_logprobs]
    assert likely[0] is None
    for token, logprob, each in list(zip(tokens, logprobs, likely, strict=True))[1:]:
        assert each[token] == logprob
        assert len(each.keys() - {token}) <= 2


def test_an_echoed_end_of_text_stands_where_the_offsets_say(running: Running, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    ids = [end, *tokenizer.encode("wall"), end]
    answer = running.complete(prompt=ids, echo=True, logprobs=0, max_tokens=2, seed=1)
    [choice] = answer.json()["choices"]
    said = choice["logprobs"]
    for token, offset in list(zip(said["tokens"], said["text_offset"], strict=True))[: len(ids)]:
        assert choice["text"][offset:].startswith(token)


def test_the_token_that_ends_a_text_has_its_likelihood(
    serve: Serve, network: GPT2, tokenizer: Tokenizer, ids: list[int]
) -> None:
    """Harnesses ask for one token more than they score, and leave out the last entry, whichever it is."""
    ending = copy.deepcopy(network)
    with torch.no_grad():
        ending.head_weight[tokenizer.end_of_text_id] *= -1
    with serve(model=ending) as server:
        answer = server.complete(prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
        bare = server.complete(prompt=ids, logprobs=1, max_tokens=5, temperature=0, stream=False)
        empty = server.complete(prompt="", echo=True, logprobs=0, max_tokens=5, temperature=0)
    [choice] = answer.json()["choices"]
    said = choice["logprobs"]
    assert said["tokens"] == [*(tokenizer.decode([each]) for each in ids), "<|endoftext|>"]
    assert said["token_logprobs"][-1] == pytest.approx(0, abs=1e-6)
    assert said["text_offset"][-1] == len(choice["text"])
    [choice] = bare.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", ["<|endoftext|>"])
    [choice] = empty.json()["choices"]  # its first token stands for the empty prompt
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"] * 2
    assert choice["logprobs"]["token_logprobs"][0] is None


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("ten green bottles")


def test_an_empty_prompt_echoes_nothing_beside_others(running: Running) -> None:
    answer = running.complete(prompt=["", "ten"], echo=True, max_tokens=0)
    assert [choice["text"] for choice in answer.json()["choices"]] == ["", "ten"]


def test_without_tokens_the_length_is_what_ends_a_text(running: Running) -> None:
    drawn = running.complete(max_tokens=1, seed=1).json()["choices"][0]["text"]
    [choice] = running.complete(max_tokens=0, seed=1, echo=True, stop=drawn).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["bottles"]
    assert client.models.retrieve("bottles").id == "bottles"
    with pytest.raises(openai.NotFoundError, match="ask for 'bottles'"):
        client.models.retrieve("gpt-5")


def test_chat_is_refused_with_a_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="base model"):
        client.chat.completions.create(model="bottles", messages=[{"role": "user", "content": "hello"}])


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-5"}, 404, "no model"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": "9"}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"n": 0}, 400, "n:"),
    ({"n": 10**6}, 400, "n:"),
    ({"best_of": 3}, 400, "best_of"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 1e-9}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"repetition_penalty": 10.1}, 400, "repetition_penalty"),
    ({"top_p": 1.1}, 400, "top_p"),
    ({"min_p": 1.1}, 400, "min_p"),
    ({"user": "x" * 257}, 400, "user"),
    ({"temperature": True}, 400, "temperature"),
    ({"temperature": "0.7"}, 400, "temperature"),
    ({"echo": "yes"}, 400, "echo"),
    ({"stream": "off"}, 400, "stream"),
    ({"top_p": 0}, 400, "top_p"),
    ({"stop": ""}, 400, "stop"),
    ({"stop": ["x"] * 5}, 400, "stop: list should have at most 4 items"),
    ({"stop": "x" * 1000}, 400, "stop"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"prompt": []}, 400, "prompt: list should have at least 1 item"),
    ({"prompt": ["x"] * 65}, 400, "prompt: list should have at most 64 items"),
    ({"prompt": ["x"] * 15}, 400, "15 texts are asked for"),
    ({"prompt": [[-1] * 65_536] * 5}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [270]}, 400, "id 270"),
    ({"prompt": [-1]}, 400, "prompt: input should be greater than or equal to 0"),
    ({"prompt": [5, 1.5]}, 400, "prompt: input should be a valid integer"),
    ({"prompt": ["x", 5]}, 400, "prompt: input should be a valid string"),
    ({"prompt": [[5], [-1]]}, 400, "prompt: input should be greater than or equal to 0"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": "wall " * 40}, 400, "shorten it"),
    ({"prompt": "x" * 70_000}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt: input should be a valid string"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_all": True}}, 400, "no setting 'stream_options.include_all'"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, 400, "stream_options: input should be False"),
    ({"body": 1}, 400, "no setting 'body'"),
    ({"presence_penalty": 1}, 400, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"functions": []}, 400, "functions"),
]


@pytest.mark.parametrize(("settings", "status", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_carried_out_is_refused_in_openais_shape(
    running: Running, settings: dict[str, Any], status: int, words: str
) -> None:
    answer = running.complete(**settings)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("settings", "param", "code"),
    [
        ({"prompt": "wall " * 40}, "prompt", "context_length_exceeded"),
        ({"prompt": [999]}, "prompt", None),
        ({"prompt": ["x"] * 15}, "prompt", None),
        ({"n": 16}, "n", None),
        ({"best_of": 3}, "best_of", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"temperature": -1}, "temperature", None),
        ({"temperature": 1e-9}, "temperature", None),
        ({"repetition_penalty": 1e-4}, "repetition_penalty", None),
    ],
)
def test_a_refusal_names_the_setting(running: Running, settings: dict[str, Any], param: str, code: str | None) -> None:
    error = running.complete(**settings).json()["error"]
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b"NaN"),
        *(b'{"model": "bottles", "prompt": "\\ud800"}', b'{"model": "bottles", "\\ud800": 1}'),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_request_is_refused(running: Running, body: bytes) -> None:
    answer = running.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("where", ["", "stream_options", "logit_bias"])
def test_of_a_hundred_thousand_wrong_names_one_is_written_down(where: str) -> None:
    """All of them would take the event loop a second."""
    names = {f"a{number}": "b" for number in range(100_000)}
    with pytest.raises(ValidationError) as found:
        CompletionRequest.model_validate({"model": "bottles", **({where: names} if where else names)})
    assert found.value.error_count() == 1


def test_a_refused_name_is_named(running: Running) -> None:
    assert running.complete(colour="red").json()["error"]["param"] == "colour"
    options = running.complete(stream=True, stream_options={"colour": "red"}).json()["error"]
    assert (options["param"], "'stream_options.colour'" in options["message"]) == ("stream_options", True)


def test_a_stream_that_waits_says_so(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a comment, which clients pass over."""
    monkeypatch.setattr("groundling.serving.openai_api.PULSE_S", 0.05)
    with serve(n_slots=1) as server, ThreadPoolExecutor(1) as pool:
        with held_up(server):
            answer = pool.submit(server.complete, stream=True, max_tokens=3)
            eventually(lambda: server.engine.n_running == 1)
            time.sleep(0.3)
        pieces = answer.result().text.split("\n\n")
        assert pieces[0] == ": waiting"
        written = json.loads(pieces[-3].removeprefix("data: "))["choices"][0]
        assert written["finish_reason"] == "length"
        openais = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        with held_up(server):
            stream = pool.submit(lambda: list(openais.completions.create(model="bottles", prompt="a", stream=True)))
            eventually(lambda: server.engine.n_running == 1)
            time.sleep(0.3)
        assert stream.result()[-1].choices[0].finish_reason == "length"


def test_health_answers_to_head(running: Running) -> None:
    answer = running.client.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_neutral_values_of_what_is_not_offered_are_taken(running: Running) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "suffix": None, "best_of": 1}
    assert running.complete(**neutral, user="someone", top_k=-1, max_tokens=None).status_code == 200
    streamed = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    assert running.complete(**streamed).status_code == 200


def test_a_prompt_of_null_begins_a_new_document(running: Running) -> None:
    same = [running.complete(prompt=prompt, seed=3, echo=True).json()["choices"] for prompt in (None, "")]
    assert same[0] == same[1]


def test_requests_together_get_what_they_get_alone(serve: Serve) -> None:
    import concurrent.futures

    with serve(n_slots=4, max_queue=100) as server:
        alone = [server.complete(seed=i, max_tokens=5 + i).json()["choices"] for i in range(12)]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            jobs = [pool.submit(server.complete, seed=i, max_tokens=5 + i) for i in range(12)]
            together = [job.result().json()["choices"] for job in jobs]
    assert together == alone


def test_a_defect_of_ours_has_the_shape_of_every_error(
    serve: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Tokenizer, text: str) -> list[int]:
        raise ZeroDivisionError("in our own code")

    with serve() as server:
        sound = server.client.get("/v1/models")
        monkeypatch.setattr(Tokenizer, "encode", fail)
        answer = server.complete()
        monkeypatch.undo()
        assert answer.status_code == 500
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "defect"
        assert "our own code" not in answer.text
        assert all(each.headers["X-Content-Type-Options"] == "nosniff" for each in (sound, answer))
        assert server.complete().status_code == 200
    assert sum('"status": 500' in line for line in server.log) == 1

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from groundling.generation.decode import Batch, Likelihood, Stats, Stream, _shares, decode, generate
from groundling.generation.decoder import Decoder, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.model.gpt2 import GPT2, GPTConfig
from groundling.model.weights import to_huggingface

GREEDY = SamplingConfig(max_tokens=8, temperature=0)
N_CTX = 16


@pytest.fixture(params=["torch", "native"])
def decoder(request: pytest.FixtureRequest, model: GPT2) -> Iterator[Decoder]:
    made = TorchDecoder(model, N_CTX, 3) if request.param == "torch" else NativeDecoder(model, N_CTX, 3, "fp32", 2)
    with made as decoder:
        yield decoder


def likeliest(model: GPT2, window: list[int]) -> int:
    with torch.no_grad():
        return int(model.logits(model.hidden(torch.tensor([window])))[0, -1].argmax())


def test_greedy_decoding_is_the_argmax_without_a_cache(model: GPT2, decoder: Decoder) -> None:
    tokens = [1, 2, 3]
    for token in generate(decoder, [1, 2, 3], GREEDY):
        assert token == likeliest(model, tokens)
        tokens.append(token)
    assert len(tokens) == 11


def test_greedy_tokens_are_those_of_transformers(model: GPT2, decoder: Decoder) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": N_CTX, "vocab_size": 31}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(to_huggingface(model) | {"lm_head.weight": model.head_weight})
    for seed in range(20):
        prompt = torch.randint(31, (1, 1 + seed % 6), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(prompt)
        expected = theirs.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)[0]
        config = SamplingConfig(max_tokens=10, temperature=0)
        assert prompt[0].tolist() + list(generate(decoder, prompt[0].tolist(), config)) == expected.tolist()


@pytest.mark.parametrize("n_prompt", [1, 15, 16, 17, 50])
def test_the_window_slides_past_its_end(model: GPT2, decoder: Decoder, n_prompt: int) -> None:
    """After 16 positions the last 8 are read anew; a longer prompt is read from its end."""
    tokens = [n % 31 for n in range(n_prompt)]
    n_window = min(n_prompt, N_CTX)
    for token in generate(decoder, tokens, SamplingConfig(max_tokens=40, temperature=0)):
        assert token == likeliest(model, tokens[-n_window:])
        tokens.append(token)
        n_window = n_window + 1 if n_window < N_CTX else N_CTX // 2


def test_a_batch_gives_each_prompt_what_it_gets_alone(decoder: Decoder) -> None:
    """More streams than slots, prompts and lengths all different, some past the window."""
    requests = [
        ([n % 31 for n in range(i, 2 * i + 1)], SamplingConfig(max_tokens=3 + 5 * (i % 4), top_k=7, seed=i))
        for i in range(9)
    ]
    alone = [list(generate(decoder, prompt, config)) for prompt, config in requests]
    streams = [Stream(prompt, config) for prompt, config in requests]
    for _ in decode(decoder, streams):
        pass
    assert [stream.generated for stream in streams] == alone
    assert [stream.finish_reason for stream in streams] == ["length"] * 9


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_k": 0, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0}])
def test_weights_that_are_no_numbers_are_named(settings: dict[str, float]) -> None:
    """Of as many ids as GPT-2 has, of which top_k looks at the best of each block first."""
    model = GPT2(GPTConfig(n_layer=1, n_head=1, n_embd=2, n_ctx=4, n_vocab=50_257)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with TorchDecoder(model, 4, 1) as decoder, pytest.raises(FloatingPointError, match="not finite"):
        list(generate(decoder, [1], SamplingConfig(**settings)))


def test_a_seed_repeats_and_another_differs(decoder: Decoder) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(decoder, [1], SamplingConfig(max_tokens=20, temperature=1.0, top_k=0, seed=seed)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stream_ends_at_the_end_token_or_when_told(decoder: Decoder) -> None:
    tokens = list(generate(decoder, [4], GREEDY))
    ends = Stream([4], GREEDY, end_token=tokens[3])
    told = Stream([4], GREEDY)
    responses = []
    for stream, response in decode(decoder, [ends, told]):
        if stream is told and len(told.generated) == 2:
            told.finish("stop")
        elif stream is ends:
            responses.append(response)
    assert ends.generated == tokens[: tokens.index(tokens[3]) + 1]
    assert told.generated == tokens[:2]
    assert [response.finish_reason for response in responses] == [None] * (len(responses) - 1) + ["stop"]
    assert decoder.length(0) == decoder.length(1) == 0  # their slots are free again


def test_an_abandoned_generator_frees_its_slots(decoder: Decoder) -> None:
    tokens = generate(decoder, [4], GREEDY)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert [decoder.length(slot) for slot in range(3)] == [0, 0, 0]


def test_stats_count_what_happened(decoder: Decoder) -> None:
    stats = Stats()
    for _ in decode(decoder, [Stream([1, 2], GREEDY), Stream([3], GREEDY)], stats):
        pass
    assert (stats.n_tokens, stats.n_turns, stats.n_decoded, stats.n_prompt_tokens) == (16, 16, 14, 3)
    assert stats.tokens_per_s is not None
    assert stats.tokens_per_s > 0
    assert (stats.acceptance, stats.passes_saved) == (None, 0.0)


def likelihood(model: GPT2, context: list[int], token: int, n: int) -> Likelihood:
    with torch.no_grad():
        logprobs = model.logits(model.hidden(torch.tensor([context])))[0, -1].log_softmax(-1)
    best = logprobs.topk(n)
    return Likelihood(
        token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )


def assert_close(given: Likelihood, expected: Likelihood) -> None:
    assert (given.token, [token for token, _ in given.likeliest]) == (
        expected.token,
        [token for token, _ in expected.likeliest],
    )
    values, theirs = ([each.logprob, *(logprob for _, logprob in each.likeliest)] for each in (given, expected))
    assert values == pytest.approx(theirs, abs=1e-4)


def test_streams_join_and_leave_between_passes_and_write_what_they_write_alone(decoder: Decoder) -> None:
    configs = [SamplingConfig(max_tokens=4 + 3 * i, top_k=9, seed=i) for i in range(7)]
    prompts = [[(5 * i + n) % 31 for n in range(1 + 6 * i)] for i in range(7)]
    alone = [list(generate(decoder, *request)) for request in zip(prompts, configs, strict=True)]
    batch = Batch(decoder, max_prompt_rows=5)
    waiting = [Stream(*request) for request in zip(prompts, configs, strict=True)]
    abandoned = Stream([1, 2], SamplingConfig(max_tokens=500))
    streams = list(waiting)
    batch.join(abandoned)
    n_passes = 0
    while waiting or len(batch.live) > 1:
        if waiting and batch.n_free and n_passes % 3 == 0:
            batch.join(waiting.pop(0))
        list(batch.step())
        n_passes += 1
    batch.leave(abandoned)
    assert [stream.generated for stream in streams] == alone
    assert batch.n_free == decoder.n_slots
    assert not any(decoder.length(slot) for slot in range(decoder.n_slots))


def test_a_long_prompt_does_not_hold_up_the_others(decoder: Decoder) -> None:
    batch = Batch(decoder, max_prompt_rows=4)
    quick = Stream([1], SamplingConfig(max_tokens=20, temperature=0))
    batch.join(quick)
    list(batch.step())
    batch.join(Stream(list(range(15)), SamplingConfig(max_tokens=20, temperature=0)))
    batch.join(Stream(list(range(3)), SamplingConfig(max_tokens=20, temperature=0)))
    writers = [[stream for stream, _ in batch.step()] for _ in range(5)]
    assert all(quick in who for who in writers)
    assert [len(who) for who in writers] == [1, 2, 2, 2, 3]  # 2 + 2, 4 and a last one, 4, 4, a last one


@pytest.mark.parametrize(
    ("n_unread", "max_rows", "shares"),
    [
        ([1, 900, 1, 2], 64, [1, 62, 1, 2]),
        ([1000, 1000, 40, 2], 64, [21, 21, 20, 2]),
        ([9, 8, 7], 2, [0, 1, 1]),
        ([5, 1, 7], None, [5, 1, 7]),
        ([1, 1], 1, [1, 1]),
    ],
)
def test_short_prompts_do_not_wait_for_long_ones(n_unread: list[int], max_rows: int | None, shares: list[int]) -> None:
    assert _shares(n_unread, max_rows) == shares


@pytest.mark.parametrize("max_prompt_rows", [None, 1, 3])
def test_likelihoods_are_those_of_the_model(model: GPT2, decoder: Decoder, max_prompt_rows: int | None) -> None:
    """Before any sampling setting, of prompt and continuation."""
    prompt = [3, 1, 4, 1, 5, 9]
    config = SamplingConfig(max_tokens=4, temperature=0.5, top_k=2, repetition_penalty=1.5)
    stream = Stream(prompt, config, n_likeliest=3, prompt_likelihoods=True)
    batch = Batch(decoder, max_prompt_rows=max_prompt_rows)
    batch.join(stream)
    responses = [response for _ in range(10) if batch.live for _, response in batch.step()]
    assert stream.prompt_likelihoods is not None
    given = stream.prompt_likelihoods + [each for r in responses if (each := r.likelihood)]
    assert [each.token for each in given] == stream.tokens[1:]
    for place, each in enumerate(given, 1):
        assert_close(each, likelihood(model, stream.tokens[:place], stream.tokens[place], 3))

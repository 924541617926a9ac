"""The engine, pass by pass: a decoder that waits for leave before each pass makes every order of events certain."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import RunFailed
from groundling.generation.decode import generate
from groundling.generation.decoder import Chunk, Decoder, TorchDecoder
from groundling.generation.native import NativeDecoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.speculate import Drafter
from groundling.generation.text import continue_text
from groundling.model.gpt2 import GPT2
from groundling.serving.engine import Busy, Closing, Engine, Event, Request, Ticket

N_SLOTS = 3
LONG = SamplingConfig(max_tokens=1000, temperature=1.0, top_k=0)


class Gate(TorchDecoder):
    """A decoder that asks before each pass."""

    def __init__(self, model: GPT2, n_slots: int) -> None:
        super().__init__(model, model.config.n_ctx, n_slots)
        self.leave = threading.Semaphore(0)
        self.asking = threading.Semaphore(0)
        self.broken = False

    def read(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        self.asking.release()
        assert self.leave.acquire(timeout=30)
        if self.broken:
            raise MemoryError("no memory left")
        return super().read(chunks)

    def rewind(self, slot: int, length: int) -> None:
        assert not self.broken
        super().rewind(slot, length)

    def open(self) -> None:
        """Ask no more."""
        self.leave.release(100_000)


@dataclass
class Listener:
    """Keeps what it hears."""

    heard: queue.Queue[Event] = field(default_factory=queue.Queue)
    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.heard.put(event)

    def next(self) -> Event:
        self.events.append(self.heard.get(timeout=30))
        return self.events[-1]

    def rest(self) -> list[Event]:
        """All events, when the last one has come."""
        while not (self.events and self.events[-1].ending):
            self.next()
        return self.events

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


@contextmanager
def opened(decoder: Decoder, tokenizer: Tokenizer, max_queue: int = 50, **settings: Any) -> Iterator[Engine]:
    engine = Engine(decoder, tokenizer, max_queue, **settings)
    try:
        yield engine
    finally:
        if isinstance(decoder, Gate):
            decoder.open()
        engine.close()


def submit(engine: Engine, prompt: Sequence[int], sampling: SamplingConfig, **more: Any) -> tuple[Ticket, Listener]:
    listener = Listener()
    return engine.submit_all([Request(prompt, sampling, **more)], [listener])[0], listener


def requests(n: int) -> list[tuple[list[int], SamplingConfig]]:
    return [([(7 * i + k) % 256 for k in range(1 + 3 * i)], SamplingConfig(max_tokens=5 + i, seed=i)) for i in range(n)]


@pytest.mark.parametrize("kind", ["torch", "native"])
def test_each_gets_what_it_gets_alone(network: GPT2, tokenizer: Tokenizer, kind: str) -> None:
    def decoder(n_slots: int) -> Decoder:
        native = kind == "native"
        return NativeDecoder(network, 32, n_slots, "fp32", 2) if native else TorchDecoder(network, 32, n_slots)

    with decoder(1) as single:
        alone = [list(generate(single, prompt, sampling)) for prompt, sampling in requests(9)]
    with opened(decoder(N_SLOTS), tokenizer) as engine:
        listeners = [submit(engine, prompt, sampling)[1] for prompt, sampling in requests(9)]
        assert [[event.ending for event in listener.rest()][-1] for listener in listeners] == ["length"] * 9
        assert [listener.tokens for listener in listeners] == alone
        assert engine.counts.endings == {"length": 9}
        assert engine.counts.n_tokens == sum(map(len, alone))


def test_text_comes_in_whole_characters_and_ends_before_a_stop_string(network: GPT2, tokenizer: Tokenizer) -> None:
    sampling = SamplingConfig(max_tokens=60, temperature=1.5, top_k=0, seed=3)
    prompt = "ten green"
    whole = "".join(continue_text(TorchDecoder(network, 32), tokenizer, prompt, sampling))
    stop = whole[20:23]
    with opened(TorchDecoder(network, 32, N_SLOTS), tokenizer) as engine:
        _, plain = submit(engine, tokenizer.encode(prompt), sampling)
        _, stopped = submit(engine, tokenizer.encode(prompt), SamplingConfig(**vars(sampling) | {"stop": (stop,)}))
        assert plain.rest()[-1].ending == "length"
        assert plain.text == whole
        assert stopped.rest()[-1].ending == "stop"
        assert stopped.text == whole[: whole.index(stop)]


def test_the_queue_is_bounded_and_takes_all_or_none(network: GPT2, tokenizer: Tokenizer) -> None:
    with opened(Gate(network, N_SLOTS), tokenizer, max_queue=2) as engine:
        running = [submit(engine, [1], LONG)[0] for _ in range(N_SLOTS)]
        engine.decoder.asking.acquire(timeout=30)  # type: ignore[attr-defined]
        while engine.n_running < N_SLOTS:  # those that came after the first pass had begun join at the next
            engine.decoder.leave.release()  # type: ignore[attr-defined]
            engine.decoder.asking.acquire(timeout=30)  # type: ignore[attr-defined]
        two = [Request([1], LONG)] * 2
        with pytest.raises(Busy):
            engine.submit_all(two, [Listener()] * 2)
        assert engine.n_waiting == 0
        submit(engine, [1], LONG)
        submit(engine, [1], LONG, client="other")
        assert engine.n_waiting == 2
        with pytest.raises(Busy, match="as many requests wait as may"):
            submit(engine, [1], LONG, client="third")
        assert len(running) == N_SLOTS


@pytest.mark.parametrize("max_queue", [0, 1, 2, 7, 64])
def test_no_client_locks_the_others_out(network: GPT2, tokenizer: Tokenizer, max_queue: int) -> None:
    """Whoever comes gets places as long as it holds fewer than are free, under however many names its texts come."""
    gate = Gate(network, 1)
    with opened(gate, tokenizer, max_queue) as engine:
        submit(engine, [1], LONG)
        gate.asking.acquire(timeout=30)  # it is being written, and none of the queue's
        n_free, shares = max_queue, []
        for client in "abcdefgh":
            n_held = 0
            try:
                while True:
                    submit(engine, [1], LONG, client=client, user=str(n_held))
                    n_held, n_free = n_held + 1, n_free - 1
                    assert n_held <= n_free + 1
            except Busy:
                assert n_held >= n_free
            shares.append(n_held)
        assert shares[0] == engine.n_most - 1 == (max_queue + 1) // 2
        assert max_queue < 2 or shares[1]


def test_alone_a_client_may_hand_in_so_many_together_and_no_more(network: GPT2, tokenizer: Tokenizer) -> None:
    with opened(Gate(network, N_SLOTS), tokenizer, max_queue=5) as engine:
        assert engine.n_most == N_SLOTS + 3
        many = [Request([1], LONG)] * (engine.n_most + 1)
        with pytest.raises(Busy, match="of this client"):
            engine.submit_all(many, [Listener()] * len(many))
        engine.submit_all(many[1:], [Listener()] * len(many[1:]))


def test_clients_take_turns(network: GPT2, tokenizer: Tokenizer) -> None:
    """One slot; the first client hands in four texts before the second hands in two."""
    gate, done = Gate(network, 1), queue.Queue[str]()
    one = SamplingConfig(max_tokens=1)
    with opened(gate, tokenizer) as engine:
        for client, name in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("a", "a4"), ("b", "b1"), ("b", "b2"), ("c", "c1")):
            engine.submit_all([Request([1], one, client)], [lambda event, name=name: done.put(name)])  # type: ignore[misc]
            if name == "a1":
                gate.asking.acquire(timeout=30)  # it is being served; the rest will wait
        gate.open()
        order = [done.get(timeout=30) for _ in range(7)]
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_a_clients_users_take_its_turns_and_no_others(network: GPT2, tokenizer: Tokenizer) -> None:
    gate, done = Gate(network, 1), queue.Queue[str]()
    one = SamplingConfig(max_tokens=1)
    with opened(gate, tokenizer) as engine:
        for name in ("a/x 1", "a/x 2", "a/x 3", "a/y 1", "a/z 1", "b/x 1", "b/x 2", "b/x 3"):
            client, user = name[0], name[2]
            engine.submit_all([Request([1], one, client, user)], [lambda event, name=name: done.put(name)])  # type: ignore[misc]
            if name == "a/x 1":
                gate.asking.acquire(timeout=30)  # it is being served; the rest will wait
        gate.open()
        order = [done.get(timeout=30) for _ in range(8)]
    assert order == ["a/x 1", "a/x 2", "b/x 1", "a/y 1", "b/x 2", "a/z 1", "b/x 3", "a/x 3"]


@pytest.mark.parametrize("waiting", [False, True])
def test_what_is_cancelled_takes_part_in_no_further_pass(network: GPT2, tokenizer: Tokenizer, waiting: bool) -> None:
    gate = Gate(network, 1)
    with opened(gate, tokenizer) as engine:
        first, hearing = submit(engine, [1], LONG)
        gate.asking.acquire(timeout=30)
        second, other = submit(engine, [2], SamplingConfig(max_tokens=2))
        (second if waiting else first).cancel()
        gate.leave.release()
        assert hearing.next().ending is None  # the pass that was under way
        gate.asking.acquire(timeout=30)
        if waiting:
            assert other.next().ending == "cancelled"
            assert (other.tokens, engine.n_running, engine.n_waiting) == ([], 1, 0)
        else:
            assert hearing.next().ending == "cancelled"
            assert (len(hearing.tokens), engine.n_running, engine.n_waiting) == (1, 1, 0)
            gate.open()
            assert other.rest()[-1].ending == "length"


def test_deadlines_end_what_runs_and_what_waits(network: GPT2, tokenizer: Tokenizer) -> None:
    gate, now = Gate(network, 1), [100.0]
    with opened(gate, tokenizer, clock=lambda: now[0]) as engine:
        _, running = submit(engine, [1], LONG, timeout_s=10)
        gate.asking.acquire(timeout=30)
        _, waiting = submit(engine, [1], LONG, timeout_s=5)
        _, patient = submit(engine, [1], SamplingConfig(max_tokens=3))
        now[0] = 109.0
        gate.leave.release()
        gate.asking.acquire(timeout=30)
        assert waiting.next().ending == "deadline"
        now[0] = 110.0
        gate.open()
        assert running.rest()[-1].ending == "deadline"
        assert len(running.tokens) == 2
        assert patient.rest()[-1].ending == "length"
        assert engine.stats.n_prompt_tokens == 2  # the prompt of the one that waited was not read


def test_texts_past_the_window_go_on_together(network: GPT2, tokenizer: Tokenizer) -> None:
    """Each of them reads half a window anew, again and again, and who came first holds nobody up."""
    with opened(TorchDecoder(network, 4, 130), tokenizer, 130) as engine:
        listeners = [Listener() for _ in range(130)]
        tickets = engine.submit_all([Request([1], SamplingConfig(max_tokens=40))] * 130, listeners)
        listeners[0].rest()
        assert min(ticket.stream.n_generated for ticket in tickets) >= 30
        for listener in listeners:
            listener.rest()


def test_closing_cancels_what_there_is_and_takes_no_more(network: GPT2, tokenizer: Tokenizer) -> None:
    gate = Gate(network, 1)
    engine = Engine(gate, tokenizer, 10)
    listeners = [submit(engine, [1], LONG)[1] for _ in range(3)]
    gate.asking.acquire(timeout=30)
    gate.open()
    engine.close()
    assert [listener.rest()[-1].ending for listener in listeners] == ["cancelled"] * 3
    with pytest.raises(Closing):
        submit(engine, [1], LONG)


def test_everybody_hears_of_a_failure(network: GPT2, tokenizer: Tokenizer) -> None:
    gate = Gate(network, 1)
    with opened(gate, tokenizer) as engine:
        listeners = [submit(engine, [1], LONG)[1] for _ in range(3)]
        gate.asking.acquire(timeout=30)
        gate.broken = True
        gate.open()
        assert [listener.rest()[-1].ending for listener in listeners] == ["failed"] * 3
        with pytest.raises(RunFailed, match="no memory left"):
            submit(engine, [1], LONG)


def test_a_listener_that_fails_harms_nobody_else(network: GPT2, tokenizer: Tokenizer) -> None:
    def deaf(event: Event) -> None:
        raise OSError("gone")

    with opened(TorchDecoder(network, 32, 2), tokenizer) as engine:
        [ticket] = engine.submit_all([Request([1], LONG)], [deaf])
        _, other = submit(engine, [2], SamplingConfig(max_tokens=20))
        assert other.rest()[-1].ending == "length"
        _, after = submit(engine, [2], SamplingConfig(max_tokens=2))
        assert after.rest()[-1].ending == "length"
    assert ticket.ending == "cancelled"


def test_likelihoods_come_with_their_tokens(network: GPT2, tokenizer: Tokenizer) -> None:
    with opened(TorchDecoder(network, 32, 2), tokenizer) as engine:
        sampling = SamplingConfig(max_tokens=6)
        ticket, listener = submit(engine, [1, 2, 3], sampling, n_likeliest=2, prompt_likelihoods=True)
        given = [each for event in listener.rest() for each in event.likelihoods]
        assert [each.token for each in given] == listener.tokens
        assert all(len(each.likeliest) == 2 and each.logprob <= each.likeliest[0][1] for each in given)
        assert [each.token for each in ticket.stream.prompt_likelihoods or ()] == [2, 3]


def test_a_text_that_cannot_go_on_ends_alone(network: GPT2, tokenizer: Tokenizer) -> None:
    """A defect in one stream's drawing, or in its drafter, is told to that client only."""
    n_made = 0

    def drafter() -> Drafter | None:
        nonlocal n_made
        n_made += 1

        def broken(context: Sequence[int], n: int) -> Sequence[int]:
            raise KeyError("a defect")

        return broken if n_made == 2 else None

    with opened(TorchDecoder(network, 32, N_SLOTS), tokenizer, drafter=drafter) as engine:
        sampling = SamplingConfig(max_tokens=12, seed=4)
        _, first = submit(engine, [1, 2], sampling)
        _, drafting = submit(engine, [1, 2], sampling)
        _, drawing = submit(engine, [1, 2], sampling, n_likeliest=-1)
        assert [listener.rest()[-1].ending for listener in (first, drafting, drawing)] == ["length", "failed", "failed"]
        _, after = submit(engine, [1, 2], sampling)
        assert after.rest()[-1].ending == "length"
        assert after.tokens == first.tokens
        assert not engine.failure

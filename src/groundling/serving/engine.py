"""Continuous batching: the texts of many clients, decoded together by one thread.

Invariant: what a request gets depends on its prompt, settings and seed alone, not on who else is there (exactly so on a
CPU, where the kernel is batch-invariant). The queue is bounded, clients in it take turns, and a request that was
cancelled or has run out of time takes part in no pass after the one under way. No client that waits holds more of the
queue than it leaves free.

Source of the scheduling: Yu et al. 2022, "Orca", section 3.1 (iteration-level scheduling); of the share of the queue:
Choudhury and Hahne 1998, "Dynamic queue length thresholds for shared-memory packet switches" (with their alpha at 1).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from groundling.corpus.tokenizer import Tokenizer
from groundling.errors import RunFailed
from groundling.generation.decode import Batch, Likelihood, Stats, Stream
from groundling.generation.decoder import Decoder
from groundling.generation.sampling import SamplingConfig
from groundling.generation.speculate import Drafter
from groundling.generation.text import Writer

MAX_PROMPT_ROWS = 64
"""Tokens of prompts read in one pass, or two for each slot if that is more: what those who are being served wait for at
most, between two tokens."""

Ending = Literal["stop", "length", "cancelled", "deadline", "failed"]
"""Why a text ended: OpenAI's two words, and three of ours for texts that are not whole."""


class Busy(Exception):
    """The queue has no room, or none for this client."""


class Closing(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One text to be written."""

    prompt: Sequence[int]
    """At least one token, and no more than the window holds."""
    sampling: SamplingConfig
    client: str = ""
    """Those who wait take turns by this name, and it has its share of the queue."""
    user: str = ""
    """A client's own users take its turns in turn."""
    timeout_s: float | None = None
    """Counted from the moment it is handed in."""
    n_likeliest: int | None = None
    """With how many of the likeliest tokens each token's likelihood is given; None for no likelihoods."""
    prompt_likelihoods: bool = False


@dataclass(frozen=True)
class Event:
    """What is new of a text."""

    text: str
    """Whole characters; nothing of a stop string."""
    tokens: tuple[int, ...]
    """Ids drawn since the last event."""
    likelihoods: tuple[Likelihood, ...]
    ending: Ending | None
    """If this is the last event, why."""


@dataclass(eq=False)
class Ticket:
    """A request on its way: what the engine knows of it."""

    request: Request
    sink: Callable[[Event], None]
    """Called by the engine's thread, so it must return at once."""
    submitted_s: float
    stream: Stream
    writer: Writer
    first_token_s: float | None = None
    """Seconds from being handed in to its first token."""
    ending: Ending | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Take part in no further pass. May be called by any thread, and when all is over."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def deadline_s(self) -> float:
        timeout_s = self.request.timeout_s
        return float("inf") if timeout_s is None else self.submitted_s + timeout_s


@dataclass
class Counts:
    """What has happened since the engine began."""

    n_tokens: int = 0
    endings: dict[Ending, int] = field(default_factory=dict)


class Engine:
    """Decodes what is handed in, as many at a time as the decoder has slots; closes the decoder when it is closed."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        max_queue: int,
        drafter: Callable[[], Drafter | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drafter` makes one for each request."""
        self.decoder, self.tokenizer, self.max_queue = decoder, tokenizer, max_queue
        self.stats, self.counts = Stats(), Counts()
        self._drafter, self._clock = drafter, clock
        # A text that has outgrown its window reads, over time, one old token for each that is new.
        max_prompt_rows = max(MAX_PROMPT_ROWS, 2 * decoder.n_slots)
        self._batch = Batch(decoder, self.stats, max_prompt_rows, self._fail)
        self._served: dict[int, Ticket] = {}  # by the identity of the stream
        self._queue = FairQueue()
        self._changed = threading.Condition()
        self._closing = False
        self.failure = ""
        """What ended the engine, in a sentence, if it was not `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def n_most(self) -> int:
        """Texts of one client that there may be at a time, being written and waiting, when it is alone."""
        return self.decoder.n_slots + (self.max_queue + 1) // 2

    @property
    def n_waiting(self) -> int:
        with self._changed:
            return len(self._queue)

    @property
    def n_running(self) -> int:
        return len(self._served)

    def submit_all(self, requests: Sequence[Request], sinks: Sequence[Callable[[Event], None]]) -> list[Ticket]:
        """Hand in requests of one client, all or none; the events of each come to its sink.

        Raises `Busy` if the queue cannot hold them, or holds enough of this client's, `Closing` after `close`,
        `RunFailed` if the engine has failed.
        """
        tickets = [self._ticket(request, sink) for request, sink in zip(requests, sinks, strict=True)]
        with self._changed:
            if self.failure:
                raise RunFailed(self.failure)
            if self._closing:
                raise Closing
            self._look_for_room(requests[0].client, len(tickets))
            for ticket in tickets:
                self._queue.put(ticket)
            self._changed.notify()
        return tickets

    def close(self) -> None:
        """Take no more requests, cancel those there are, and end the thread."""
        self.cut_off()
        self._thread.join()

    def cut_off(self) -> None:
        """Take no more requests, and cancel those there are."""
        with self._changed:
            self._closing = True
            for ticket in [*self._queue, *self._served.values()]:
                ticket.cancel()
            self._changed.notify()

    def _look_for_room(self, client: str, n_new: int) -> None:
        """Raises `Busy` unless so many more texts of a client may wait: each while it holds fewer than are free."""
        n_free = self._batch.n_free  # places in the batch, for which nobody waits
        n_waiting = max(0, len(self._queue) + n_new - n_free)
        if n_waiting > self.max_queue:
            raise Busy("as many requests wait as may")
        if max(0, self._queue.n_of(client) + n_new - n_free) > self.max_queue - n_waiting + 1:
            raise Busy("as many requests of this client wait as may, and the rest of the queue is for others")

    def _ticket(self, request: Request, sink: Callable[[Event], None]) -> Ticket:
        stream = Stream(
            request.prompt,
            request.sampling,
            self._drafter() if request.n_likeliest is None else None,
            self.tokenizer.end_of_text_id,
            request.n_likeliest,
            request.prompt_likelihoods,
        )
        return Ticket(request, sink, self._clock(), stream, Writer(self.tokenizer, request.sampling.stop))

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._end_overdue()
                self._admit()
                if self._batch.live:
                    self._pass()
        except BaseException as error:  # reported to every client, and by /health
            logging.getLogger(__name__).critical("decoding has failed", exc_info=error)
            self.failure = f"decoding has failed ({error!r}): start the server again"
        finally:
            with self._changed:
                left = [*self._served.values(), *self._queue.drain()]
            self._batch.live.clear()  # a decoder that has failed is not touched again before all have been told
            for ticket in left:
                self._end(ticket, "failed" if self.failure else "cancelled")
            self.decoder.close()

    def _wait_for_work(self) -> bool:
        """Whether there is something to do, sooner or later; False when the engine is to end."""
        with self._changed:
            while not self._served and not self._queue:
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _end_overdue(self) -> None:
        """Ends what was cancelled, or has run out of time, wherever it stands."""
        now = self._clock()
        with self._changed:
            overdue = [ticket for ticket in self._queue if ticket.cancelled or now >= ticket.deadline_s]
            for ticket in overdue:
                self._queue.remove(ticket)
        overdue += [ticket for ticket in self._served.values() if ticket.cancelled or now >= ticket.deadline_s]
        for ticket in overdue:
            self._end(ticket, "cancelled" if ticket.cancelled else "deadline")

    def _admit(self) -> None:
        with self._changed:
            while self._queue and self._batch.n_free:
                ticket = self._queue.get()
                self._served[id(ticket.stream)] = ticket
                self._batch.join(ticket.stream)

    def _pass(self) -> None:
        """One pass over the weights; every text that it is part of hears once of what is new."""
        events: dict[int, Event] = {}
        for stream, response in self._batch.step():
            text, reason = self._served[id(stream)].writer.take(response.token, response.finish_reason)
            if reason:
                stream.finish(reason)
            likelihoods = (response.likelihood,) if response.likelihood else ()
            before = events.get(id(stream), Event("", (), (), None))
            events[id(stream)] = Event(
                before.text + text, (*before.tokens, response.token), before.likelihoods + likelihoods, reason
            )
        now = self._clock()
        for key, event in events.items():
            if key not in self._served:  # it failed after these
                continue
            ticket = self._served[key]
            if ticket.first_token_s is None:
                ticket.first_token_s = now - ticket.submitted_s
            if event.ending:
                self._end(ticket, event.ending, event)
            else:
                self._tell(ticket, event)

    def _fail(self, stream: Stream, error: Exception) -> None:
        """One text cannot go on: a defect of ours, which ends no other."""
        logging.getLogger(__name__).error("a text cannot go on", exc_info=error)
        self._end(self._served[id(stream)], "failed")

    def _end(self, ticket: Ticket, ending: Ending, event: Event | None = None) -> None:
        """Tell the client, free the slot, count."""
        if self._served.pop(id(ticket.stream), None) and ticket.stream in self._batch.live:
            self._batch.leave(ticket.stream)
        ticket.ending = ending
        self.counts.endings[ending] = self.counts.endings.get(ending, 0) + 1
        self.counts.n_tokens += ticket.stream.n_generated
        self._tell(ticket, event or Event("", (), (), ending))

    @staticmethod
    def _tell(ticket: Ticket, event: Event) -> None:
        try:
            ticket.sink(event)
        except Exception:  # whoever listened is gone; the others are still there
            ticket.cancel()


class FairQueue:
    """Tickets of several clients: the clients in turn, each client's users in turn, each user's tickets in order."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, deque[Ticket]]] = {}  # both in the order of their turns

    def __len__(self) -> int:
        return sum(map(self.n_of, self._waiting))

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for users in self._waiting.values() for tickets in users.values() for ticket in tickets)

    def n_of(self, client: str) -> int:
        """Tickets of one client."""
        return sum(map(len, self._waiting.get(client, {}).values()))

    def put(self, ticket: Ticket) -> None:
        users = self._waiting.setdefault(ticket.request.client, {})
        users.setdefault(ticket.request.user, deque()).append(ticket)

    def get(self) -> Ticket:
        """The next ticket; its client's turn comes again after all others', and so within it its user's."""
        client, users = next(iter(self._waiting.items()))
        user, tickets = next(iter(users.items()))
        ticket = tickets.popleft()
        del self._waiting[client], users[user]
        if tickets:
            users[user] = tickets
        if users:
            self._waiting[client] = users
        return ticket

    def remove(self, ticket: Ticket) -> None:
        client, user = ticket.request.client, ticket.request.user
        self._waiting[client][user].remove(ticket)
        if not self._waiting[client][user]:
            del self._waiting[client][user]
        if not self._waiting[client]:
            del self._waiting[client]

    def drain(self) -> list[Ticket]:
        """All that wait, which then wait no more."""
        left = list(self)
        self._waiting.clear()
        return left

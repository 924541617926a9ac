"""The access log and the metrics: what is kept of each request, and of the texts that it asked for.

Invariant: prompts are written only if that was asked for, and keys never. The API's texts and those of the page's
visitors are noted by the same function.

Source: Prometheus' histograms through its own client.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from groundling.serving.engine import Ending, Ticket

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass
class Account:
    """The texts that one request asked for."""

    prompts: list[str]
    n_prompt_tokens: int
    n_tokens: int = 0
    tickets: Sequence[Ticket] = ()
    """Of its texts; none if the engine did not take them."""

    @property
    def first_token_s(self) -> float | None:
        """From being handed in to the first token of any of them; None if there was none."""
        return min((ticket.first_token_s for ticket in self.tickets if ticket.first_token_s is not None), default=None)

    @property
    def endings(self) -> list[Ending]:
        """Why each has ended; one that has not was left by its client, and will."""
        return [ticket.ending or "cancelled" for ticket in self.tickets]

    @property
    def whole(self) -> bool:
        """Whether all have come to their own end."""
        return bool(self.tickets) and set(self.endings) <= {"stop", "length"}


class Metrics:
    """Counters of requests; those of tokens and texts are the engine's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "groundling_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "groundling_completion_seconds", "Whole completions.", buckets=BUCKETS_S, registry=self.registry
        )
        self.first_token = Histogram(
            "groundling_first_token_seconds", "From request to first token.", buckets=BUCKETS_S, registry=self.registry
        )


class AccessLog:
    """Lines of JSON, and the metrics of the same requests."""

    def __init__(self, write: Callable[[str], None], with_prompts: bool) -> None:
        self.metrics = Metrics()
        self._write, self._with_prompts = write, with_prompts

    def note(self, caller: Mapping[str, str], facts: dict[str, Any], seconds: float, account: Account | None) -> None:
        """One line; the account's texts move the histograms. `caller` has the request's id and the client's address."""
        facts = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": caller["request_id"],
            "client": caller["address"],
            **facts,
            "seconds": round(seconds, 4),
        }
        if account is not None:
            facts |= {"prompt_tokens": account.n_prompt_tokens, "tokens": account.n_tokens, "endings": account.endings}
            if account.first_token_s is not None:
                facts["first_token_s"] = round(account.first_token_s, 4)
                self.metrics.first_token.observe(account.first_token_s)
            if account.whole:
                self.metrics.latency.observe(seconds)
            if self._with_prompts:
                facts["prompts"] = account.prompts
        self._write(json.dumps(facts, ensure_ascii=True))

"""What /openapi.json says is true: schemathesis asks for what it allows, and for what it does not. And the page's.

Source of the checks: https://schemathesis.readthedocs.io (not_a_server_error, status_code_conformance, ...).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from groundling.commands import serve
from groundling.serving import completions, connections, server
from groundling.serving.guard import Limits

from .conftest import Running

N_EXAMPLES = 40
POSITIVE = schemathesis.GenerationMode.POSITIVE
COMPLETIONS = ("POST", "/v1/completions")
OPERATIONS = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    COMPLETIONS,
    ("POST", "/v1/chat/completions"),
    ("GET", "/health"),
    ("GET", "/metrics"),
)


@pytest.fixture(scope="module")
def schema(running: Running) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


def examples(strategy: Any, check: Any) -> None:
    """The same examples every time."""
    asked = settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(case=strategy)(check))
    asked()


def test_every_operation_is_asked(schema: Any) -> None:
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [(POSITIVE, *operation) for operation in OPERATIONS] + [(schemathesis.GenerationMode.NEGATIVE, *COMPLETIONS)],
)
def test_answers_are_as_the_schema_says(mode: Any, method: str, path: str, schema: Any, running: Running) -> None:
    operation = schema[path][method]
    # Conversations are refused, and a random name is no model's.
    excluded = [checks.positive_data_acceptance] if "chat" in path else []

    def check(case: Any) -> None:
        response = case.call(base_url=running.url)
        # A body of a megabyte is refused with 413, which schemathesis takes for acceptance.
        refused = [checks.negative_data_rejection] if response.status_code == 413 else []
        case.validate_response(response, excluded_checks=excluded + refused)

    examples(operation.as_strategy(generation_mode=mode), check)
    assert running.complete(max_tokens=1).status_code == 200


def test_settings_that_are_allowed_one_by_one_are_answered(schema: Any, running: Running) -> None:
    """With the served model's name; some do not go together, which is then said."""

    def check(case: Any) -> None:
        case.body["model"] = "bottles"
        case.call_and_validate(base_url=running.url, excluded_checks=[checks.positive_data_acceptance])

    examples(schema["/v1/completions"]["POST"].as_strategy(generation_mode=POSITIVE), check)
    assert running.complete(max_tokens=1).status_code == 200


def test_the_page_on_serving_says_the_bounds_that_there_are() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "serving.md").read_text().split())
    limits, options = Limits(), serve._options(["runs/gpt2"])
    for said in (
        f"up to {completions.MAX_PROMPTS} of either; {completions.MAX_PROMPT_CHARACTERS:,} characters",
        f"| `max_tokens` | {completions.DEFAULT_TOKENS} | {completions.MAX_TOKENS:,}; 0 with `echo` |",
        f"| `n` | 1 | {completions.MAX_N}; a client may have all {options.max_concurrency} slots",
        f"{completions.MAX_STOPS} texts of {completions.MAX_STOP_CHARACTERS} characters",
        f"{completions.MAX_LOGPROBS}, and {completions.MAX_LIKELIHOODS:,} numbers in a request",
        f"`--max-concurrency` texts ({options.max_concurrency})",
        f"`--max-queue` more ({options.max_queue}) wait",
        f"`--timeout` ({options.timeout} s)",
        f"for `--drain` seconds ({options.drain})",
        f"{connections.MAX_CONNECTIONS} may be open",
        f"{connections.MAX_PER_ADDRESS} of one address",
        f"Headers have {connections.HEADER_TIMEOUT_S:g} s to come, a body {limits.body_timeout_s:g} s more",
        f"they may be {limits.max_header_bytes >> 10} KiB and {limits.max_body_bytes >> 20} MiB long",
        f"Who reads nothing for {connections.UNREAD_TIMEOUT_S:g} s",
        f"({server.MAX_UNPRINTED:,} lines wait)",
    ):
        assert said in page, said

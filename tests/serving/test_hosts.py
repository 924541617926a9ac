"""Names that a server is asked by, of which a page of another site may have made one lead here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from groundling.serving.hosts import client_of

from .conftest import Running, Serve


@pytest.fixture(scope="module")
def named(serve: Serve) -> Iterator[Running]:
    with serve(hosts=frozenset({"shakespeare.example", "192.0.2.7"})) as server:
        yield server


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:1",
        "127.0.0.1",
        "127.1.2.3:80",
        "[::1]",
        "[::1]:80",
        "Shakespeare.example:443",
        "192.0.2.7",
    ],
)
def test_its_own_names_are_answered(host: str, named: Running) -> None:
    assert named.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/openapi.json", "/", "/nowhere"])
@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0"),
        *("sub.shakespeare.example", "192.0.2.8", "", ":8000", "[", "[::2]"),
    ],
)
def test_other_names_are_not(host: str, path: str, named: Running) -> None:
    answer = named.client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    error = answer.json()["error"]
    assert error["code"] == "wrong_host"
    assert "--allowed-host" in error["message"]


def test_any_name_is_answered_if_none_is_asked_for(running: Running) -> None:
    assert running.client.get("/v1/models", headers={"Host": "anything.example"}).status_code == 200


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::ff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::ff", "2001:db8:1:3::/64"),
        ("", ""),
    ],
)
def test_the_addresses_of_one_host_are_one_client(address: str, client: str) -> None:
    assert client_of(address) == client

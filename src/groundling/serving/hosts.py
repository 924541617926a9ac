"""The names that a server answers to.

Invariant: a page of another site whose name was made to lead to this machine (DNS rebinding) gets no answer from a
server that only this machine reaches: browsers name the host that they were sent to, which an address's owner chose.

Source: RFC 9110, 7.2 (Host) and 15.5.20 (421); RFC 6761, 6.3 (localhost).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from groundling.serving.api_errors import wrong


def host_of(address: str) -> str | None:
    """The host in an address, as `//name:port`, in small letters and without its port; None if there is none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether this is a name or an address by which a machine calls itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bare_ip6(name: str) -> str | None:
    """An IPv6 address, with or without brackets, as `host_of` gives it; None if this is none."""
    try:
        return str(ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return None


def client_of(address: str) -> str:
    """Who an address counts as: an IPv6 host has a network of 2^64 addresses to call from (RFC 4291, 2.5.1)."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return address
    return str(ip.ipv4_mapped or ipaddress.ip_network((int(ip), 64), strict=False))


def check_host(header: str, names: Collection[str]) -> None:
    """Raises `ApiError` if a Host header names neither this machine itself nor one of the names."""
    host = host_of(f"//{header}")
    if host is not None and (is_loopback(host) or (bare_ip6(host) or host) in names):
        return
    raise wrong(
        f"this server does not answer to the name {(host or header)[:100]!r}: ask for localhost, or start it with that"
        " name as --allowed-host",
        status=421,
        code="wrong_host",
    )

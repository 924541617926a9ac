"""`groundling serve`: a trained model as a page to try it on, and behind OpenAI's completions API."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from groundling import runtime
from groundling.commands.model_options import OpenRun, add_decoding_options, model_parser, open_model
from groundling.commands.page_subject import subject_of
from groundling.commands.saying import say
from groundling.errors import ConfigError

EXAMPLES = """examples:
  groundling serve runs/gpt2
  groundling serve runs/gpt2 --port 9000 --max-concurrency 32 --weights int8
  GROUNDLING_API_KEY=... groundling serve runs/gpt2 --host 0.0.0.0
  groundling serve gpt2-shakespeare                  an exported Hugging Face folder, or a name on the hub
"""

HOST_HELP = "name that it answers to, as behind a proxy; may be given several times"
CONNECTIONS_HELP = "connections that one address may have open, 0 for any number; 64 if other machines reach it"

BOUNDS = {
    "port": (0, 65535),
    "max_concurrency": (1, 256),
    "max_queue": (0, 100_000),
    "max_connections_per_address": (0, 512),
    "timeout": (1, 86_400),
    "drain": (0, 3600),
}
"""Of the flags that are numbers. A slot costs memory for keys and values of a whole window."""


def main(arguments: list[str]) -> int:
    """Serve until the process is told to end."""
    options = _options(arguments)
    key = options.api_key if options.api_key is not None else runtime.api_key()
    if key is not None and not (key.strip() == key and key and key.isascii() and key.isprintable()):
        raise ConfigError("the API key is empty, has spaces around it or is not plain ASCII: give another, or none")
    try:
        import groundling.serving.server
    except ImportError as error:
        raise ConfigError(f"serving needs the package {error.name}: pip install 'groundling[serve]'") from None
    with _listening(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        alone = ipaddress.ip_address(host).is_loopback
        config = _config(options, key, alone)
        run = open_model(options)
        served = _served(run, options)
        address = f"http://{_in_address(host)}:{port}"
        add_page = _page(run, served, key) if not options.no_page else None
        listener.listen()  # whoever reads the lines below may connect
        if add_page:
            say(f"the page: {address}/")
        say(f"serving {served.name} ({run.form} weights): {address}/v1, its schema at {address}/openapi.json")
        if key is None and not alone:
            say("warning: anyone who reaches this machine can use it: set GROUNDLING_API_KEY to ask for a key")
        groundling.serving.server.serve(served, config, listener, add_page or groundling.serving.server.no_page)
    return 0


def _options(arguments: list[str]) -> Any:
    parser = model_parser("groundling serve", __doc__ or "", EXAMPLES)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", type=str, help="key that /v1 asks for; better given as GROUNDLING_API_KEY")
    parser.add_argument("--name", type=str, help="the model's name in the API; that of RUN if not given")
    parser.add_argument("--max-concurrency", type=int, default=16, help="texts written at a time")
    parser.add_argument("--max-queue", type=int, default=64, help="texts that may wait; more are told to come back")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME", help=HOST_HELP)
    parser.add_argument("--max-connections-per-address", type=int, metavar="N", help=CONNECTIONS_HELP)
    parser.add_argument("--timeout", type=int, default=120, help="seconds after which an answer is given up")
    parser.add_argument("--drain", type=int, default=30, help="seconds that answers may take after SIGTERM")
    parser.add_argument("--no-page", action="store_true", help="serve the API alone")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts into the access log")
    add_decoding_options(parser)
    options = parser.parse_args(arguments)
    for name, (least, most) in BOUNDS.items():
        if options[name] is not None and not least <= options[name] <= most:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {options[name]}: give a number from {least} to {most:,}")
    return options


def _page(run: OpenRun, served: Any, key: str | None) -> Callable[[Any, Any], Callable[[], None]] | None:
    """What puts the page on the application; None, and a line, if it cannot be there."""
    try:
        from groundling.serving import demo
    except ImportError as error:
        say(f"warning: no page, which needs the package {error.name}: pip install 'groundling[serve]', or --no-page")
        return None
    subject = subject_of(run, served.name)
    return lambda app, access_log: demo.add_page(app, access_log, served, subject, key)


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded: a port that is taken is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port} cannot be listened on ({reason}): give another --host or --port") from None
    return listener


def _config(options: Any, key: str | None, alone: bool) -> Any:
    """What the server allows; `alone` if no other machine reaches it."""
    from groundling.serving.connections import MAX_PER_ADDRESS
    from groundling.serving.hosts import bare_ip6, host_of
    from groundling.serving.server import ServerConfig

    allowed = [ip6 if (ip6 := bare_ip6(name)) else name.lower() for name in options.allowed_host]
    for name, given in zip(allowed, options.allowed_host, strict=True):
        if not bare_ip6(name) and host_of(f"//{name}") != name:
            raise ConfigError(f"--allowed-host is {given!r}: give a name alone, as example.org, without scheme or port")
    hosts = frozenset([bare_ip6(options.host) or options.host.lower(), *allowed])
    per_address = options.max_connections_per_address
    if per_address is None:
        per_address = 0 if alone else MAX_PER_ADDRESS
    return ServerConfig(
        api_key=key,
        drain_s=options.drain,
        log_prompts=options.log_prompts,
        hosts=hosts if alone or options.allowed_host else None,
        max_connections_per_address=per_address,
    )


def _served(run: OpenRun, options: Any) -> Any:
    """What is served."""
    from groundling.serving.engine import Engine
    from groundling.serving.openai_api import Served

    name = options.name or re.sub(r"[^\w.-]+", "-", run.path.resolve().name) or "model"
    n_window = min(run.window, run.model.config.n_ctx)
    run.drafter()  # what is wrong with its text is said now, and no request waits for an index of it
    engine = Engine(run.decoder(options.max_concurrency), run.tokenizer, options.max_queue, run.drafter)
    return Served(engine, run.tokenizer, name, n_window, int(time.time()), options.timeout)

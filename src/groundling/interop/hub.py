"""Repositories on the Hugging Face hub: who may write there, who may read there, and files uploaded in one commit.

Invariant: the token leaves this module only in the headers of huggingface_hub's requests to its own endpoint: never in
a message, an exception or a file. A repository that is there keeps its visibility, and a file that an upload does not
bring stays as it is. The contents travel by HTTP (Git LFS), never by the Xet service, whose program has connections of
its own that neither the client's settings nor our tests reach.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # all documented, none in its __all__
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from groundling import __version__
from groundling.errors import ConfigError, RunFailed

Kind = Literal["model", "space"]

KINDS: dict[Kind, str] = {"model": "model repository", "space": "Space"}

ADVICE = {
    401: "log in again with `hf auth login`, or set HF_TOKEN to a token that is valid",
    402: "see the account's billing settings there",
    403: "use a token that may write there (`hf auth login`), or give another repository",
    404: "give another repository, or a token that may see this one",
    409: "wait for what else goes on there, and repeat the command",
    413: "free some of the account's storage there, and repeat the command",
    429: "wait, then repeat the command",
    507: "free some of the account's storage there, and repeat the command",
}
"""What to do about a status of HTTP (RFC 9110, and RFC 4918 for 507)."""
SERVER_ADVICE = "the trouble is the hub's: repeat the command later"

OUTCOMES = {"/repos/create": "is there and empty", "/commit/": "has all of them"}
"""Of requests that change a repository, by a part of their paths."""

MAX_REASON_CHARS = 300
"""Of what the hub says; some answers are whole pages."""


@dataclass(frozen=True)
class Place:
    """A repository as it was found, and what it is to be."""

    repo: str
    """USER/NAME."""
    kind: Kind
    private: bool
    sdk: str | None
    """Of a Space: gradio or static."""
    exists: bool
    files: tuple[str, ...]
    """In it now."""

    def __str__(self) -> str:
        return f"{KINDS[self.kind]} {self.repo}"

    @property
    def visibility(self) -> Literal["private", "public"]:
        return "private" if self.private else "public"


@dataclass(frozen=True)
class Upload:
    """What an upload came to, in the hub's own words."""

    address: str
    commit: str
    changed: bool
    """False if the repository held these files already."""


def check_repo(repo: str, flag: str) -> str:
    """The name itself. Raises `ConfigError` if it is not USER/NAME as the hub allows it."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        well_formed = False
    else:
        well_formed = repo.count("/") == 1
    if not well_formed:
        raise ConfigError(
            f"{flag} is {repo!r}: give USER/NAME, in letters, digits, '-', '_' and '.', 96 characters at most,"
            " with no '-' or '.' at an end and none twice in a row"
        )
    return repo


class Hub:
    """The hub, as the owner of one token sees it."""

    def __init__(self, token: str, note: Callable[[str], None]) -> None:
        """Raises `ConfigError` if the hub does not know the token, or it may only read.

        `note` receives what the user should know while something is going on, such as a wait before another attempt.
        """
        self._token, self._note = token, note
        if not re.fullmatch(r"[!-~]+", token):  # else the HTTP library would quote it in its complaint
            raise ConfigError(f"the hub's token is garbled (not plain ASCII): {ADVICE[401]}")
        self._api = HfApi(token=token, library_name="groundling", library_version=__version__)
        with self._asking("the token", "nothing was uploaded"):
            self._account = self._api.whoami()
        self.name: str = self._account["name"]
        access = (self._account.get("auth") or {}).get("accessToken") or {}
        self._role = access.get("role")
        if self._role == "read":
            raise ConfigError(f"the hub's token of {self.name} may only read: use one that may write (`hf auth login`)")

    @classmethod
    def of_user(cls, note: Callable[[str], None]) -> Hub:
        """The hub with the token that is set in HF_TOKEN or was left by `hf auth login`.

        Raises `ConfigError` if there is none.
        """
        try:
            with _quiet(note):
                token = get_token()  # which may have to be renewed
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError, OIDCError) as error:
            raise ConfigError(f"the hub's token cannot be had ({type(error).__name__}): {ADVICE[401]}") from None
        if token is None:
            raise ConfigError(
                "there is no token for the hub: make one that may write in your account's settings there and run"
                " `hf auth login`, or set HF_TOKEN to it"
            )
        return cls(token, note)

    @property
    def is_paid(self) -> bool:
        """Whether the token's owner is known to have a paid account."""
        return bool(self._account.get("isPro"))

    def look(self, repo: str, kind: Kind, private: bool, sdk: str | None = None) -> Place:
        """The repository as it is, checked to be one that can become what is wanted; nothing is changed.

        Raises `ConfigError` if the token may not write there, or another visibility or kind of Space is there.
        """
        owner = repo.partition("/")[0]
        names = [self.name, *(org["name"] for org in self._account.get("orgs") or [])]
        if owner.casefold() not in map(str.casefold, names) and self._role != "fineGrained":  # whose list may be short
            raise ConfigError(
                f"the hub's token is of {self.name}, who may not write for {owner}: give a repository of"
                f" {' or '.join(names)}"
            )
        with self._asking(f"the {KINDS[kind]} {repo}", "nothing was uploaded"):
            try:
                found = self._info(repo, kind)
            except RepositoryNotFoundError:
                return Place(repo, kind, private, sdk, exists=False, files=())
            if found.id.casefold() != repo.casefold():
                raise ConfigError(f"{repo} is called {found.id} now: give that name")
            self._api.auth_check(repo, repo_type=kind, write=True)
        place = Place(repo, kind, private, sdk, True, tuple(entry.rfilename for entry in found.siblings or ()))
        if bool(found.private) != private:
            raise ConfigError(
                f"the {place} is there and {'private' if found.private else 'public'}, which publishing does not"
                f" change: {'give --private' if found.private else 'leave out --private'}, change it in its settings,"
                " or give another repository"
            )
        found_sdk = getattr(found, "sdk", None)
        if kind == "space" and found_sdk not in (None, sdk):
            raise ConfigError(f"the {place} is there and runs on {found_sdk}, not {sdk}: give another repository")
        return place

    def upload(
        self,
        place: Place,
        folder: Path,
        message: str,
        advance: Callable[[float], None] = lambda n_bytes: None,
        stale: str | None = None,
    ) -> Upload:
        """Make the repository if it is not there, and bring every file of the folder in one commit.

        `advance` is called with bytes sent; files that match `stale` and that the folder does not have are removed.
        Raises `RunFailed`, with the state of the repository, if it cannot be done; contents that arrived are not sent
        again by the next attempt.
        """
        nothing = f"the {place} was not made" if not place.exists else f"the {place} is as it was"
        before = None
        if not place.exists:
            with self._uploading(place, nothing):
                self._api.create_repo(
                    place.repo, repo_type=place.kind, visibility=place.visibility, space_sdk=place.sdk
                )
            nothing = f"the {place} was made and has none of these files"
        with self._uploading(place, nothing):
            found = self._info(place.repo, place.kind)
            if bool(found.private) != place.private:  # an organisation may decide on it
                raise RunFailed(
                    f"the {place} is {'private' if found.private else 'public'} on the hub, not {place.visibility} as"
                    " asked: nothing was uploaded, so change it in its settings and repeat the command"
                )
            before = found.sha
        with contextlib.ExitStack() as stack:
            names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
            files = [stack.enter_context(_Watched(folder / name, advance)) for name in names]
            operations: list[Any] = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
                for name, file in zip(names, files, strict=True)
            ]
            operations += [
                CommitOperationDelete(path_in_repo=name)
                for name in place.files
                if stale and fnmatch(name, stale) and name not in names
            ]
            for file in files:
                file.watch()
            with self._uploading(place, nothing):
                done = self._api.create_commit(
                    place.repo, repo_type=place.kind, operations=operations, commit_message=message
                )
        return Upload(str(done.repo_url), done.oid, done.oid != before)

    def _info(self, repo: str, kind: Kind) -> ModelInfo | SpaceInfo:
        return self._api.model_info(repo) if kind == "model" else self._api.space_info(repo)

    def _uploading(self, place: Place, state: str) -> contextlib.AbstractContextManager[None]:
        return self._asking(f"an upload to the {place}", state, begun=True)

    @contextlib.contextmanager
    def _asking(self, what: str, state: str, begun: bool = False) -> Iterator[None]:
        """What the client raises inside becomes one sentence, with the state that the hub is left in."""
        try:
            with _quiet(self._tell):
                yield
        except (ConfigError, RunFailed):
            raise
        except OfflineModeIsEnabled:
            raise ConfigError("HF_HUB_OFFLINE is set, which keeps the hub's client offline: unset it") from None
        except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
            raise self._sentence(error, what, state, begun) from None  # the cause holds the request, with the token

    def _sentence(self, error: BaseException, what: str, state: str, begun: bool) -> ConfigError | RunFailed:
        error = _innermost(error)
        if (unless := _outcome_if_done(error)) is not None:
            state += f", or, if only the hub's answer was lost, {unless}"
        again = f"{state}; the same command goes on from there"
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            reason = self._shown(error.server_message or error.response.reason_phrase)
            advice = ADVICE.get(status) or (SERVER_ADVICE if status >= 500 else "see what it says")
            if begun or status == 429 or status >= 500:
                return RunFailed(f"the hub refused {what} ({status}: {reason}): {advice}; {again}")
            return ConfigError(f"the hub refused {what} ({status}: {reason}): {advice}")
        if isinstance(error, json.JSONDecodeError):
            return RunFailed(f"the hub's answer about {what} cannot be read: {SERVER_ADVICE}; {again}")
        reason = self._shown(str(error) or type(error).__name__)
        if isinstance(error, httpx2.HTTPError | OSError):
            return RunFailed(f"the connection to the hub broke ({reason}): {again}")
        return RunFailed(f"the hub did not take {what} ({reason}): {again}")

    def _tell(self, message: str) -> None:
        self._note(f"hub: {self._shown(message)}")

    def _shown(self, text: str) -> str:
        """Somebody else's words on one line, without the token and without signed addresses."""
        words = " ".join(text.replace(self._token, "(token)").split())
        return re.sub(r"\?\S+", "", words)[:MAX_REASON_CHARS].rstrip(" .:")


class _Watched(io.BufferedReader):
    """A file that reports how far it has been read for the first time, once it is told to."""

    def __init__(self, path: Path, advance: Callable[[float], None]) -> None:
        super().__init__(io.FileIO(path))
        self._advance, self._reached, self._watching = advance, 0, False

    def watch(self) -> None:
        self._watching = True

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if self._watching and self.tell() > self._reached:
            self._advance(self.tell() - self._reached)
            self._reached = self.tell()
        return content


def _innermost(error: BaseException) -> BaseException:
    """The cause that the client wrapped: it raises RuntimeError from what broke the upload of a file."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _outcome_if_done(error: BaseException) -> str | None:
    """What a request that changes the repository has made of it, if nobody can know whether it was carried out."""
    if isinstance(error, HfHubHTTPError):
        request = error.response.request if error.response.status_code >= 500 else None
    else:
        try:
            request = error.request if isinstance(error, httpx2.HTTPError) else None
        except RuntimeError:  # no request belongs to it
            request = None
    path = request.url.path if request else ""
    return next((outcome for verb, outcome in OUTCOMES.items() if verb in path), None)


@contextlib.contextmanager
def _quiet(note: Callable[[str], None]) -> Iterator[None]:
    """The client's own bars, warnings and log lines are kept back, but for its waits, which `note` receives."""
    logger = logging.getLogger("huggingface_hub")
    handlers, propagate, bars = logger.handlers[:], logger.propagate, not are_progress_bars_disabled()
    logger.handlers, logger.propagate = [_Waits(note)], False
    if bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if bars:
            enable_progress_bars()


class _Waits(logging.Handler):
    """Passes on that the client waits before another attempt; its other lines hold addresses with signatures."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "[Retry" in message:
            self._note(message)


def untouched_files(place: Place, brought: Iterable[str], stale: str | None = None) -> list[str]:
    """Files of the repository that an upload of these does not touch, but for the hub's own .gitattributes."""
    kept = set(place.files) - set(brought) - {".gitattributes"}
    return sorted(name for name in kept if not (stale and fnmatch(name, stale)))

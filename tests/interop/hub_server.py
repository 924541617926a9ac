"""A hub in memory behind the real client: repositories, commits, large files, and troubles on order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
from huggingface_hub import constants

TOKEN = "hf_" + "Wer3sAgt1stSelberSchuld"
USER = "will"
ORGANISATION = "globe"
STORAGE = "https://storage.invalid"
"""Another host than the hub's, which must not see the token."""

API = re.compile(r"/api/(?P<kind>model|space)s/(?P<repo>[^/]+/[^/]+)(?P<verb>/.*)?")
BATCH = re.compile(r"/(?P<kind>spaces/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Commit:
    message: str
    paths: list[str]
    removed: list[str]


@dataclass
class Repository:
    private: bool
    sdk: str | None = None
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[Commit] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Trouble:
    """What happens to requests whose "METHOD path" the pattern finds."""

    pattern: str
    times: float
    status: int | None
    """None breaks the connection."""
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    """Of the body, read before the connection breaks."""
    lost_answer: bool = False
    """The request is carried out, and the connection breaks then."""


class HubServer(httpx2.BaseTransport):
    """What the client's requests reach."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None
        """If set, large files are asked for in parts of this size."""
        self.troubles: list[Trouble] = []
        self.account: dict[str, Any] = {
            "name": USER,
            "isPro": False,
            "orgs": [{"name": ORGANISATION}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.makes: str | None = None
        """The visibility of new repositories, whatever was asked for, as an organisation may have it."""
        self.renamed: dict[str, str] = {}
        self.log: list[str] = []
        self.sent: list[httpx2.Request] = []
        self.waits: list[float] = []
        """Seconds that the client would have waited."""

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=self, follow_redirects=True)

    def trouble(self, pattern: str, status: int | None = None, *, times: float = float("inf"), **facts: Any) -> None:
        self.troubles.append(Trouble(pattern, times, status, **facts))

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        line = f"{request.method} {request.url.path}"
        self.log.append(line)
        self.sent.append(request)
        trouble = next((one for one in self.troubles if one.times > 0 and re.search(one.pattern, line)), None)
        if trouble is not None:
            trouble.times -= 1
            if trouble.lost_answer:
                request.read()
                self._answer(request)
            elif trouble.status is None:
                self._read_some(request, trouble.after_bytes)
            if trouble.status is None:
                raise httpx2.ReadError("Connection reset by peer", request=request)
            return httpx2.Response(trouble.status, json={"error": trouble.message}, headers=trouble.headers)
        request.read()
        return self._answer(request)

    @staticmethod
    def _read_some(request: httpx2.Request, n_bytes: int) -> None:
        blocks: Iterator[bytes] = iter(request.stream)  # type: ignore[arg-type]
        read = 0
        while read < n_bytes and (block := next(blocks, b"")):
            read += len(block)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if str(request.url).startswith(STORAGE):
            return self._storage(request)
        path = request.url.path
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return httpx2.Response(401, json={"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return httpx2.Response(200, json=self.account)
        if path == "/api/validate-yaml":
            return httpx2.Response(200, json={"errors": [], "warnings": [{"message": "no licence", "line": 1}]})
        if path.startswith("/api/verify/"):
            return httpx2.Response(200 if path.rpartition("/")[2] in self.objects else 404)
        if path == "/api/repos/create":
            return self._create(json.loads(request.content))
        if found := BATCH.fullmatch(path):
            return self._batch(json.loads(request.content))
        found = API.fullmatch(path)
        assert found, path
        repository = self.repositories.get((found["kind"], found["repo"]))
        if repository is None:
            return httpx2.Response(404, json={"error": "not found"}, headers={"X-Error-Code": "RepoNotFound"})
        return self._repository(found["kind"], found["repo"], repository, found["verb"] or "", request)

    def _create(self, asked: dict[str, Any]) -> httpx2.Response:
        kind, repo = asked.get("type") or "model", f"{asked['organization']}/{asked['name']}"
        if (kind, repo) in self.repositories:
            return httpx2.Response(409, json={"error": "You already created this model repo"})
        private = (self.makes or asked["visibility"]) == "private"
        self.repositories[kind, repo] = Repository(private, asked.get("sdk"))
        return httpx2.Response(200, json={"url": self.address(kind, repo)})

    @staticmethod
    def address(kind: str, repo: str) -> str:
        return f"{constants.ENDPOINT}/{'spaces/' if kind == 'space' else ''}{repo}"

    def _repository(
        self, kind: str, repo: str, repository: Repository, verb: str, request: httpx2.Request
    ) -> httpx2.Response:
        if verb in ("", "/revision/main"):
            siblings = [{"rfilename": name} for name in repository.files]
            name = self.renamed.get(repo, repo)
            facts = {"id": name, "private": repository.private, "sha": repository.sha, "siblings": siblings}
            return httpx2.Response(200, json=facts | ({"sdk": repository.sdk} if kind == "space" else {}))
        if verb == "/auth-check/write":
            return httpx2.Response(200)
        if verb == "/preupload/main":
            files = [self._mode(repository, asked) for asked in json.loads(request.content)["files"]]
            return httpx2.Response(200, json={"files": files})
        assert verb == "/commit/main", verb
        return self._commit(kind, repo, repository, request.content)

    @staticmethod
    def _mode(repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
        large = b"\0" in base64.b64decode(asked["sample"])
        content = repository.files.get(asked["path"])
        facts = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if content is None:
            return facts
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return facts | {"oid": hashlib.sha256(content).hexdigest() if large else git}

    def _batch(self, asked: dict[str, Any]) -> httpx2.Response:
        assert asked["operation"] == "upload"
        objects = []
        for wanted in asked["objects"]:
            oid, entry = wanted["oid"], dict(wanted)
            if oid not in self.objects:
                entry["actions"] = {"upload": {"href": f"{STORAGE}/{oid}?signature=secret"}}
                entry["actions"]["verify"] = {"href": f"{constants.ENDPOINT}/api/verify/{oid}"}
                if self.part_bytes:
                    count = -(-wanted["size"] // self.part_bytes)
                    header = {str(n): f"{STORAGE}/part/{oid}/{n}" for n in range(1, count + 1)}
                    entry["actions"]["upload"]["header"] = header | {"chunk_size": str(self.part_bytes)}
            objects.append(entry)
        return httpx2.Response(200, json={"transfer": "basic", "objects": objects})

    def _storage(self, request: httpx2.Request) -> httpx2.Response:
        verb, *names = request.url.path.removeprefix("/").split("/")
        if verb == "part":
            self.parts.setdefault(names[0], {})[int(names[1])] = request.content
            return httpx2.Response(200, headers={"etag": f"part-{names[1]}"})
        content = request.content
        if request.method == "POST":
            content = b"".join(part for _, part in sorted(self.parts[verb].items()))
        assert hashlib.sha256(content).hexdigest() == verb, "the content is not that of its name"
        self.objects[verb] = content
        return httpx2.Response(200)

    def _commit(self, kind: str, repo: str, repository: Repository, body: bytes) -> httpx2.Response:
        message, files, removed = "", dict[str, bytes](), list[str]()
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                removed.append(value["path"])
        repository.files.update(files)
        for path in removed:
            del repository.files[path]
        repository.commits.append(Commit(message, sorted(files), removed))
        address = f"{self.address(kind, repo)}/commit/{repository.sha}"
        return httpx2.Response(200, json={"commitUrl": address, "commitOid": repository.sha})

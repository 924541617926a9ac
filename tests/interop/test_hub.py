"""Uploads by the real client to a hub in memory: what is sent, to whom, and what troubles leave behind."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from groundling.errors import ConfigError, RunFailed, UserError
from groundling.interop.hub import Hub, Place, check_repo, untouched_files

from .hub_server import ORGANISATION, STORAGE, TOKEN, USER, HubServer, Repository

REPO = f"{USER}/sonnets"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files and two small ones, one in a folder."""
    random = np.random.default_rng(0)
    path = tmp_path / "export"
    (path / "deeper").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"\0" + random.bytes(300_000))
    (path / "deeper" / "other.onnx").write_bytes(b"\0" + random.bytes(70_000))
    (path / "config.json").write_text('{"n_layer": 1}')
    (path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Sönnets\n")
    return path


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def hub(server: HubServer, notes: list[str]) -> Hub:
    return Hub.of_user(notes.append)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(repository: Repository) -> dict[str, bytes]:
    return {name: content for name, content in repository.files.items() if name != ".gitattributes"}


def oid(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("part_bytes", [None, 65_536])
def test_a_new_repository_has_the_folder_in_one_commit(
    server: HubServer, hub: Hub, folder: Path, private: bool, part_bytes: int | None
) -> None:
    server.part_bytes = part_bytes
    place = hub.look(REPO, "model", private)
    assert not place.exists
    assert server.repositories == {}
    sent = []
    upload = hub.upload(place, folder, "Publish it", sent.append)
    repository = server.repositories["model", REPO]
    assert published(repository) == contents(folder)
    assert repository.private == private
    [commit] = repository.commits
    assert commit.message == "Publish it"
    assert upload.address == f"{huggingface_hub.constants.ENDPOINT}/{REPO}"
    assert (upload.commit, upload.changed) == (repository.sha, True)
    assert sum(sent) == sum(map(len, contents(folder).values()))


def test_the_token_is_told_to_the_hub_alone(server: HubServer, hub: Hub, folder: Path) -> None:
    hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    elsewhere = [request for request in server.sent if str(request.url).startswith(STORAGE)]
    assert elsewhere
    for request in server.sent:
        told = TOKEN in str(request.headers.multi_items()) + str(request.url) + request.content.decode("latin-1")
        assert told == (request not in elsewhere), request.url
        assert not told or request.url.host == str(huggingface_hub.constants.ENDPOINT).partition("://")[2]


def test_the_same_again_changes_nothing(server: HubServer, hub: Hub, folder: Path) -> None:
    hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    server.log.clear()
    upload = hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert not upload.changed
    assert upload.address.endswith(REPO)
    assert not server.requests("PUT|/commit/|create")


def test_an_existing_repository_gets_a_commit_and_keeps_what_the_upload_does_not_bring(
    server: HubServer, hub: Hub, folder: Path
) -> None:
    files = {"old.md": b"old", "groundling-0.0.9.whl": b"PK", "config.json": b"{}"}
    server.repositories["model", REPO] = repository = Repository(False, files=dict(files))
    place = hub.look(REPO, "model", False)
    assert untouched_files(place, contents(folder)) == ["groundling-0.0.9.whl", "old.md"]
    assert untouched_files(place, contents(folder), "groundling-*.whl") == ["old.md"]
    assert hub.upload(place, folder, "Again", stale="groundling-*.whl").changed
    assert published(repository) == {"old.md": b"old", **contents(folder)}
    assert repository.commits[0].removed == ["groundling-0.0.9.whl"]


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_of_the_other_visibility_is_refused(server: HubServer, hub: Hub, private: bool) -> None:
    server.repositories["model", REPO] = Repository(not private)
    with pytest.raises(ConfigError, match="leave out --private" if private else "give --private"):
        hub.look(REPO, "model", private)


@pytest.mark.parametrize("private", [False, True])
def test_nothing_is_uploaded_if_the_hub_decided_on_the_other_visibility(
    server: HubServer, hub: Hub, folder: Path, private: bool
) -> None:
    server.makes = "public" if private else "private"
    with pytest.raises(RunFailed, match=f"{REPO} is {server.makes} on the hub, not"):
        hub.upload(hub.look(REPO, "model", private), folder, "Publish it")
    assert server.objects == {}
    assert server.repositories["model", REPO].commits == []


def test_a_space_has_its_kind(server: HubServer, hub: Hub, folder: Path) -> None:
    upload = hub.upload(hub.look(REPO, "space", False, "static"), folder, "A page")
    assert server.repositories["space", REPO].sdk == "static"
    assert published(server.repositories["space", REPO]) == contents(folder)
    assert upload.address == f"{huggingface_hub.constants.ENDPOINT}/spaces/{REPO}"
    with pytest.raises(ConfigError, match="runs on static, not gradio"):
        hub.look(REPO, "space", False, "gradio")


@pytest.mark.parametrize(
    "repo", ["sonnets", "a/b/c", "will/", "/sonnets", "will/so nets", "will/-a", "w/a--b", "w/a.git"]
)
def test_wrong_names_are_refused(repo: str) -> None:
    with pytest.raises(ConfigError, match=r"--repo is .* give USER/NAME"):
        check_repo(repo, "--repo")
    assert check_repo("Will/So_nets-1.2", "--repo") == "Will/So_nets-1.2"


def test_no_token_is_one_sentence(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"there is no token .* `hf auth login`"):
        Hub.of_user(print)
    assert server.log == []


def test_a_token_that_was_left_by_a_login_is_found(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert Hub.of_user(print).name == USER


@pytest.mark.parametrize("token", ["hf_somebodyElsesToken", "hf_zwölf", "hf_two words", "hf_line\nbreak"])
def test_a_refused_token_is_in_no_word(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match="log in again") as caught:
        Hub.of_user(print)
    captured = capsys.readouterr()
    words = "".join(captured) + repr(caught.value) + repr(caught.value.__cause__)
    assert not any(part in words for part in token.split())
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_hub_that_repeats_the_token_is_not_repeated(server: HubServer, hub: Hub) -> None:
    server.trouble("GET /api/models", 403, message=f"no rights for {TOKEN} at {STORAGE}/there?signature=secret")
    with pytest.raises(ConfigError, match=rf"403: no rights for \(token\) at {STORAGE}/there\)"):
        hub.look(REPO, "model", False)


def test_a_token_that_may_only_read_is_refused_at_once(server: HubServer) -> None:
    server.account["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ConfigError, match="may only read"):
        Hub.of_user(print)


def test_other_peoples_names_are_refused_before_anything_is_made(server: HubServer, hub: Hub) -> None:
    with pytest.raises(ConfigError, match=f"give a repository of {USER} or {ORGANISATION}"):
        hub.look("kit/sonnets", "model", False)
    assert not hub.look(f"{ORGANISATION}/sonnets", "model", False).exists
    server.repositories["model", REPO] = Repository(False)
    server.trouble("auth-check/write", 403, message="Forbidden")
    with pytest.raises(ConfigError, match=r"refused the model repository .*403: Forbidden.*may write there"):
        hub.look(REPO, "model", False)


def test_a_narrow_token_is_judged_by_the_hub(server: HubServer, folder: Path) -> None:
    """A fine-grained token may write for an organisation that its account does not list."""
    server.account["auth"]["accessToken"]["role"] = "fineGrained"
    hub = Hub.of_user(print)
    place = hub.look("kit/sonnets", "model", False)
    server.trouble("/api/repos/create", 403, message="You don't have the rights to create a model under kit")
    with pytest.raises(RunFailed, match=r"403: You don't have the rights.* model repository kit/sonnets was not made"):
        hub.upload(place, folder, "Publish it")


TROUBLES = {
    "the connection breaks in a large file": ("PUT /[0-9a-f]{64}$", None, "connection.*was made and has none"),
    "the storage fails": ("PUT /[0-9a-f]{64}$", 500, "500: storage is full.* has none"),
    "the disk quota": ("objects/batch", 403, "403: storage is full.* was made and has none"),
    "too many requests": ("preupload", 429, "429.* wait, then repeat"),
    "metadata that are refused": ("validate-yaml", 400, "did not take.*Invalid metadata.* has none"),
    "an answer that is none": ("validate-yaml", 502, "502|cannot be read"),
    "the connection breaks at the making": (
        "POST /api/repos/create",
        None,
        "was not made, or, if .* is there and empty",
    ),
    "the hub fails at the making": ("POST /api/repos/create", 500, "500.* later; .* was not made, or, if"),
    "somebody was quicker": ("POST /api/repos/create", 409, "409.* was not made; the same"),
    "the connection breaks before the commit": ("/commit/", None, "answer was lost, has all of them"),
    "the hub fails in the commit": ("/commit/", 503, "503.*answer was lost, has all of them"),
    "the hub refuses the commit": ("/commit/", 413, "413.*free some.* has none of these files; the same"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_after_a_trouble_the_same_command_goes_on(server: HubServer, hub: Hub, folder: Path, trouble: str) -> None:
    pattern, status, sentence = TROUBLES[trouble]
    server.trouble(pattern, status, message="storage is full", after_bytes=100_000)
    with pytest.raises(RunFailed, match=sentence) as caught:
        hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert "the same command goes on from there" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "signature" not in str(caught.value)
    repository = server.repositories.get(("model", REPO))
    assert repository is None or repository.commits == []
    arrived = set(server.objects)
    server.log.clear()
    server.troubles.clear()
    hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    repository = server.repositories["model", REPO]
    assert published(repository) == contents(folder)
    assert len(repository.commits) == 1
    large = {oid(folder / "model.safetensors"), oid(folder / "deeper" / "other.onnx")}
    assert {line.removeprefix("PUT /") for line in server.requests("^PUT")} == large - arrived


def test_large_files_that_arrived_are_not_sent_again(server: HubServer, hub: Hub, folder: Path, tmp_path: Path) -> None:
    second = (folder / "deeper" / "other.onnx").rename(tmp_path / "later")
    server.trouble("/commit/")
    with pytest.raises(RunFailed, match="connection to the hub broke"):
        hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert list(server.objects) == [oid(folder / "model.safetensors")]
    second = second.rename(folder / "deeper" / "other.onnx")
    server.troubles.clear()
    server.log.clear()
    hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert server.requests("^PUT") == [f"PUT /{oid(second)}"]
    assert published(server.repositories["model", REPO]) == contents(folder)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(server: HubServer, hub: Hub, folder: Path) -> None:
    server.trouble("/commit/", lost_answer=True, times=1)
    with pytest.raises(RunFailed, match="if only the hub's answer was lost, has all of them"):
        hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert not hub.upload(hub.look(REPO, "model", False), folder, "Publish it").changed
    assert len(server.repositories["model", REPO].commits) == 1


def test_a_making_whose_answer_was_lost_is_found_again(server: HubServer, hub: Hub, folder: Path) -> None:
    server.trouble("/repos/create", lost_answer=True, times=1)
    with pytest.raises(RunFailed, match="if only the hub's answer was lost, is there and empty"):
        hub.upload(hub.look(REPO, "model", True), folder, "Publish it")
    hub.upload(hub.look(REPO, "model", True), folder, "Publish it")
    assert published(server.repositories["model", REPO]) == contents(folder)


def test_a_passing_trouble_is_waited_for_and_told(server: HubServer, hub: Hub, folder: Path, notes: list[str]) -> None:
    server.trouble("PUT /[0-9a-f]{64}$", times=1, after_bytes=50_000)
    server.trouble("preupload", 429, times=1, headers={"Retry-After": "41"})
    hub.upload(hub.look(REPO, "model", False), folder, "Publish it")
    assert published(server.repositories["model", REPO]) == contents(folder)
    assert server.waits == [42, 1]
    assert len(notes) == 2
    assert all("Retry 1/5" in note and "://" not in note for note in notes)


@pytest.mark.parametrize("status", [429, 500, None])
def test_a_hub_in_trouble_is_no_fault_of_the_user(server: HubServer, status: int | None) -> None:
    server.trouble("whoami", status)
    with pytest.raises(RunFailed, match="nothing was uploaded; the same command"):
        Hub.of_user(print)


def test_a_renamed_repository_is_named(server: HubServer, hub: Hub) -> None:
    server.repositories["model", REPO] = Repository(False)
    server.renamed[REPO] = f"{USER}/tragedies"
    with pytest.raises(ConfigError, match=f"is called {USER}/tragedies now"):
        hub.look(REPO, "model", False)


def test_every_exception_is_a_users(server: HubServer, hub: Hub, folder: Path) -> None:
    place = Place(REPO, "model", False, None, exists=True, files=())  # which is gone meanwhile
    with pytest.raises(UserError, match="404"):
        hub.upload(place, folder, "Publish it")

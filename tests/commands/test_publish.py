"""`groundling publish`: what is asked before the export, what stands on the hub after it, and what is said."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from groundling.cli import main
from groundling.interop import huggingface
from groundling.interop.trained import Trained, open_trained

from ..interop.hub_server import TOKEN, USER, HubServer, Repository

REPO = f"{USER}/bottles"
BEFORE_THE_EXPORT = {"GET /api/whoami-v2", f"GET /api/models/{REPO}", f"GET /api/models/{REPO}/auth-check/write"}


@pytest.fixture
def publish(server: HubServer, run: Path, capfd: pytest.CaptureFixture[str]) -> Publish:
    return Publish(run, capfd)


class Publish:
    """The command on the run, whose words never have the token in them."""

    def __init__(self, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run, self.capfd = run, capfd

    def __call__(self, *arguments: str, repo: str = REPO) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        code = main(["publish", str(self.run), "--repo", repo, *arguments])
        out, err = self.capfd.readouterr()
        assert TOKEN not in out + err
        assert "Traceback" not in err
        return code, out, err


def same_model(repository: Repository, run: Path, folder: Path) -> bool:
    """Whether what was published, taken back, is the run's model."""
    folder.mkdir()
    for name, content in repository.files.items():
        (folder / name).write_bytes(content)
    published, own = open_trained(folder), open_trained(run)
    assert published.tokenizer.encode("40 green") == own.tokenizer.encode("40 green")
    pairs = zip(published.model.parameters(), own.model.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_run_is_published(publish: Publish, server: HubServer, tmp_path: Path) -> None:
    code, out, err = publish()
    assert (code, out) == (0, f"{huggingface_hub.constants.ENDPOINT}/{REPO}\n")
    repository = server.repositories["model", REPO]
    assert not repository.private
    assert same_model(repository, publish.run, tmp_path / "back")
    assert [commit.message for commit in repository.commits] == ["Publish the model of the run bottles with Groundling"]
    assert f"the public model repository {REPO} will be made: {len(repository.files) - 1} files, " in err
    assert "can recite its training text" in err
    assert "model verified: " in err
    assert str(Path.cwd()).encode() not in b"".join(repository.files.values()), "a path of this machine is published"
    code, out, err = publish()
    assert code == 0
    assert "nothing new" in err
    assert len(repository.commits) == 1


def test_a_private_one_stays_private(publish: Publish, server: HubServer) -> None:
    assert publish("--private")[0] == 0
    assert server.repositories["model", REPO].private
    code, _, err = publish()
    assert code == 2
    assert "is there and private" in err
    assert "give --private" in err
    assert publish("--private", "--dtype", "bf16")[0] == 0
    assert len(server.repositories["model", REPO].commits) == 2


def test_an_existing_repository_is_updated_and_that_is_said(publish: Publish, server: HubServer) -> None:
    server.repositories["model", REPO] = Repository(False, files={"config.json": b"{}", "notes.md": b"mine"})
    code, _, err = publish()
    assert code == 0
    assert f"{REPO} will be updated by a new commit" in err
    assert "keeps 1 other files that it has now (notes.md)" in err
    assert server.repositories["model", REPO].files["notes.md"] == b"mine"


@pytest.mark.parametrize("private", [False, True])
def test_privacy_is_no_surprise(publish: Publish, server: HubServer, private: bool) -> None:
    server.repositories["model", REPO] = Repository(not private)
    assert publish(*["--private"] * private)[0] == 2
    assert set(server.log) <= BEFORE_THE_EXPORT
    assert server.repositories["model", REPO].commits == []


def test_without_a_token_nothing_is_asked_or_exported(
    publish: Publish, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = publish()
    assert code == 2
    assert "`hf auth login`" in err
    assert err.count("\n") == 1
    assert server.log == []


def test_refused_credentials(publish: Publish, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobodysToken")
    code, out, err = publish()
    assert code == 2
    assert "401" in err
    assert "hf_nobodysToken" not in out + err
    assert server.log == ["GET /api/whoami-v2"]


def test_wrong_names(publish: Publish, server: HubServer) -> None:
    assert "--repo is 'bottles'" in publish(repo="bottles")[2]
    assert "--space-repo is 'a/b/c'" in publish("--space-repo", "a/b/c")[2]
    assert "may not write for kit" in publish(repo="kit/bottles")[2]
    assert publish(repo="kit/bottles")[0] == 2
    asked = list(server.log)
    said = publish("--space-repo", f"{USER}/demo", "--static-repo", f"{USER}/demo")[2]
    assert f"--space-repo and --static-repo are both {USER}/demo" in said
    assert server.log == asked


def test_a_network_that_fails_half_way_and_a_repeat(publish: Publish, server: HubServer, tmp_path: Path) -> None:
    server.trouble("PUT /[0-9a-f]{64}$", after_bytes=20_000)
    code, out, err = publish()
    assert (code, out) == (1, "")
    assert f"the model repository {REPO} was made and has none of these files; the same command goes on" in err
    assert server.repositories["model", REPO].commits == []
    server.troubles.clear()
    assert publish()[0] == 0
    assert same_model(server.repositories["model", REPO], publish.run, tmp_path / "back")


def test_what_is_not_the_model_is_not_uploaded(
    publish: Publish, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = huggingface.write

    def write_wrongly(trained: Trained, target: Path, precision: str) -> None:
        write(trained, target, precision)
        tensors = load_file(target / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, target / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(huggingface, "write", write_wrongly)
    assert publish()[0] == 1
    assert set(server.log) <= BEFORE_THE_EXPORT
    assert server.repositories == {}


def test_a_space_is_made_beside_the_model(publish: Publish, server: HubServer) -> None:
    code, out, err = publish("--space")
    assert code == 0
    endpoint = huggingface_hub.constants.ENDPOINT
    assert out.split() == [f"{endpoint}/{REPO}", f"{endpoint}/spaces/{REPO}-demo"]
    assert "paid accounts only" in err
    space = server.repositories["space", f"{REPO}-demo"]
    assert (space.sdk, space.private) == ("gradio", False)
    [wheel] = [name for name in space.files if name.endswith(".whl")]
    assert set(space.files) - {".gitattributes"} == {"README.md", "app.py", "requirements.txt", wheel}
    assert f'main(["serve", "{REPO}"' in space.files["app.py"].decode()
    space.files["groundling-0.0.1-py3-none-any.whl"] = space.files[wheel]
    assert publish("--space")[0] == 0
    assert [name for name in space.files if name.endswith(".whl")] == [wheel]


def test_a_space_that_is_refused_leaves_the_model_published(publish: Publish, server: HubServer) -> None:
    server.trouble("POST /api/repos/create", 402, times=0, message="PRO is needed")
    server.repositories["model", REPO] = Repository(True)
    server.troubles[0].times = 1
    code, out, err = publish("--space", "--private", "--space-repo", f"{USER}/stage")
    assert code == 1
    assert out.split() == [f"{huggingface_hub.constants.ENDPOINT}/{REPO}"]
    assert "402: PRO is needed" in err
    assert f"the Space {USER}/stage was not made" in err
    assert f"(the model repository {REPO}: published)" in err
    code, _, err = publish("--space", "--private", "--space-repo", f"{USER}/stage")
    assert code == 0
    assert server.repositories["space", f"{USER}/stage"].private
    assert "secret HF_TOKEN" in err


def test_at_a_terminal_it_asks_before_something_becomes_public(
    publish: Publish, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("no\nyes\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = publish()
    assert code != 0
    assert "publish it? [y/N]" in err
    assert re.search(r"its card, to be read before it is published: /\S+/README\.md\n", err)
    assert server.repositories == {}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    code, _, err = publish()
    assert code == 2
    assert "would not be seen here: give --yes or --private" in err
    assert server.repositories == {}
    assert publish("--yes")[0] == 0
    assert sys.stdin.readline() == "yes\n", "--yes asked"
    assert "the README.md that it has now is replaced" not in err
    assert "the README.md that it has now is replaced" in publish("--yes")[2]


def test_a_licence_is_named_where_the_hub_reads_it(publish: Publish, server: HubServer) -> None:
    assert publish("--license", "cc0-1.0")[0] == 0
    card = server.repositories["model", REPO].files["README.md"].decode()
    assert "\nlicense: cc0-1.0\n" in card.split("---")[1]
    code, _, err = publish("--license", "CC0: free!")
    assert (code, "give its identifier on the hub" in err) == (2, True)


def test_a_page_for_browsers_is_made_beside_the_model(
    publish: Publish, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GROUNDLING_CACHE")  # the page's library lies where tests/interop/test_web_page.py has it too
    code, out, err = publish("--static-space", "--private", "--static-repo", f"{USER}/stage")
    assert code == 0
    assert out.split()[1] == f"{huggingface_hub.constants.ENDPOINT}/spaces/{USER}/stage"
    space = server.repositories["space", f"{USER}/stage"]
    assert (space.sdk, space.private) == ("static", True)
    assert space.files["model.gguf"].startswith(b"GGUF")
    assert b"sdk: static" in space.files["README.md"]
    assert {"index.html", "page.js", "wllama.wasm"} <= space.files.keys()
    assert "page verified: " in err
    assert "paid" not in err

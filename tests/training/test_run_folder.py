from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from groundling.errors import CheckpointError
from groundling.files import write_json
from groundling.training import run_folder
from groundling.training.run_folder import RunFolder, folder_of

IDENTITY: dict[str, Any] = {"text": "a" * 64, "tokenizer": "b" * 64, "architecture": {"n_layer": 2}}


def begin(path: Path, with_steps: bool = True) -> RunFolder:
    folder = RunFolder(path)
    with folder.open(IDENTITY, "", resume=False):
        if with_steps:
            write_json(folder.identity, IDENTITY)
            folder.metrics.write_text('{"step": 0}\n')
    return folder


def test_a_run_is_continued_only_when_asked(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    with pytest.raises(CheckpointError, match="--resume"), folder.open(IDENTITY, "", resume=False):
        pass
    with folder.open(IDENTITY, "", resume=True):
        pass
    with pytest.raises(CheckpointError, match="no run to resume"), RunFolder(tmp_path / "x").open(IDENTITY, "", True):
        pass


@pytest.mark.parametrize("what", list(IDENTITY))
def test_a_run_made_from_something_else_is_refused(tmp_path: Path, what: str) -> None:
    folder = begin(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"another {what}"), folder.open(IDENTITY | {what: "other"}, "", True):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not empty"), RunFolder(tmp_path).open(IDENTITY, "", resume=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_run_killed_while_it_was_set_up_is_begun_anew(tmp_path: Path) -> None:
    """Nothing else may be in the folder, and the mark of a process that held it must be."""
    folder = RunFolder(tmp_path)
    for left_over in (folder.config, tmp_path / "train.bin", tmp_path / ".train.bin.77.partial"):
        left_over.write_text("half")
        with pytest.raises(CheckpointError, match="not empty"), folder.open(IDENTITY, "", resume=False):
            pass
    (tmp_path / ".lock").touch()
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="not empty"), folder.open(IDENTITY, "", resume=False):
        pass
    (tmp_path / "letters.txt").unlink()
    with folder.open(IDENTITY, "new", resume=False):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml"}
        assert folder.config.read_text() == "new"


def test_a_run_that_could_not_write_its_settings_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk that is full, or a kill at that moment, leaves is no run, and no folder of something else."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(run_folder, "write_text", refuse)
        with pytest.raises(OSError, match="No space"), folder.open(IDENTITY, "", resume=False):
            pass
    assert not folder.path.exists()
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    with folder.open(IDENTITY, "new", resume=False):
        assert folder.config.read_text() == "new"


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "new" / "parents" / "run", with_steps=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    begin(tmp_path / "mine", with_steps=False)
    assert list((tmp_path / "mine").iterdir()) == []  # the folder was the user's, so it stays


def test_a_checkpoint_may_be_reached_by_a_link(tmp_path: Path) -> None:
    """Also from a folder of the same name, which is no run's."""
    folder = begin(tmp_path / "run")
    checkpoint, link = folder.checkpoints / "step-00000001", tmp_path / "checkpoints" / "best"
    for path in (checkpoint, link.parent):
        path.mkdir(parents=True)
    link.symlink_to(checkpoint, target_is_directory=True)
    assert folder_of(link, link).path == folder.path


def test_a_run_that_failed_keeps_what_it_measured(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RuntimeError), folder.open(IDENTITY, "", resume=False):  # noqa: PT012
        folder.metrics.write_text('{"step": 0}\n')
        raise RuntimeError
    assert folder.metrics.exists()


def test_a_folder_with_weights_is_never_removed(tmp_path: Path) -> None:
    """As when somebody deletes the folder of a run at work, and it then saves what it has."""
    folder = RunFolder(tmp_path / "run")
    with folder.open(IDENTITY, "", resume=False):
        (folder.checkpoints / "step-00000046").mkdir(parents=True)
    assert folder.checkpoints.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match="another --out"), RunFolder(path).open(IDENTITY, "", resume=False):
            pass


def _hold(path: Path, held: Any, release: Any) -> None:
    with RunFolder(path).open(IDENTITY, "", resume=True):
        held.set()
        release.wait(30)


def test_a_run_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(folder.path, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(CheckpointError, match="in use"), folder.open(IDENTITY, "", resume=True):
        pass
    release.set()
    other.join()
    with folder.open(IDENTITY, "", resume=True):
        pass

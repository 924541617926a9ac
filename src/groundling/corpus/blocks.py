"""Bytes to normalised text, and text to blocks that can be tokenized one by one.

Invariant: encoding the blocks one after the other gives the tokens of the whole text. GPT-2 first splits a
text into pieces ("Language Models are Unsupervised Multitask Learners", section 2.2; the pattern is in
OpenAI's encoder.py) and merges bytes only inside a piece, so a block may end wherever a piece surely does:

- before a space or line feed that follows a character which is not white space: a piece has white space
  only at its beginning;
- between a letter and a punctuation mark: no piece holds both in that order. Used where a block has no
  place of the first kind, as in Chinese.

`str.isspace` accepts every character of Unicode's White_Space, and four more; `str.isalpha` is general
category L. That the tokenizer agrees on both, for every code point, is a test.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from groundling.corpus.binary import HEAD_BYTES, iconv, refuse_binary
from groundling.errors import CorpusError

READ_BYTES = 1 << 20

BLOCK_CHARS = 1 << 16
"""A block's usual size: large beside the cost of a call, small enough to give every core one of a few MiB."""

MAX_BLOCK_CHARS = 1 << 21
"""Where a text without a single safe place is cut all the same: base64 on one line, not prose. The tokens
around such a cut may differ from those of the uncut text; the text that they spell never does."""

BYTE_ORDER_MARK = "\ufeff"
MIN_SAMPLE = 64
"""Bytes that tell whether a text is one of Latin letters."""
SPACES = " \n"
PUNCTUATION = ".,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"  # the last seven are the CJK ones


def read_text(
    file: BinaryIO, name: str, start: int = 0, stop: int | None = None, read_bytes: int = READ_BYTES
) -> Iterator[str]:
    """The bytes [start, stop) of `file` as text, without byte order mark, each line ended by one line feed.

    `name` stands in the messages. Raises `CorpusError` for what begins as no text does, and with the offset of
    the first byte that is NUL or not UTF-8.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)  # a CR at a chunk's end waits for its LF
    position = start
    first = start == 0  # only a file's very first character can be a byte order mark
    file.seek(0)
    refuse_binary(file.read(HEAD_BYTES), name)
    file.seek(start)
    while True:
        chunk = file.read(read_bytes if stop is None else min(read_bytes, stop - position))
        undecoded = len(utf8.getstate()[0])
        nul = chunk.find(0)
        try:  # up to the NUL, in case that something before it is wrong already
            text = utf8.decode(chunk[:nul] if nul >= 0 else chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, position - undecoded + error.start, error) from None
        if nul >= 0:
            raise CorpusError(
                f"{name} is not plain text: the byte at offset {position + nul} is NUL; if it is text in "
                f"UTF-16, convert it: {iconv('UTF-16', name)}"
            )
        position += len(chunk)
        if first and text:
            text = text.removeprefix(BYTE_ORDER_MARK)
            first = False
        if text := newlines.decode(text, final=not chunk):
            yield text
        if not chunk:
            return


def _not_utf8(name: str, offset: int, error: UnicodeDecodeError) -> CorpusError:
    byte, read = error.object[error.start], error.object
    if offset == 0 and byte in (0xFE, 0xFF):
        advice = f"if it is text in UTF-16, convert it: {iconv('UTF-16', name)}"
    elif len(read) >= MIN_SAMPLE and sum(each >= 0x80 for each in read) > len(read) / 2:
        advice = (
            "if it is text in another encoding, such as GB18030, BIG5, SHIFT_JIS or WINDOWS-1251, convert it from that:"
            f" {iconv('ENCODING', name)}"
        )
    else:  # of Western ones this is the most frequent, and iconv refuses what it has not, where LATIN1 has everything
        advice = f"if it is text in another encoding, convert it, and look at what comes: {iconv('WINDOWS-1252', name)}"
    return CorpusError(f"{name} is not UTF-8: the byte 0x{byte:02X} at offset {offset} ({error.reason}); {advice}")


def cut_blocks(
    texts: Iterable[str], block_chars: int = BLOCK_CHARS, max_block_chars: int = MAX_BLOCK_CHARS
) -> Iterator[str]:
    """The same text in blocks of about `block_chars` characters, cut where tokens surely end.

    Where the cuts fall depends on the text alone, not on how `texts` divides it. Where no safe place is
    found the block grows, by doubling, to `max_block_chars`, and is then cut hard.
    """
    pending = ""
    reach = block_chars
    for text in texts:
        pending += text
        begin = 0
        while len(pending) - begin > reach:
            cut = _last_safe_cut(pending, begin, begin + reach)
            if not cut and reach < max_block_chars:
                reach = min(2 * reach, max_block_chars)
                continue
            cut = cut or begin + reach
            yield pending[begin:cut]
            begin = cut
            reach = block_chars
        pending = pending[begin:]
    if pending:
        yield pending


def _last_safe_cut(text: str, begin: int, end: int) -> int:
    """The last position in (begin, end] where a token surely ends, 0 if there is none."""
    return _last(text, begin, end, SPACES, lambda before: not before.isspace()) or _last(
        text, begin, end, PUNCTUATION, str.isalpha
    )


def _last(text: str, begin: int, end: int, after: str, fits_before: Callable[[str], bool]) -> int:
    # A plain scan from the end: str.rfind for each mark would be quadratic in a run of spaces.
    for cut in range(end, begin, -1):
        if text[cut] in after and fits_before(text[cut - 1]):
            return cut
    return 0

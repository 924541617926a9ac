"""The parts of the page that are HTML of our own: texts with their meter, and bars of what could come next.

Invariant: whatever comes from texts, names or settings is escaped, also what Gradio's templates would take for their
own; nothing is said by colour alone, and no part needs a script.
"""

from __future__ import annotations

import codecs
import html
import math
from collections.abc import Sequence

from groundling.corpus.tokenizer import Tokenizer
from groundling.evaluation.memorisation import DEFAULT_MINIMUM
from groundling.evaluation.report import UNPRINTABLE
from groundling.generation.decode import Likelihood
from groundling.serving.copy_meter import LISTED, Measured, Passage, whole_percent
from groundling.serving.visitors import Looked, Written

BANDS = (DEFAULT_MINIMUM, 2 * DEFAULT_MINIMUM, 4 * DEFAULT_MINIMUM)
"""Tokens from which passages are marked more strongly, as `groundling trace` doubles them."""

ENDINGS = {
    "stop": "The model ended the text here.",
    "length": "",
    "cancelled": "Stopped.",
    "deadline": "Given up: it took too long.",
    "failed": "Decoding has failed.",
}

# Gradio puts a part's value through a template, in which these are not letters.
_TEMPLATE = {ord(letter): f"&#{ord(letter)};" for letter in "${}`\\"}

N_OTHERS = 5
"""Likely tokens that are shown for each token of a text."""


def escape(text: str) -> str:
    """Text as HTML, in elements and in quoted attributes."""
    printable = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
    return html.escape(printable).translate(_TEMPLATE)


def texts(written: Sequence[Written], measured: Sequence[Measured | None], tokenizer: Tokenizer, no_meter: str) -> str:
    """The texts side by side, each with its meter; `no_meter` says why there is none."""
    cards = [
        _card(number if len(written) > 1 else 0, text, found, tokenizer, no_meter)
        for number, (text, found) in enumerate(zip(written, measured, strict=True), start=1)
    ]
    return f'<div class="samples n{len(cards)}">{"".join(cards)}</div>'


def whole(text: Written, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text; of one that grows, as many as are whole characters."""
    n_whole, decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
    for n_read, token in enumerate(text.tokens, start=1):
        decoder.decode(tokenizer.decode_bytes([token]))
        if not decoder.getstate()[0]:
            n_whole = n_read
    return text.tokens[: n_whole if text.ending is None else None]


def _card(number: int, text: Written, found: Measured | None, tokenizer: Tokenizer, no_meter: str) -> str:
    n_measured = found.n_tokens if found else 0
    pieces = [_piece(piece, passage) for piece, passage in found.pieces] if found else []
    rest = escape(tokenizer.decode(whole(text, tokenizer)[n_measured:]))
    caret = '<span class="caret" aria-hidden="true"></span>' if text.ending is None else ""
    head = f"<h3>Sample {number} <small>seed {text.seed}</small></h3>" if number else ""
    note = ENDINGS[text.ending] if text.ending else ""
    return (
        f'<article class="sample" data-ending="{text.ending or ""}">{head}<div class="both"><div class="written">'
        f'<span class="asked">{escape(tokenizer.decode(text.prompt))}</span>{"".join(pieces)}{rest}{caret}'
        f"{f'<p class=note>{note}</p>' if note else ''}</div>{_meter(found, no_meter)}</div></article>"
    )


def _piece(text: str, passage: Passage | None) -> str:
    if passage is None:
        return escape(text)
    band = sum(passage.length >= bound for bound in BANDS)
    tip = f"{passage.length} tokens, verbatim from {escape(passage.where)}"
    return f'<mark class="band{band}" tabindex="0">{escape(text)}<span class="tip" role="tooltip">{tip}</span></mark>'


def _meter(found: Measured | None, no_meter: str) -> str:
    if no_meter:
        return f'<aside class="meter"><p class="none">{escape(no_meter)}</p></aside>'
    if found is None:
        return '<aside class="meter"></aside>'
    listed = "".join(
        f"<li><b>{passage.length} tokens</b> {escape(passage.where)}</li>" for passage in found.passages[:LISTED]
    )
    return (
        f'<aside class="meter"><h4>Copy meter</h4><div class="gauge" aria-hidden="true">'
        f'<i style="width:{100 * found.share:.1f}%"></i></div><p class="says">{escape(found.sentence)}</p>'
        f"{f'<ol>{listed}</ol>' if listed else ''}</aside>"
    )


def legend() -> str:
    """What the marks of the texts mean."""
    names = [f"{BANDS[0]}-{BANDS[1] - 1}", f"{BANDS[1]}-{BANDS[2] - 1}", f"{BANDS[2]} or more"]
    marks = " ".join(f'<mark class="band{band}">{name}</mark>' for band, name in enumerate(names, start=1))
    return f'<p class="legend">Tokens in a row that stand in the training text: {marks}</p>'


def visible(token: int, tokenizer: Tokenizer) -> str:
    """A token as a reader can tell it from others: with its spaces and line ends."""
    if token == tokenizer.end_of_text_id:
        return "(end of text)"
    text = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    return escape(text).replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def following(looked: Looked, tokenizer: Tokenizer) -> str:
    """The likeliest next tokens as bars."""
    rows = [
        f'<tr><td class="token"><code>{visible(token, tokenizer)}</code></td><td class="bar">'
        f'<i style="width:{100 * math.exp(logprob):.2f}%"></i></td><td class="share">{_share(logprob)}</td></tr>'
        for token, logprob in looked.following
    ]
    others = 1 - sum(math.exp(logprob) for _, logprob in looked.following)
    last = escape(_text(looked.tokens, tokenizer)[-60:]).replace("\n", " ")
    heading = f"After <q>{last}</q>" if last else "At the beginning of a text"
    return (
        f'<h3>{heading}</h3><table class="bars"><thead><tr><th>token</th><th>probability</th><th></th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table><p>All other tokens together: {_percent(max(0.0, others))}.</p>"
    )


def _text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens, of which those that end one have none."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.end_of_text_id])


def tokens(looked: Looked, tokenizer: Tokenizer, n_prompt: int) -> str:
    """Each token of the text, to be asked what else was likely there; arrow keys go from one to the next."""
    n_before = len(looked.tokens) - len(looked.likelihoods)
    plain = escape(_text(looked.tokens[:n_before], tokenizer))
    asked = [
        _token(each, tokenizer, is_prompt=place < n_prompt)
        for place, each in enumerate(looked.likelihoods, start=n_before)
    ]
    return f'<div class="tokens"><span class="asked">{plain}</span>{"".join(asked)}</div>'


def _token(each: Likelihood, tokenizer: Tokenizer, is_prompt: bool) -> str:
    likely = sum(math.exp(each.logprob) >= bound for bound in (0.05, 0.5, 0.9))
    rows = "".join(
        f"<tr{' class=taken' if token == each.token else ''}><td><code>{visible(token, tokenizer)}</code></td>"
        f'<td class="bar"><i style="width:{100 * math.exp(logprob):.1f}%"></i></td><td>{_share(logprob)}</td></tr>'
        for token, logprob in each.likeliest[:N_OTHERS]
    )
    raw = tokenizer.decode_bytes([each.token]).decode("utf-8", "backslashreplace")
    shown = escape(raw) if each.token != tokenizer.end_of_text_id else "(end of text)"
    if "\n" in shown and not shown.strip():
        shown = f"<small>\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</small>{shown}"
    tip = (
        f"<b><code>{visible(each.token, tokenizer)}</code> had {_share(each.logprob)}</b>"
        f'<table class="bars">{rows}</table>'
    )
    return (
        f'<label class="token likely{likely}{" asked" if is_prompt else ""}"><input type="radio" name="token">'
        f'<span class="letters">{shown}</span><span class="tip">{tip}</span></label>'
    )


def _share(logprob: float) -> str:
    return _percent(math.exp(logprob))


def _percent(share: float) -> str:
    if share >= 0.0995:
        return whole_percent(share)
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%" if share >= 0.0005 else "< 0.1\N{NO-BREAK SPACE}%"

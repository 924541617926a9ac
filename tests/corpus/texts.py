# ruff: noqa: RUF001  (text in other scripts is the point of this file)
"""Texts that are hard to cut, to decode or to encode, shared by the tests of this folder."""

from hypothesis import strategies as st

GERMAN = "Über den Dächern der Altstadt läuten die Glocken; drei Bäcker öffnen früh ihre Läden. Süßes für alle!\n"
RUSSIAN = "Ранним утром старый лодочник переплыл реку и увидел на берегу рыжую собаку. Она ждала его!\n"
CHINESE = "清晨的雾还没有散，老渔夫已经把小船推到了河里。岸上的狗叫了三声，然后安静地坐下！"

ADVERSARIAL = {
    "spaces": "a" + " " * 50 + "b  c   d    " * 9,
    "tabs": "\tif x:\n\t\treturn\t\ty\n\n\t" * 9,
    "newlines": "one\n\n\n\ntwo\n \n \n three\n\n" * 9,
    "no spaces": "abcdefgh" * 40,
    "digits": "1234567890" * 30,
    "german": GERMAN * 3,
    "russian": RUSSIAN * 3,
    "chinese": CHINESE * 5,
    "emoji": "👩‍👩‍👧 family 🇩🇪🎭🎭 plays 👍🏽! " * 9,
    "apostrophes": "'tis, don't we'll they've I'm 's 'S 't' ''' o'er' 'll" * 9,
    "next line": "a\x85b \x85 c\x85\x85d" * 20,
    "no-break space": "a\xa0b \xa0 c \xa0\xa0d\xa0" * 20,
    "separators": "a\x1cb\x1dc\x1e d\x1f \u2028e\u2029 \u3000f" * 20,
    "punctuation": "...!?;: a.b,c!d -- (e) [f]; 'g.' " * 9,
    "end of text": "<|endoftext|> a<|endoftext|>b <|endoftext|>\n" * 5,
}

# Every kind of character that GPT-2's pattern or our cuts treat differently, in short runs.
RISKY = " \n\t\x85\xa0\x1c\u3000'stdmrevl1²½aßж清。，.,!?<|>\u0301👍\u200d_"
texts = st.one_of(st.text(alphabet=RISKY, max_size=200), st.text(max_size=200))

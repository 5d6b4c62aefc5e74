"""Text before it is compared: what counts as the same words, by language."""

from __future__ import annotations

import re
import unicodedata

CHARACTER_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "my", "km", "yue"})
_ALIASES = {"cmn": "zh"}
_TAGS = re.compile(r"<[^<>]{1,40}>|\[[^\[\]]{1,40}\]")
_TAGGED_TIME = re.compile(r"<t>[^<]{0,80}</t>")
_ARABIC_MARKS = re.compile("[\u064b-\u065f\u0670\u0640]")
_LETTERS = {
    "ar": str.maketrans("أإآٱىة", "اااايه"),
    "ru": str.maketrans("ё", "е"),
    "fa": str.maketrans("يك", "یک"),
}


def language_code(language: str) -> str:
    """ "en" for en, en-US, en_us, "zh" for FLEURS' cmn_hans_cn; language names are not known."""
    code = re.split(r"[-_]", language.lower())[0]
    return _ALIASES.get(code, code)


def normalise_text(text: str, language: str = "en") -> str:
    """Lower case without tags, punctuation and, in Arabic, vowel signs; single spaces.

    Compatibility forms are unified (NFKC), apostrophes inside words stay, ё counts as е and the
    forms of alef as one. Numbers are left as they are written: spell them alike in data.
    """
    code = language_code(language)
    text = _TAGS.sub(" ", _TAGGED_TIME.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    if code == "ar":
        text = _ARABIC_MARKS.sub("", text)
    text = text.translate(_LETTERS.get(code, {}))
    kept = (
        c if unicodedata.category(c)[0] in "LMN" or (c == "'" and _inside(text, i)) else " "
        for i, c in enumerate(text)
    )
    return " ".join("".join(kept).split())


def _inside(text: str, i: int) -> bool:
    return 0 < i < len(text) - 1 and text[i - 1].isalpha() and text[i + 1].isalpha()

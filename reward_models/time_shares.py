"""Places in a clip that are given relative to its length: halfway, two thirds in, 25 % through."""

from __future__ import annotations

import re
from collections.abc import Iterator

from reward_models.time_words import CLIP

_PARTS = {"quarter": 0.25, "third": 1 / 3}
_COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3}
_HALF = re.compile(
    rf"half-?\s?way\b(?: (?:through|into|in|point|mark))?|midway (?:through|into)|"
    rf"in the (?:exact )?middle of the {CLIP}|in der mitte der? {CLIP}|"
    rf"à mi-chemin|au milieu de l'{CLIP}|a la mitad|в середине {CLIP}|منتصف|中间|中間"
)
_PART = re.compile(r"(?P<part>quarter|third)s?(?: of the way)? (?:through|in(?:to)?)\b")
_COUNT = re.compile(r"\b(?P<count>a|one|two|three)[ -]$")
_PERCENT = re.compile(
    r"(?P<percent>\d{1,3}(?:\.\d)?)\s?(?:%|percent)(?: of the way)? (?:through|into)\b"
)


_HALF_STEMS = (
    "half", "midway", "middle", "mitte", "mi-chemin", "milieu", "mitad", "середине", "منتصف",
    "中间", "中間",
)  # fmt: skip


def _mentions(text: str, stems: tuple[str, ...]) -> bool:
    """A quick look before a slow pattern."""
    return any(stem in text for stem in stems)


def shares_of_clip(text: str) -> Iterator[tuple[float, re.Match[str]]]:
    """Places given as a share of the clip, 0 to 1."""
    for match in _HALF.finditer(text) if _mentions(text, _HALF_STEMS) else ():
        yield 0.5, match
    for match in _PART.finditer(text) if _mentions(text, tuple(_PARTS)) else ():
        if count := _COUNT.search(text[max(0, match.start() - 8) : match.start()]):
            yield _COUNTS[count["count"]] * _PARTS[match["part"]], match
    for match in _PERCENT.finditer(text) if _mentions(text, ("%", "percent")) else ():
        if text[match.start() - 1 : match.start()] != ".":
            yield float(match["percent"]) / 100, match

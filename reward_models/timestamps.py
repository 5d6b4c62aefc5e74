"""Times out of text: `parse_spans` reads what a model says about when.

Forms read here: `<t>a-b</t>` tags, bracketed ranges `[1.0 - 2.0]`, clocks `m:ss(.s)` and
`h:mm:ss`, and seconds with a unit (`from 3.5 to 4 seconds`, `at 12 s`). Nothing is repaired: a
reversed, negative or overlong span comes back with `valid=False` and the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class ParseStatus(StrEnum):
    """What the text as a whole says about time."""

    SPANS = "spans"
    NONE_STATED = "none_stated"
    UNPARSEABLE = "unparseable"
    EMPTY = "empty"


@dataclass(frozen=True)
class Span:
    """One time expression.

    Attributes:
        start_s, end_s: seconds; equal for a point in time.
        raw: the text it was read from; char_range: where, (start, end) in characters.
        dialect: "native", "clock" or "unit".
        valid: False when reversed or outside the clip; issue: why.
    """

    start_s: float
    end_s: float
    raw: str
    char_range: tuple[int, int]
    dialect: str
    valid: bool = True
    issue: str = ""


@dataclass(frozen=True)
class ParsedSpans:
    """Status and spans in order of appearance."""

    status: ParseStatus
    spans: tuple[Span, ...] = ()

    @property
    def valid_spans(self) -> tuple[tuple[float, float], ...]:
        return tuple((s.start_s, s.end_s) for s in self.spans if s.valid)


_NUMBER = r"\d{1,6}(?:\.\d{1,6})?"
_CLOCK = r"(?:\d{1,2}:)?\d{1,3}:[0-5]\d(?:[.,]\d{1,3})?"
_JOIN = r"-->|->|-|–|—|~|to\b|until\b|through\b"
_DASH = rf"\s{{0,3}}(?:{_JOIN})\s{{0,3}}"
_DASH_OR_AND = rf"\s{{0,3}}(?:{_JOIN}|and\b)\s{{0,3}}"
_UNIT = r"\s?(?:seconds?|secs?|s)\b"
_NUMBER_UNIT = rf"({_NUMBER})(?:{_UNIT})?"

_TAG = re.compile(rf"<t>\s{{0,3}}({_CLOCK}|{_NUMBER})(?:{_DASH}({_CLOCK}|{_NUMBER}))?\s{{0,3}}</t>")
_PATTERNS = (
    (re.compile(rf"(?<![\d:.])({_CLOCK}){_DASH_OR_AND}({_CLOCK})(?![\d:])"), "clock"),
    (re.compile(rf"(?<![\d:.])({_CLOCK})(?![\d:])(?!\s?(?:am|pm|a\.m|p\.m)\b)"), "clock"),
    (re.compile(rf"[\[(]\s{{0,3}}{_NUMBER_UNIT}{_DASH}{_NUMBER_UNIT}\s{{0,3}}[\])]"), "native"),
    (re.compile(rf"(?<![\d:.])({_NUMBER})(?:{_UNIT})?{_DASH_OR_AND}({_NUMBER}){_UNIT}"), "unit"),
    (re.compile(rf"\b(?:at|from|around|near)\s({_NUMBER}){_UNIT}", re.IGNORECASE), "unit"),
)  # fmt: skip
_NONE = re.compile(
    r"\b(?:none|never|no such|does not (?:occur|appear)|not (?:heard|present|audible|there)|"
    r"is absent|cannot be heard)\b",
    re.IGNORECASE,
)


def parse_spans(
    text: str, duration_s: float | None = None, *, form: str | None = None
) -> ParsedSpans:
    """Reads every time expression of `text`.

    Args:
        duration_s: length of the clip; spans that leave it come back invalid.
        form: "grounding" reads bare ranges `3.5 - 4.2` too; None needs tag, bracket or unit.

    Returns:
        Status "none_stated" when there is no time and the text says that the event is absent,
        "unparseable" when a tag was opened and nothing in it could be read, "empty" otherwise.

    Raises:
        ValueError: unknown form.
    """
    if form not in (None, "grounding"):
        raise ValueError(f"parse_spans: form {form!r}; None or 'grounding'")
    found = list(_tagged(text))
    if not found:
        found = list(_untagged(text, bare=form == "grounding"))
    spans = tuple(_checked(span, duration_s) for span in sorted(found, key=lambda s: s.char_range))
    if spans:
        return ParsedSpans(ParseStatus.SPANS, spans)
    if "<t>" in text:
        return ParsedSpans(ParseStatus.UNPARSEABLE)
    if _NONE.search(text):
        return ParsedSpans(ParseStatus.NONE_STATED)
    return ParsedSpans(ParseStatus.EMPTY)


def _tagged(text: str) -> Iterator[Span]:
    for match in _TAG.finditer(text):
        first, second = match.groups()
        yield _span(match, first, second or first, "clock" if ":" in match.group() else "native")


_BARE = (re.compile(rf"(?<![\d:.])({_NUMBER}){_DASH}({_NUMBER})(?![\d:])"), "native")


def _untagged(text: str, bare: bool) -> Iterator[Span]:
    taken: list[tuple[int, int]] = []
    for pattern, dialect in (*_PATTERNS, *((_BARE,) if bare else ())):
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(start < b and a < end for a, b in taken):
                continue
            taken.append((start, end))
            groups = match.groups()
            yield _span(match, groups[0], groups[-1], dialect)


def _span(match: re.Match[str], first: str, second: str, dialect: str) -> Span:
    return Span(_seconds(first), _seconds(second), match.group(), match.span(), dialect)


def _seconds(text: str) -> float:
    """Seconds of `12.5`, `m:ss(.s)` or `h:mm:ss(.s)`."""
    total = 0.0
    for part in text.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total


def _checked(span: Span, duration_s: float | None) -> Span:
    issue = ""
    if span.end_s < span.start_s:
        issue = "reversed"
    elif duration_s is not None and span.end_s > duration_s + 0.1:
        issue = f"beyond the clip's end at {duration_s:g} s"
    if not issue:
        return span
    return Span(span.start_s, span.end_s, span.raw, span.char_range, span.dialect, False, issue)

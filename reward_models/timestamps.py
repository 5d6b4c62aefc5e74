"""Times out of text: `parse_spans` reads what a model says about when.

    markup (tags, tokens, JSON) -> else running text -> dialect of the response -> validity

Markup wins: where a response declares times in tags, tokens or JSON, its prose is not searched.
Nothing is repaired: a reversed, negative or overlong span comes back with `valid=False` and the
reason, and a response in packed minutes says so in its dialect. Time grows linearly with the text.

    >>> parse_spans("A siren (<t>36-42</t>), then a bell at 1:05.", 90.0).valid_spans
    ((36.0, 42.0),)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from reward_models import time_markup as markup
from reward_models.spans_found import Found
from reward_models.time_expressions import blank, read_prose
from reward_models.time_words import QUOTED_SPEECH, normalise, states_none

FORMS = (None, "grounding", "rttm", "tsv")
PACKED = "packed"


class ParseStatus(StrEnum):
    """What the text as a whole says about time."""

    SPANS = "spans"
    NONE_STATED = "none_stated"
    UNPARSEABLE = "unparseable"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Span:
    """One time expression.

    Attributes:
        start_s, end_s: seconds; equal for a point in time.
        raw: the text it was read from; char_range: where, [start, end) in characters.
        dialect: "seconds", "packed" (minutes and seconds in one decimal number), "clock",
            "mm:ss:cc", "unit", "relative", "rttm" or "tsv".
        valid: False when reversed, outside the clip or not a clock; issue: why.
    """

    start_s: float
    end_s: float
    raw: str
    char_range: tuple[int, int]
    dialect: str
    valid: bool = True
    issue: str = ""


@dataclass(frozen=True, slots=True)
class ParsedSpans:
    """Status and spans in order of appearance."""

    status: ParseStatus
    spans: tuple[Span, ...] = ()

    @property
    def valid_spans(self) -> tuple[tuple[float, float], ...]:
        """(start_s, end_s) of the spans that can be true."""
        return tuple((s.start_s, s.end_s) for s in self.spans if s.valid)

    @property
    def packed(self) -> bool:
        """Whether the response is written in packed minutes."""
        return any(s.dialect == PACKED for s in self.spans)


def parse_spans(
    text: str, duration_s: float | None = None, *, form: str | None = None
) -> ParsedSpans:
    """Reads every time expression of `text`.

    Args:
        duration_s: length of the clip in seconds: decides dialects and validity, and is needed
            for places relative to the clip's end.
        form: what bare numbers mean. None: nothing, unless markup or brackets with decimals say
            so; "grounding": the text answers a question about when, so they are seconds; "rttm":
            onset and duration; "tsv": columns of start and end.

    Returns:
        `ParsedSpans`: status "spans" as soon as one span was read, valid or not; "unparseable"
        when times were attempted and none could be read; "none_stated" when the text says that
        there is no such event; "empty" when it says nothing about time.

    Raises:
        ValueError: unknown form, or a duration that is not positive.
    """
    if form not in FORMS:
        raise ValueError(f"parse_spans: form {form!r}; one of {FORMS}")
    if duration_s is not None and not duration_s > 0:
        raise ValueError(f"parse_spans: duration_s {duration_s!r}; seconds above 0, or None")
    return _parse(text, duration_s, form)


@lru_cache(maxsize=64)
def _parse(text: str, duration_s: float | None, form: str | None) -> ParsedSpans:
    """Several rewards read the same answer: the last few results are kept."""
    found, attempted = _read(normalise(text), duration_s, form)
    if found:
        spans = _in_one_dialect(found, duration_s)
        return ParsedSpans(
            ParseStatus.SPANS, tuple(_judged(text, span, duration_s) for span in spans)
        )
    if attempted:
        return ParsedSpans(ParseStatus.UNPARSEABLE)
    none = states_none(normalise(text))
    return ParsedSpans(ParseStatus.NONE_STATED if none else ParseStatus.EMPTY)


_NOT_FINITE = re.compile(r"\b(?:nan|inf|infinity)\b[^\n]{0,20}\b(?:s|secs?|seconds?)\b|\?\?:\?\?")


def _read(text: str, duration_s: float | None, form: str | None) -> tuple[list[Found], bool]:
    """Spans as written, in order, and whether times were attempted in vain."""
    if form in ("rttm", "tsv"):
        found = list(markup.rttm(text) if form == "rttm" else markup.tsv(text))
        return found, not found and bool(text.strip())
    tags = list(markup.tagged(text))
    found = [span for _, spans in tags for span in spans]
    attempted = bool(markup.OPENED.search(text))
    if not found:
        found = markup.time_tokens(text) or markup.json_keys(text) or markup.json_lists(text)
    if not found and tags:
        inside = [tag.span(2) for tag, _ in tags]
        found = [
            f
            for a, b in inside
            for f in _shifted(read_prose(text[a:b], duration_s, bare=True)[0], a)
        ]
    if not found:
        quoted = [m.span() for m in QUOTED_SPEECH.finditer(text)] if '"' in text else []
        found, failed = read_prose(blank(text, quoted), duration_s, bare=form == "grounding")
        attempted |= failed or bool(_NOT_FINITE.search(text))
    return sorted(found, key=lambda f: (f.start, f.end)), attempted


def _shifted(found: Sequence[Found], by: int) -> list[Found]:
    return [replace(f, start=f.start + by, end=f.end + by) for f in found]


def _in_one_dialect(found: list[Found], duration_s: float | None) -> list[Found]:
    """Decides, for the response as a whole, between the readings that its numbers allow."""
    if duration_s is None:
        return found
    if _is_packed(found, duration_s):
        return [_unpacked(f) if f.dialect == "seconds" else f for f in found]
    if _has_centiseconds(found, duration_s):
        return [_centiseconds(f) if f.dialect == "clock" else f for f in found]
    return found


MIN_PACKED_NUMBERS = 3


def _is_packed(found: Sequence[Found], duration_s: float) -> bool:
    """Packed minutes `M.SSd`: minutes before the point, then two digits of seconds, then decimals.

    The evidence, all of it: at least three different fractions of three digits, every fraction
    below .600 and written with two digits or more; read as packed minutes it fits into the clip and
    no span is reversed (read as plain seconds it then lies in the clip's first sixtieth or so).
    """
    plain = [f for f in found if f.dialect == "seconds"]
    written = [w for f in plain for w in f.written]
    fractions = {w.partition(".")[2] for w in written if float(w or 0) % 1}
    if sum(len(f) >= 3 for f in fractions) < MIN_PACKED_NUMBERS or len(plain) < len(found):
        return False
    if any(len(f) < 2 or f[:2] >= "60" for f in fractions):
        return False
    unpacked = [_unpacked(f) for f in plain]
    return max(f.end_s for f in unpacked) <= duration_s + 1.0 and all(
        f.start_s <= f.end_s for f in unpacked
    )


def unpack_minutes(written: str) -> float:
    """Seconds of a packed number: "1.044" is 1 min 04.4 s = 64.4 s; "0.0" is 0 s.

    Source: AF-Next's outputs; digits before the point are minutes, the next two seconds.
    """
    minutes, _, fraction = written.partition(".")
    digits = fraction.ljust(2, "0")
    return 60.0 * int(minutes) + float(f"{digits[:2]}.{digits[2:] or '0'}")


def _unpacked(found: Found) -> Found:
    first, second = (unpack_minutes(w) for w in found.written)
    return replace(found, start_s=first, end_s=second, dialect=PACKED)


def _has_centiseconds(found: Sequence[Found], duration_s: float) -> bool:
    """Clocks of three fields that leave the clip as h:mm:ss and fit it as mm:ss:cc."""
    clocks = [f for f in found if f.dialect == "clock"]
    three = [w for f in clocks for w in f.written]
    if not three or any(w.count(":") != 2 or "." in w or "," in w for w in three):
        return False
    fits = all(_centiseconds(f).end_s <= duration_s + 0.5 for f in clocks)
    return fits and any(f.end_s > duration_s + 0.5 for f in clocks)


def _centiseconds(found: Found) -> Found:
    def seconds(written: str) -> float:
        minutes, whole, hundredths = (int(part) for part in written.split(":"))
        return 60.0 * minutes + whole + hundredths / 100

    first, second = (seconds(w) for w in found.written)
    return replace(
        found, start_s=first, end_s=second, dialect="mm:ss:cc", resolution_s=0.01, issue=""
    )


def _judged(text: str, found: Found, duration_s: float | None) -> Span:
    """Half of what the way of writing can resolve is granted at the clip's end: 1:00 of 59.7 s."""
    issue = found.issue
    slack_s = max(0.05, min(0.5, 0.5 * found.resolution_s))
    if not issue and found.end_s < found.start_s:
        issue = "reversed"
    elif not issue and found.start_s < 0:
        issue = "before the clip's start"
    elif not issue and duration_s is not None and found.end_s > duration_s + slack_s:
        issue = f"beyond the clip's end at {duration_s:g} s"
    return Span(
        round(found.start_s, 6), round(found.end_s, 6), text[found.start : found.end],
        (found.start, found.end), found.dialect, not issue, issue,
    )  # fmt: skip


def repair_packed(text: str, duration_s: float) -> str:
    """`text` with packed minutes rewritten as plain seconds; other text comes back as it is.

        >>> repair_packed("<t>0.066-0.231</t> <t>0.574-1.034</t>", 151.0)
        '<t>6.6-23.1</t> <t>57.4-63.4</t>'

    Args:
        duration_s: length of the clip, which decides whether the text is packed at all.
    """
    parsed = parse_spans(text, duration_s)
    for span in reversed(parsed.spans):
        if span.dialect == PACKED:
            start, end = span.char_range
            raw = re.sub(
                r"\d+(?:\.\d+)?", lambda m: f"{unpack_minutes(m.group()):g}", text[start:end]
            )
            text = text[:start] + raw + text[end:]
    return text

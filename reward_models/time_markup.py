"""Times in markup: tags, special time tokens, JSON or dict keys, RTTM and TSV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from reward_models.spans_found import Found, clock_seconds, resolution_of
from reward_models.time_words import JOINER

NUMBER = r"\d{1,6}(?:\.\d{1,6})?"
CLOCK = r"\d{1,3}(?::\d{2}){1,2}(?:[.,]\d{1,3})?"
VALUE = rf"(?:{CLOCK}|{NUMBER})"
_UNIT = r"(?:\s?(?:seconds?|secs?|s)\b)?"
_RANGE = re.compile(
    rf"\s{{0,3}}({VALUE}){_UNIT}(?:\s{{0,3}}(?:{JOINER}|and|,)\s{{0,3}}({VALUE}){_UNIT})?\s{{0,3}}"
)
TAG = re.compile(r"<(t|time|timestep|timestamp|span|segment|moment)>([^<]{0,200})</\1>")
OPENED = re.compile(r"<(?:t|time|timestep|timestamp|span|segment|moment)>")


def tagged(text: str) -> Iterator[tuple[re.Match[str], list[Found]]]:
    """Every tag with the spans inside it; the list is empty when it cannot be read."""
    for tag in TAG.finditer(text):
        content, offset = tag.group(2), tag.start(2)
        found: list[Found] = []
        position = 0
        while match := _RANGE.match(content, position):
            first, second = match.group(1), match.group(2) or match.group(1)
            found.append(_found(first, second, tag.span() if not found else None, match, offset))
            position = match.end()
            if position == len(content):
                break
            if content[position] not in ",;":
                found = []
                break
            position += 1
        yield tag, found if position == len(content) else []


def _found(
    first: str, second: str, span: tuple[int, int] | None, match: re.Match[str], offset: int
) -> Found:
    where = span or (offset + match.start(), offset + match.end())
    clock = ":" in first or ":" in second
    return Found(
        value_seconds(first), value_seconds(second), *where,
        "clock" if clock else "seconds", resolution_of(second), (first, second),
        issue=_clock_issue(first) or _clock_issue(second),
    )  # fmt: skip


def value_seconds(text: str) -> float:
    return clock_seconds(text) if ":" in text else float(text)


def _clock_issue(text: str) -> str:
    fields = text.split(":")
    return "seconds field of 60 or more" if any(float(f[:2]) >= 60 for f in fields[1:]) else ""


_TOKEN = re.compile(
    rf"<\|\s?({VALUE})s?\s?\|>|<(\d{{1,6}}\.\d{{1,3}})s?>|((?:<a_\d>){{1,5}}<f_\d>)"
)
_JOINED = re.compile(rf"\s{{0,3}}(?:{JOINER})?\s{{0,3}}$")


def time_tokens(text: str) -> list[Found]:
    """`<|0.00|> text <|4.40|>`, `<0.0> - <5.2>`, digit tokens `<a_1><a_2><f_5>` (12.5 s).

    Tokens pair up in order: directly joined ones first, else the two around a text. One that is
    left over is a point.
    """
    if "<" not in text:
        return []
    tokens = [(match, *_token_value(match)) for match in _TOKEN.finditer(text)]
    found: list[Found] = []
    i = 0
    while i < len(tokens):
        match, written, value = tokens[i]
        joined = i + 1 < len(tokens) and _JOINED.match(text, match.end(), tokens[i + 1][0].start())
        after = i + 2 < len(tokens) and _JOINED.match(
            text, tokens[i + 1][0].end(), tokens[i + 2][0].start()
        ) if i + 1 < len(tokens) else False  # fmt: skip
        pairs = i + 1 < len(tokens) and (joined or bool(after) or (len(tokens) - i) % 2 == 0)
        last, second, end = tokens[i + 1] if pairs else tokens[i]
        found.append(
            Found(value, end, match.start(), last.end(), "seconds", resolution_of(second),
                  (written, second))
        )  # fmt: skip
        i += 2 if pairs else 1
    return found


def _token_value(match: re.Match[str]) -> tuple[str, float]:
    if match.group(3):
        digits = re.findall(r"\d", match.group(3))
        written = "".join(digits[:-1]) + "." + digits[-1]
        return written, float(written)
    written = match.group(1) or match.group(2)
    return written, value_seconds(written)


_KEY = re.compile(
    r"[\"'](?P<key>[^\"'\n:]{0,40}?(?P<role>start|begin|onset|from|end|offset|stop|finish|until|"
    r"duration|dur)(?:[ _]?(?:time|at))?(?P<unit>[ _](?:ms|milliseconds|s|sec|secs|seconds)|"
    rf"\s?\((?:s|sec|seconds)\))?)[\"']\s{{0,3}}:\s{{0,3}}[\"']?(?P<value>{VALUE})"
    r"\s?(?:s\b|sec\b|seconds\b)?[\"']?"
)
_ROLES = dict.fromkeys(("start", "begin", "onset", "from"), "start") | {
    "duration": "duration", "dur": "duration",
}  # fmt: skip


def json_keys(text: str) -> list[Found]:
    """Spans of JSON or dict keys that end in start / end, onset / offset, or start / duration."""
    found: list[Found] = []
    start: tuple[re.Match[str], float] | None = None
    end_first: tuple[re.Match[str], float] | None = None
    for match in _KEY.finditer(text):
        role = _ROLES.get(match["role"], "end")
        scale = 0.001 if (match["unit"] or "").strip(" _") in ("ms", "milliseconds") else 1.0
        value = scale * value_seconds(match["value"])
        if end_first is not None and "}" in text[end_first[0].end() : match.start()]:
            end_first = None
        if role == "start" and end_first is not None:
            found.append(_keyed((match, value), *end_first))
            end_first = None
        elif role == "start":
            if start is not None:
                found.append(_keyed(start, *start))
            start = (match, value)
        elif start is not None:
            end = start[1] + value if role == "duration" else value
            found.append(_keyed(start, match, end))
            start = None
        elif role == "end":
            end_first = (match, value)
    if start is not None:
        found.append(_keyed(start, *start))
    return found


def _keyed(start: tuple[re.Match[str], float], last: re.Match[str], end_s: float) -> Found:
    first = start[0]
    written = (first["value"], last["value"])
    clock = any(":" in w for w in written)
    dialect = "clock" if clock else "seconds"
    begins, ends = min(first.start(), last.start()), max(first.end(), last.end())
    return Found(start[1], end_s, begins, ends, dialect, resolution_of(last["value"]), written)


_LIST = re.compile(
    rf"[\"']\s{{0,3}}:\s{{0,3}}(?:\[\s{{0,3}})?\[\s{{0,3}}[\"']?(?P<first>{VALUE})[\"']?\s{{0,3}},"
    rf"\s{{0,3}}[\"']?(?P<second>{VALUE})[\"']?\s{{0,3}}\]"
)
_NEXT = re.compile(
    rf"\s{{0,3}},\s{{0,3}}\[\s{{0,3}}[\"']?(?P<first>{VALUE})[\"']?\s{{0,3}},\s{{0,3}}"
    rf"[\"']?(?P<second>{VALUE})[\"']?\s{{0,3}}\]"
)


def json_lists(text: str) -> list[Found]:
    """`"label": [[2.5, 27.5], [30, 31]]` and `"segment": [2.5, 27.5]`."""
    found = []
    for first in _LIST.finditer(text):
        match: re.Match[str] | None = first
        while match is not None:
            found.append(_listed(match))
            match = _NEXT.match(text, match.end())
    return found


def _listed(match: re.Match[str]) -> Found:
    first, second = match["first"], match["second"]
    clock = ":" in first + second
    return Found(
        value_seconds(first), value_seconds(second), match.start(), match.end(),
        "clock" if clock else "seconds", resolution_of(second), (first, second),
    )  # fmt: skip


def rttm(text: str) -> Sequence[Found]:
    """`SPEAKER file channel onset duration ...`, one span a line."""
    pattern = re.compile(
        rf"^speaker\s+\S{{1,200}}\s+\S{{1,20}}\s+({NUMBER})\s+({NUMBER})(?=\s|$)", re.MULTILINE
    )
    return [
        Found(float(m[1]), float(m[1]) + float(m[2]), m.start(), m.end(), "rttm",
              resolution_of(m[2]), (m[1], m[2]))
        for m in pattern.finditer(text)
    ]  # fmt: skip


def tsv(text: str) -> Sequence[Found]:
    """The first two neighbouring numeric columns of each tab-separated line are start and end."""
    pattern = re.compile(rf"^(?:[^\t\n]{{0,500}}\t){{0,3}}?({VALUE})\t({VALUE})(?=\t|\s*$)", re.M)
    return [
        Found(value_seconds(m[1]), value_seconds(m[2]), m.start(), m.end(), "tsv",
              resolution_of(m[2]), (m[1], m[2]))
        for m in pattern.finditer(text)
    ]  # fmt: skip

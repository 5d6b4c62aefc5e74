"""Times in running text: clocks, quantities with a unit, number words, relative places.

    text -> atoms (clock, quantity, "second 12", bare number) -> ranges -> place or length?

A quantity counts only as a place in the clip: words around it decide ("at", "mark", "in" against
"for", "lasts", "later"). What is not a time at all (scores, ratios, wall-clock times, dates) is
recognised by the words around it, too.
"""

from __future__ import annotations

import re
from dataclasses import replace

from reward_models import time_words as words
from reward_models.spans_found import Found, resolution_of
from reward_models.time_atoms import NUMBER, Atom, read_atoms
from reward_models.time_shares import shares_of_clip

_LIST_GOES_ON = re.compile(rf"\s{{0,2}}(?:[,;/]\s{{0,2}})?(?:(?:{words.AND})\s{{0,2}})?$")
_LIST_FOLLOWS = re.compile(r"\s?(?:,|and)\s?\d")
_NEGATIVE = re.compile(r"(?:^|[\s(\[>])-$")
_CUE_INDEX = re.compile(r"^\d{1,6}[ \t]{0,3}\n(?=[^\n]{1,16}-->)", re.MULTILINE)
_COMMA = re.compile(r"\s{0,2},\s{0,2}$")
_JOINER = re.compile(
    rf"\s{{0,3}}(?P<join>{words.JOINER}|{words.AND})\s{{0,3}}(?:{words.FILLER}\s{{0,2}}){{0,2}}$"
)
_END_CUE = re.compile(
    r"[\s\"')\]]{0,3}(?:,|;|\band\b|\bthen\b|\bund\b|\bet\b|\by\b|\bи\b)?[\s\"']{0,2}"
    r"(?:and |then |it )?\"?(?:end(?:s|ing|ed)?|stop(?:s|ping|ped)?|finish(?:es|ing|ed)?|offset|"
    r"fad(?:es|ing)|until|endet|finit|termina|заканчивается)(?:[ _]time)?\"?(?: out)?[\s:=]{0,3}"
    r"(?:at|around|by|um|à|en|в)?[\s\"]{0,2}$"
)
_START_CUE = re.compile(
    r"\b(?:start(?:s|ing|ed)?|begin(?:s|ning)?|began|onset|from|beginnt|commence|empieza|comienza|"
    r"начинается)(?:[ _]time)?(?: is)?[\s:=]{0,3}(?:at|around|um|bei|à|en|в|the)?[\s\"]{0,2}$"
)
_POINT_NUMBER = NUMBER.replace("[.,]", "[.]")
_BRACKETS = re.compile(
    rf"[\[(]\s{{0,3}}(?P<first>{_POINT_NUMBER})\s?(?P<unit>s|sec|seconds)?\s{{0,3}}"
    rf"(?:{words.JOINER}|,)\s{{0,3}}(?P<second>{_POINT_NUMBER})\s?(?:s|sec|seconds)?\s{{0,3}}[\])]"
)
_ONLY_NUMBER_BEFORE = re.compile(
    r"(?:<[a-z/]{1,12}>|[\s\[\](:=]|\b(?:answer|final|the|is|it|at|time|around|about|second|starts?|"
    r"begins?)\b){0,20}"
)
_ONLY_NUMBER_AFTER = re.compile(r"(?:<[a-z/]{1,12}>|[\s.\])]){0,20}")
_LINE_START = re.compile(
    r"^\s*(?:[-*•#>]{1,3}|\(?\d{1,3}[.)]|\(?[a-z][.)])?\s*[\"'\[({<*|]{0,3}\s*$"
)
_SEPARATED_BEFORE = re.compile(r"[\[({<|*\"=~:;>]\s{0,2}$")
_SEPARATED_AFTER = re.compile(r"^\s{0,2}(?:$|[\])}>|*\"':;,.!?-])")
_BEFORE_CHARS, _AFTER_CHARS = 42, 40


def read_prose(
    text: str, duration_s: float | None, *, bare: bool = False
) -> tuple[list[Found], bool]:
    """Spans of running text, and whether times were attempted that could not be read.

    Args:
        text: normalised by `time_words.normalise`.
        duration_s: clip length, for places relative to its end.
        bare: numbers without any unit are seconds too (a grounding task's answer).
    """
    text = _CUE_INDEX.sub(lambda m: "\x00" * (len(m.group()) - 1) + "\n", text)
    found, text = _bracketed(text, bare)
    atoms = read_atoms(text)
    attempted = False
    listed: Atom | None = None
    i = 0
    while i < len(atoms):
        first, second = atoms[i], atoms[i + 1] if i + 1 < len(atoms) else None
        if second is not None and _are_joined(text, first, second, bare):
            if pair := _as_range(text, first, second):
                found.append(pair)
            i += 2
            continue
        point = _to_the_end(text, first, duration_s) or _as_point(text, first, duration_s, bare)
        if point is None and _goes_on(text, listed, first):
            point = _found(first, first, "unit")
        listed = first if point is not None and first.kind == "quantity" else None
        if point is not None:
            found.append(point)
        attempted |= point is None and _relative(text, first) is not None
        i += 1
    for share, match in shares_of_clip(text):
        attempted = True
        if duration_s is not None:
            at_s = share * duration_s
            found.append(Found(at_s, at_s, *match.span(), "relative"))
    return found, attempted


def _to_the_end(text: str, atom: Atom, duration_s: float | None) -> Found | None:
    """`from 5 s to the end` and `from the beginning to 5 s`."""
    if atom.kind == "bare":
        return None
    if words.FROM_START.search(_before(text, atom.start)):
        return Found(0.0, atom.value, atom.start, atom.end, "relative", atom.resolution_s)
    if duration_s is not None and words.TO_END.match(_after(text, atom.end)):
        return Found(atom.value, duration_s, atom.start, atom.end, "relative", atom.resolution_s)
    return None


def _goes_on(text: str, last: Atom | None, atom: Atom) -> bool:
    """`at 5 s, 9 s and 15 s`: a quantity that follows a place in a list is one, too."""
    if last is None or atom.kind != "quantity" or atom.length:
        return False
    between = _LIST_GOES_ON.match(text, last.end, atom.start)
    return bool(between) and not words.LENGTH_AFTER.match(_after(text, atom.end))


def _bracketed(text: str, bare: bool) -> tuple[list[Found], str]:
    """`[11.0 - 14.0]`, `(3.2, 4.5)`: bare numbers with a decimal (`bare`: any); cut out."""
    found = []
    for match in _BRACKETS.finditer(text):
        first, second = match["first"], match["second"]
        if bare or match["unit"] or "." in first + second:
            found.append(
                Found(float(first), float(second), match.start(), match.end(), "seconds",
                      resolution_of(second), (first, second))
            )  # fmt: skip
    return found, blank(text, [(f.start, f.end) for f in found])


def blank(text: str, ranges: list[tuple[int, int]]) -> str:
    """`text` with every range replaced by a character that matches nothing."""
    parts, position = [], 0
    for start, end in sorted(ranges):
        parts += [text[position:start], "\x00" * (end - max(start, position))]
        position = max(position, end)
    return "".join([*parts, text[position:]])


def _before(text: str, position: int) -> str:
    start = max(0, position - _BEFORE_CHARS)
    line = text.rfind("\n", start, position)
    return text[max(start, line + 1) : position]


def _after(text: str, position: int) -> str:
    return text[position : position + _AFTER_CHARS].partition("\n")[0]


def _are_joined(text: str, first: Atom, second: Atom, bare: bool) -> bool:
    """Whether the two are the ends of one range: `12 to 15 s`, `starts at 3 s and ends at 5 s`."""
    kinds = {first.kind, second.kind}
    if second.start - first.end > 24 or ("clock" in kinds and kinds != {"clock"}):
        return False
    before, after = _before(text, first.start), _after(text, second.end)
    joiner = _JOINER.match(text, first.end, second.start)
    if joiner is None:
        comma = bare and kinds == {"bare"} and _COMMA.match(text, first.end, second.start)
        listed = comma and not _LIST_FOLLOWS.match(after)
        started = _START_CUE.search(before)
        return bool(listed or (started and _END_CUE.match(text, first.end, second.start)))
    if re.fullmatch(words.AND, joiner["join"]):
        around = words.BETWEEN.search(before) or re.match(r"\s?(?:之间|之間|の間)", after)
        if not around and not _START_CUE.search(before):
            return False
    return bare or kinds != {"bare"}


def _as_range(text: str, first: Atom, second: Atom) -> Found | None:
    """The span of two joined ends; None where it is no time, or a length of time."""
    kinds = {first.kind, second.kind}
    before, after = _before(text, first.start), _after(text, second.end)
    if kinds == {"clock"}:
        not_a_time = _is_not_a_time(before, after)
        return None if not_a_time else _found(first, second, "clock")
    if kinds == {"bare"} and (
        words.TRAP_UNIT_AFTER.match(after) or words.TRAP_BEFORE.search(before)
    ):
        return None
    if second.kind == "bare" and kinds != {"bare"} and re.match(r"\s?[a-z%°]", after):
        return None
    length = words.LENGTH_BEFORE.search(before) or words.LENGTH_AFTER.match(after)
    if (length or second.length) and not words.MARK_AFTER.match(after):
        return None
    found = _found(*_shared_unit(first, second), "seconds" if kinds == {"bare"} else "unit")
    return replace(found, issue="negative") if _NEGATIVE.search(before) else found


def _shared_unit(first: Atom, second: Atom) -> tuple[Atom, Atom]:
    """`2 to 3 minutes`: the bare side takes the unit of the other."""
    if first.kind == "bare" and second.kind in ("quantity", "ordinal", "named"):
        scale = words.UNIT_SECONDS[second.unit]
        first = first if scale == 1.0 else replace(first, value=first.value * scale)
    elif second.kind == "bare" and first.kind in ("quantity", "ordinal", "named"):
        second = replace(second, value=second.value * words.UNIT_SECONDS[first.unit])
    return first, second


def _found(first: Atom, second: Atom, dialect: str) -> Found:
    written = (first.written, second.written) if dialect in ("seconds", "clock") else ()
    return Found(
        first.value, second.value, first.start, second.end, dialect,
        max(first.resolution_s, second.resolution_s), written, first.issue or second.issue,
    )  # fmt: skip


def _is_not_a_time(before: str, after: str) -> bool:
    wall_clock = words.NOT_A_TIME_AFTER.match(after) or words.NOT_A_TIME_BEFORE.search(before)
    return bool(wall_clock) and not words.MARK_AFTER.match(after)


def _as_point(text: str, atom: Atom, duration_s: float | None, bare: bool) -> Found | None:
    before, after = _before(text, atom.start), _after(text, atom.end)
    if _NEGATIVE.search(before):
        return None  # a negative number; a bullet has a space after it
    if atom.kind == "clock":
        length = words.LENGTH_BEFORE.search(before) or words.CLOCK_LENGTH_AFTER.match(after)
        if length or _is_not_a_time(before, after):
            return None
        return _found(atom, atom, "clock")
    if atom.kind == "bare":
        whole = (
            bare and _ONLY_NUMBER_BEFORE.fullmatch(before) and _ONLY_NUMBER_AFTER.fullmatch(after)
        )
        placed = bare and re.search(r"\b(?:at|around|near|from|@)\s{0,2}$", before)
        trap = words.TRAP_UNIT_AFTER.match(after) or words.TRAP_BEFORE.search(before)
        trap = trap or words.NOT_A_TIME_AFTER.match(after)
        return _found(atom, atom, "seconds") if (whole or placed) and not trap else None
    if relative := _relative(text, atom):
        return _relative_to_clip(relative, atom, duration_s)
    return _found(atom, atom, "unit") if _is_place(before, after, atom) else None


def _is_place(before: str, after: str, atom: Atom) -> bool:
    if words.MARK_AFTER.match(after) or atom.kind == "ordinal":
        return True
    if atom.length or words.LENGTH_BEFORE.search(before) or words.LENGTH_AFTER.match(after):
        return False
    if words.PLACE_BEFORE.search(before) or words.PLACE_AFTER.match(after):
        return True
    starts_line = bool(_LINE_START.match(before))
    separated = starts_line or _SEPARATED_BEFORE.search(before)
    if separated and _SEPARATED_AFTER.match(after) and not atom.spelled:
        return True
    return starts_line and atom.written in ("s", "sec", "秒")


def _relative(text: str, atom: Atom) -> str | None:
    """ "first", "last" or "end" when the quantity counts from one of the clip's ends."""
    if atom.kind != "quantity":
        return None
    before, after = _before(text, atom.start), _after(text, atom.end)
    before += atom.counted
    if words.BEFORE_THE_END.search(before):
        return "end"
    if words.FIRST.search(before):
        return "first"
    if words.LAST.search(before):
        return "last"
    return "end" if words.BEFORE_END.match(after) else None


def _relative_to_clip(kind: str, atom: Atom, duration_s: float | None) -> Found | None:
    if kind == "first":
        return Found(0.0, atom.value, atom.start, atom.end, "relative", atom.resolution_s)
    if duration_s is None:
        return None
    start_s = duration_s - atom.value
    end_s = duration_s if kind == "last" else start_s
    return Found(start_s, end_s, atom.start, atom.end, "relative", atom.resolution_s)

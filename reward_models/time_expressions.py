"""Times in running text: clocks, quantities with a unit, number words, relative places.

    text -> atoms (clock, quantity, "second 12", bare number) -> ranges -> place or length?

A quantity counts only as a place in the clip: words around it decide ("at", "mark", "in" against
"for", "lasts", "later"). What is not a time at all (scores, ratios, wall-clock times, dates) is
recognised by the words around it, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from reward_models import time_words as words
from reward_models.spans_found import Found, clock_seconds, resolution_of
from reward_models.time_shares import shares_of_clip

_BEHIND = rf"(?<!\d[.,:])(?<![{words.LETTER}\d$€£¥#/_])"
_NUMBER = r"\d{1,6}(?:[.,]\d{1,6})?"
_ORDINAL = r"(?:st|nd|rd|th|er|e|ème|º|ª|-?(?:я|й|ю|ой|ую|ей|го|ых))"
_UNIT_AFTER = (
    rf"(?P<gap>[ -]?)(?:(?P<counted>{words.FIRST_WORDS}|{words.LAST_WORDS})\s)?"
    rf"(?:{words.UNIT})(?P<half> and a half\b)?(?!/)"
)
_DIGIT = re.compile(r"[\d〇零一二两兩三四五六七八九十百]")
_DIGIT_ATOM = re.compile(
    rf"{_BEHIND}(?P<clock>\d{{1,3}}+(?::\d{{2}}){{1,2}}+(?:[.,]\d{{1,3}}+)?)(?!\d|:\d)|"
    rf"{_BEHIND}(?P<feet>\d{{1,3}}'[0-5]\d(?:\"|'')?)(?!\d)|"
    rf"(?P<number>(?:{_BEHIND}|(?<=\d[mh])|(?<=\dmin))"
    rf"{_NUMBER}(?P<ordinal>{_ORDINAL}(?=[ -])|\.(?= sek| min))?|{words.HAN_NUMBER}){_UNIT_AFTER}|"
    rf"{_BEHIND}(?P<bare>{_NUMBER})(?:{_ORDINAL}(?![{words.LETTER}])|\.(?= (?:bis|und)))?(?![\d%])"
)
_WORD_BEFORE = re.compile(rf"(?<![{words.LETTER}])(?:{words.WORD_NUMBER})(?=[ -]?$)")
_WORD_ATOM = re.compile(rf"(?P<number>{words.WORD_NUMBER})(?P<ordinal>(?!)x)?{_UNIT_AFTER}")
_NAMED = re.compile(
    rf"(?<![{words.LETTER}])(?:{words.UNIT_BEFORE_NUMBER})\s(?:nr\.? |no\.? |# ?)?"
    rf"(?P<named>{_NUMBER})(?!\d|:|\s?%)"
)
_COMPOUND = re.compile(r"(?:\s{0,2}(?:and|und|et|y|e|и|و|,)?\s{0,2})$")
_LIST_GOES_ON = re.compile(rf"\s{{0,2}}(?:[,;/]\s{{0,2}})?(?:(?:{words.AND})\s{{0,2}})?$")
_COMMA = re.compile(r"\s{0,2},\s{0,2}$")
_JOINER = re.compile(
    rf"\s{{0,3}}(?P<join>{words.JOINER}|{words.AND})\s{{0,3}}(?:{words.FILLER}\s{{0,2}}){{0,2}}$"
)
_END_CUE = re.compile(
    r"[\s\"')\]]{0,3}(?:,|;|\band\b|\bthen\b|\bund\b|\bet\b|\by\b|\bи\b)?[\s\"']{0,2}"
    r"(?:and |then |it )?\"?(?:end(?:s|ing|ed)?|stop(?:s|ping|ped)?|finish(?:es|ing|ed)?|offset|"
    r"fad(?:es|ing)|until|endet|finit|termina|заканчивается)(?:[ _]time)?\"?(?: out)?[\s:=]{0,3}"
    r"(?:at|around|by|um|à|en|в)?\s{0,2}$"
)
_START_CUE = re.compile(
    r"\b(?:start(?:s|ing|ed)?|begin(?:s|ning)?|began|onset|from|beginnt|commence|empieza|comienza|"
    r"начинается)(?:[ _]time)?(?: is)?[\s:=]{0,3}(?:at|around|um|bei|à|en|в|the)?\s{0,2}$"
)
_BRACKETS = re.compile(
    rf"(?P<bracket>[\[(])\s{{0,3}}(?P<first>{_NUMBER.replace('[.,]', '[.]')})"
    rf"\s{{0,3}}(?:{words.JOINER}|,)\s{{0,3}}"
    rf"(?P<second>{_NUMBER.replace('[.,]', '[.]')})\s{{0,3}}[\])]"
)
_LINE_START = re.compile(
    r"^\s*(?:[-*•#>]{1,3}|\(?\d{1,3}[.)]|\(?[a-z][.)])?\s*[\"'\[({<*|]{0,3}\s*$"
)
_SEPARATED_BEFORE = re.compile(r"[\[({<|*\"=~:;>]\s{0,2}$")
_SEPARATED_AFTER = re.compile(r"^\s{0,2}(?:$|[\])}>|*\"':;,.!?-])")
_BEFORE_CHARS, _AFTER_CHARS = 56, 40


@dataclass(frozen=True, slots=True)
class _Atom:
    """kind: clock, quantity, named or bare; `unit`: of a quantity, "second" or larger."""

    kind: str
    value: float
    start: int
    end: int
    unit: str = ""
    resolution_s: float = 1.0
    length: bool = False  # "30-second", "10 second pause": an adjective
    counted: str = ""  # "5 dernières secondes": from which end of the clip
    issue: str = ""
    written: str = ""
    spelled: bool = False  # in words


def read_prose(
    text: str, duration_s: float | None, *, bare: bool = False
) -> tuple[list[Found], bool]:
    """Spans of running text, and whether times were attempted that could not be read.

    Args:
        text: normalised by `time_words.normalise`.
        duration_s: clip length, for places relative to its end.
        bare: numbers without any unit are seconds too (a grounding task's answer).
    """
    found, text = _bracketed(text, bare)
    atoms = _compounds(text, list(_atoms(text)))
    attempted = False
    listed: _Atom | None = None
    i = 0
    while i < len(atoms):
        first, second = atoms[i], atoms[i + 1] if i + 1 < len(atoms) else None
        if second is not None and _are_joined(text, first, second, bare):
            if pair := _as_range(text, first, second):
                found.append(pair)
            i += 2
            continue
        point = _as_point(text, first, duration_s, bare)
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


def _goes_on(text: str, last: _Atom | None, atom: _Atom) -> bool:
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
        if bare or "." in first + second:
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


def _atoms(text: str) -> list[_Atom]:
    """In order of appearance; of two that overlap, the one that begins first."""
    atoms: list[_Atom] = []
    for atom in sorted([*_digit_atoms(text), *_word_atoms(text)], key=lambda a: (a.start, -a.end)):
        if not atoms or atom.start >= atoms[-1].end:
            atoms.append(atom)
    return atoms


def _digit_atoms(text: str) -> Iterator[_Atom]:
    """Everything that begins with a digit. Tried at digits alone: most of a text is letters."""
    position = 0
    while digit := _DIGIT.search(text, position):
        match = _DIGIT_ATOM.match(text, digit.start())
        position = match.end() if match else digit.end()
        if match is None:
            continue
        if match["clock"]:
            yield _clock(match)
        elif match["feet"]:
            minutes, seconds = re.findall(r"\d+", match["feet"])
            yield _Atom("clock", 60.0 * int(minutes) + int(seconds), *match.span())
        elif match["number"]:
            yield from _quantity(text, match)
        else:
            written = match["bare"]
            yield _Atom("bare", words.number_value(written), *match.span(), "",
                        resolution_of(written), written=written.replace(",", "."))  # fmt: skip


def _word_atoms(text: str) -> Iterator[_Atom]:
    """Number words before a unit, and numbers after one; found by the stems of the units."""
    for stem in words.UNIT_STEMS:
        position = text.find(stem)
        while position >= 0:
            before = max(0, position - 32)
            number = _WORD_BEFORE.search(text[before:position])
            if number and (match := _WORD_ATOM.match(text, before + number.start())):
                yield from _quantity(text, match)
            if match := _NAMED.match(text, position - 2 * text.startswith("ال", position - 2)):
                unit = "minute" if match["minute_n"] else "second"
                value = words.UNIT_SECONDS[unit] * words.number_value(match["named"])
                resolution_s = resolution_of(match["named"])
                yield _Atom("named", value, *match.span(), unit, resolution_s)
            position = text.find(stem, position + len(stem))


def _clock(match: re.Match[str]) -> _Atom:
    written = match["clock"]
    fields = written.replace(",", ".").split(":")
    over = any(float(field) >= 60 for field in fields[1:])
    return _Atom(
        "clock", clock_seconds(written), *match.span(), resolution_s=resolution_of(written),
        issue="seconds field of 60 or more" if over else "", written=written,
    )  # fmt: skip


def _quantity(text: str, match: re.Match[str]) -> list[_Atom]:
    unit = next(name for name in words.UNIT_SECONDS if match[name])
    number, span = match["number"], match.span()
    if match["ordinal"]:
        number = number[: match.start("ordinal") - match.start()]
    value = words.number_value(number) + 0.5 * bool(match["half"])
    written_unit = match[unit]
    if number == "a" and unit == "second":
        return []  # "after a second bark"
    is_decade = written_unit == "s" and not match["gap"] and value % 10 == 0 and value >= 20
    before = text[max(0, span[0] - 12) : span[0]]
    if is_decade and (value >= 1000 or re.search(r"\b(?:the|early|late|mid|mid-)\s?$", before)):
        return []
    adjective = match["gap"] == "-" or (
        written_unit in ("second", "minute", "hour")
        and value > 1
        and not match["ordinal"]
        and not match["half"]
    )
    kind = "ordinal" if match["ordinal"] else "quantity"
    return [
        _Atom(kind, value, *span, unit, resolution_of(number), adjective, match["counted"] or "",
              written=written_unit, spelled=number in words.NUMBER_WORDS)
    ]  # fmt: skip


def _compounds(text: str, atoms: list[_Atom]) -> list[_Atom]:
    """Joins `1 minute` `5 seconds`; turns single units into seconds; drops lone `m` and `h`."""
    out: list[_Atom] = []
    for atom in atoms:
        last = out[-1] if out else None
        joins = (
            last is not None
            and atom.kind == last.kind == "quantity"
            and words.UNIT_SECONDS[last.unit] > words.UNIT_SECONDS[atom.unit]
            and _COMPOUND.match(text, last.end, atom.start)
        )
        if joins and last is not None:
            value = last.value * words.UNIT_SECONDS[last.unit] / words.UNIT_SECONDS[atom.unit]
            out[-1] = replace(atom, value=value + atom.value, start=last.start)
        else:
            out.append(atom)
    return [_in_seconds(a) for a in out if not (a.kind == "quantity" and _ambiguous(a))]


def _ambiguous(atom: _Atom) -> bool:
    """`5 m` may be metres, `10 h` a time of day: alone, neither is read."""
    return atom.written in ("m", "h", "ч", "с") and atom.unit in ("minute", "hour")


def _in_seconds(atom: _Atom) -> _Atom:
    if atom.kind not in ("quantity", "ordinal"):
        return atom
    scale = words.UNIT_SECONDS[atom.unit]
    return replace(atom, value=atom.value * scale, resolution_s=atom.resolution_s * scale)


def _before(text: str, position: int) -> str:
    start = max(0, position - _BEFORE_CHARS)
    line = text.rfind("\n", start, position)
    return text[max(start, line + 1) : position]


def _after(text: str, position: int) -> str:
    return text[position : position + _AFTER_CHARS].partition("\n")[0]


def _are_joined(text: str, first: _Atom, second: _Atom, bare: bool) -> bool:
    """Whether the two are the ends of one range: `12 to 15 s`, `starts at 3 s and ends at 5 s`."""
    kinds = {first.kind, second.kind}
    if second.start - first.end > 24 or ("clock" in kinds and kinds != {"clock"}):
        return False
    before, after = _before(text, first.start), _after(text, second.end)
    joiner = _JOINER.match(text, first.end, second.start)
    if joiner is None:
        listed = bare and kinds == {"bare"} and _COMMA.match(text, first.end, second.start)
        started = _START_CUE.search(before)
        return bool(listed or (started and _END_CUE.match(text, first.end, second.start)))
    if re.fullmatch(words.AND, joiner["join"]):
        around = words.BETWEEN.search(before) or re.match(r"\s?(?:之间|之間|の間)", after)
        if not around and not _START_CUE.search(before):
            return False
    return bare or kinds != {"bare"}


def _as_range(text: str, first: _Atom, second: _Atom) -> Found | None:
    """The span of two joined ends; None where it is no time, or a length of time."""
    kinds = {first.kind, second.kind}
    before, after = _before(text, first.start), _after(text, second.end)
    if kinds == {"clock"}:
        not_a_time = _is_not_a_time(before, after)
        return None if not_a_time else _found(first, second, "clock")
    trap = words.TRAP_UNIT_AFTER.match(after) or words.TRAP_BEFORE.search(before)
    if kinds == {"bare"} and trap:
        return None
    if second.kind == "bare" and kinds != {"bare"} and re.match(r"\s?[a-z%°]", after):
        return None
    length = words.LENGTH_BEFORE.search(before) or words.LENGTH_AFTER.match(after)
    if (length or second.length) and not words.MARK_AFTER.match(after):
        return None
    return _found(*_shared_unit(first, second), "seconds" if kinds == {"bare"} else "unit")


def _shared_unit(first: _Atom, second: _Atom) -> tuple[_Atom, _Atom]:
    """`2 to 3 minutes`: the bare side takes the unit of the other."""
    if first.kind == "bare" and second.kind in ("quantity", "ordinal", "named"):
        scale = words.UNIT_SECONDS[second.unit]
        first = replace(first, value=first.value * scale)
    elif second.kind == "bare" and first.kind in ("quantity", "ordinal", "named"):
        second = replace(second, value=second.value * words.UNIT_SECONDS[first.unit])
    return first, second


def _found(first: _Atom, second: _Atom, dialect: str) -> Found:
    written = (first.written, second.written) if dialect in ("seconds", "clock") else ()
    return Found(
        first.value, second.value, first.start, second.end, dialect,
        max(first.resolution_s, second.resolution_s), written, first.issue or second.issue,
    )  # fmt: skip


def _is_not_a_time(before: str, after: str) -> bool:
    wall_clock = words.NOT_A_TIME_AFTER.match(after) or words.NOT_A_TIME_BEFORE.search(before)
    return bool(wall_clock) and not words.MARK_AFTER.match(after)


def _as_point(text: str, atom: _Atom, duration_s: float | None, bare: bool) -> Found | None:
    before, after = _before(text, atom.start), _after(text, atom.end)
    if re.search(r"(?:^|\s)-$", before):
        return None  # a negative number; a bullet has a space after it
    if atom.kind == "clock":
        length = words.LENGTH_BEFORE.search(before) or words.CLOCK_LENGTH_AFTER.match(after)
        if length or _is_not_a_time(before, after):
            return None
        return _found(atom, atom, "clock")
    if atom.kind == "bare":
        whole = (
            bare and re.fullmatch(r"[\s<>a-z/:\[\](]*", before) and not after.strip(" <>/a-z.])")
        )
        placed = bare and re.search(r"\b(?:at|around|near|from|@)\s{0,2}$", before)
        trap = words.TRAP_UNIT_AFTER.match(after) or words.TRAP_BEFORE.search(before)
        return _found(atom, atom, "seconds") if (whole or placed) and not trap else None
    if relative := _relative(text, atom):
        return _relative_to_clip(relative, atom, duration_s)
    return _found(atom, atom, "unit") if _is_place(before, after, atom) else None


def _is_place(before: str, after: str, atom: _Atom) -> bool:
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


def _relative(text: str, atom: _Atom) -> str | None:
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


def _relative_to_clip(kind: str, atom: _Atom, duration_s: float | None) -> Found | None:
    if kind == "first":
        return Found(0.0, atom.value, atom.start, atom.end, "relative", atom.resolution_s)
    if duration_s is None:
        return None
    start_s = duration_s - atom.value
    end_s = duration_s if kind == "last" else start_s
    return Found(start_s, end_s, atom.start, atom.end, "relative", atom.resolution_s)

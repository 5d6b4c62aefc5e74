"""The atoms of times in text: clocks, quantities with a unit, `second 12`, bare numbers.

They are what is written; whether one is a time at all, a place or a length, is decided by the words
around it in `time_expressions`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from reward_models import time_words as words
from reward_models.spans_found import clock_seconds, resolution_of

_BEHIND = rf"(?<!\d[.,:])(?<![{words.LETTER}\d$€£¥#/_])"
NUMBER = r"\d{1,6}(?:[.,]\d{1,6})?"
_ORDINAL = r"(?:st|nd|rd|th|er|e|ème|º|ª|-?(?:я|й|ю|ой|ую|ей|го|ых))"
_UNIT_AFTER = (
    rf"(?P<gap>[ -]?)(?:(?P<counted>{words.FIRST_WORDS}|{words.LAST_WORDS})\s)?"
    rf"(?:{words.UNIT})(?P<half> and a half\b)?(?!/)"
)
_DIGIT = re.compile(r"[\d〇零一二两兩三四五六七八九十百]")
_OTHER_NUMBERS = r"\d{4}-\d\d(?:-\d\d)?(?!\d)|\d{3}-\d{4}(?!\d)|\d{1,2}/\d{1,2}(?:/\d{2,4})?(?!\d)"
_DIGIT_ATOM = re.compile(
    rf"{_BEHIND}(?P<other>{_OTHER_NUMBERS})|"
    rf"{_BEHIND}(?P<clock>\d{{1,3}}+(?::\d{{2}}){{1,2}}+(?:[.,]\d{{1,3}}+)?)(?!\d|:\d)|"
    rf"{_BEHIND}(?P<feet>\d{{1,3}}'[0-5]\d(?:\"|'')?)(?!\d)|"
    rf"(?P<number>(?:{_BEHIND}|(?<=\d[mh])|(?<=\dmin))"
    rf"{NUMBER}(?P<ordinal>{_ORDINAL}(?=[ -])|\.(?= sek| min))?|{words.HAN_NUMBER}){_UNIT_AFTER}|"
    rf"{_BEHIND}(?P<bare>{NUMBER})(?:{_ORDINAL}(?![{words.LETTER}])|\.(?= (?:bis|und)))?(?![\d%])"
)
_WORD_BEFORE = re.compile(rf"(?<![{words.LETTER}])(?:{words.WORD_NUMBER})(?=[ -]?$)")
_WORD_LEFT = re.compile(
    rf"(?<![{words.LETTER}])({words.WORD_NUMBER})(?=\s(?:to|and|until|through|bis|und|à|et|a|y)\s$)"
)
_WORD_ATOM = re.compile(rf"(?P<number>{words.WORD_NUMBER})(?P<ordinal>(?!)x)?{_UNIT_AFTER}")
_NAMED = re.compile(
    rf"(?<![{words.LETTER}])(?:{words.UNIT_BEFORE_NUMBER})\s(?:nr\.? |no\.? |# ?)?"
    rf"(?P<named>{NUMBER})(?!\d|:|\s?%)"
)
_COMPOUND = re.compile(r"(?:\s{0,2}(?:and|und|et|y|e|и|و|,)?\s{0,2})$")


@dataclass(frozen=True, slots=True)
class Atom:
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


def _in_order(text: str) -> list[Atom]:
    """In order of appearance; of two that overlap, the one that begins first."""
    atoms: list[Atom] = []
    for atom in sorted([*_digit_atoms(text), *_word_atoms(text)], key=lambda a: (a.start, -a.end)):
        if not atoms or atom.start >= atoms[-1].end:
            atoms.append(atom)
    return atoms


def _digit_atoms(text: str) -> Iterator[Atom]:
    """Everything that begins with a digit. Tried at digits alone: most of a text is letters."""
    position = 0
    while digit := _DIGIT.search(text, position):
        match = _DIGIT_ATOM.match(text, digit.start())
        position = match.end() if match else digit.end()
        if match is None:
            continue
        if match["other"]:
            continue  # a date or a telephone number
        if match["clock"]:
            yield _clock(match)
        elif match["feet"]:
            minutes, seconds = re.findall(r"\d+", match["feet"])
            yield Atom("clock", 60.0 * int(minutes) + int(seconds), *match.span())
        elif match["number"]:
            yield from _quantity(text, match)
        else:
            written = match["bare"]
            yield Atom("bare", words.number_value(written), *match.span(), "",
                        resolution_of(written), written=written.replace(",", "."))  # fmt: skip


def _word_atoms(text: str) -> Iterator[Atom]:
    """Number words before a unit, and numbers after one; found by the stems of the units."""
    for stem in words.UNIT_STEMS:
        position = text.find(stem)
        while position >= 0:
            before = max(0, position - 32)
            in_digits = text[max(0, position - 2) : position].rstrip(" -")[-1:].isdigit()
            number = None if in_digits else _WORD_BEFORE.search(text[before:position])
            if number and (match := _WORD_ATOM.match(text, before + number.start())):
                yield from _quantity(text, match)
                yield from _left_end(text, match.start())
            if match := _NAMED.match(text, position - 2 * text.startswith("ال", position - 2)):
                unit = "minute" if match["minute_n"] else "second"
                value = words.UNIT_SECONDS[unit] * words.number_value(match["named"])
                resolution_s = resolution_of(match["named"])
                yield Atom("named", value, *match.span(), unit, resolution_s)
            position = text.find(stem, position + len(stem))


def _left_end(text: str, position: int) -> Iterator[Atom]:
    """The number word of `from twelve to fifteen seconds`, which has no unit of its own."""
    start = max(0, position - 40)
    if match := _WORD_LEFT.search(text[start:position]):
        value = float(words.NUMBER_WORDS[match[1]])
        yield Atom("bare", value, start + match.start(1), start + match.end(1))


def _clock(match: re.Match[str]) -> Atom:
    written = match["clock"]
    fields = written.replace(",", ".").split(":")
    over = any(float(field) >= 60 for field in fields[1:])
    return Atom(
        "clock", clock_seconds(written), *match.span(), resolution_s=resolution_of(written),
        issue="seconds field of 60 or more" if over else "", written=written,
    )  # fmt: skip


def _quantity(text: str, match: re.Match[str]) -> list[Atom]:
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
        Atom(kind, value, *span, unit, resolution_of(number), adjective, match["counted"] or "",
              written=written_unit, spelled=number in words.NUMBER_WORDS)
    ]  # fmt: skip


def _compounds(text: str, atoms: list[Atom]) -> list[Atom]:
    """Joins `1 minute` `5 seconds`; turns single units into seconds; drops lone `m` and `h`."""
    out: list[Atom] = []
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


def _ambiguous(atom: Atom) -> bool:
    """`5 m` may be metres, `10 h` a time of day: alone, neither is read."""
    return atom.written in ("m", "h", "ч", "с") and atom.unit in ("minute", "hour")


def _in_seconds(atom: Atom) -> Atom:
    if atom.kind not in ("quantity", "ordinal"):
        return atom
    scale = words.UNIT_SECONDS[atom.unit]
    if scale == 1.0:
        return atom
    return replace(atom, value=atom.value * scale, resolution_s=atom.resolution_s * scale)


def read_atoms(text: str) -> list[Atom]:
    """Every atom of normalised text in order, in seconds."""
    return _compounds(text, _in_order(text))

"""What the readers of times hand to `timestamps`: a span as written, not yet judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    """A time expression.

    Attributes:
        start_s, end_s: seconds as written, before any dialect is decided; equal for a point.
        start, end: characters of the text, [start, end).
        dialect: "seconds", "clock", "unit", "relative", "rttm" or "tsv".
        resolution_s: the smallest step that the way of writing can express.
        written: the numbers as they stand in the text, () when they are not plain ones.
        issue: why it cannot be a time, else "".
    """

    start_s: float
    end_s: float
    start: int
    end: int
    dialect: str
    resolution_s: float = 1.0
    written: tuple[str, ...] = ()
    issue: str = ""


def clock_seconds(text: str) -> float:
    """Seconds of `m:ss(.f)` or `h:mm:ss(.f)`; a comma may stand for the point."""
    total = 0.0
    for part in text.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total


def resolution_of(written: str) -> float:
    """1 s for whole numbers, 0.1 s for one decimal, and so on."""
    _, point, fraction = written.replace(",", ".").partition(".")
    return 10.0 ** -len(fraction) if point else 1.0

"""What every data recipe shares: rows written as they come, resumed where they stopped.

    source folder --recipe--> rows, one at a time --> .rows.jsonl.partial --all there--> rows.jsonl

A recipe yields rows in an order that depends on its source alone, so an interrupted run counts the
lines that it wrote, passes over as many rows and goes on. What cannot become a row is a `Skipped`
with its reason: counted, listed beside the file, and an error where nothing else is left.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from posttrain.data.audio import audio_duration_s, load_audio, write_audio
from posttrain.data.rows import Event, Row, as_record

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is no row: what, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Written:
    """Rows in the file, and what was left out by reason."""

    rows: int
    skipped: Mapping[str, int]


def write_stream(out: Path, items: Iterable[Row | Skipped], asked: str = "") -> Written:
    """Writes rows as they come; a second call after an interruption goes on behind them.

    Args:
        asked: what the rows are made from; an interrupted file of something else is not continued.

    Raises:
        ValueError: not one row came (the reasons are quoted), or the interrupted file was asked
            for otherwise.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    note = out.with_name(f".{out.name}.asked")
    if partial.exists() and note.exists() and note.read_text() != asked:
        raise ValueError(f"{partial}: begun as {note.read_text()}, now {asked}; remove it first")
    note.write_text(asked)
    done = _whole_lines(partial)
    rows, reasons, skipped = 0, Counter[str](), []
    with partial.open("a", encoding="utf-8") as file:
        for item in tqdm(items, desc=out.name, unit=" rows", disable=None):
            if isinstance(item, Skipped):
                reasons[item.reason] += 1
                skipped.append(item)
                continue
            rows += 1
            if rows > done:
                file.write(json.dumps(as_record(item, out.parent), ensure_ascii=False) + "\n")
    if not rows:
        shown = "; ".join(f"{reason} ({n})" for reason, n in reasons.items()) or "nothing found"
        partial.unlink()
        note.unlink()
        raise ValueError(f"{out}: not one row: {shown}")
    listing = out.with_name(f"{out.stem}.skipped.jsonl")
    listing.unlink(missing_ok=True)
    if skipped:
        lines = (json.dumps(asdict(item), ensure_ascii=False) for item in skipped)
        listing.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(out)
    note.unlink()
    return Written(rows, dict(reasons))


def _whole_lines(partial: Path) -> int:
    """Lines that an interrupted run wrote; a torn last one is cut off."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        partial.write_bytes(whole)
    return whole.count(b"\n")


def find_audio(folder: Path, name: str) -> Path | None:
    """The clip of that name, with its own suffix or any of the usual ones."""
    for candidate in (folder / name, *(folder / f"{name}{s}" for s in AUDIO_SUFFIXES),
                      *((folder / name).with_suffix(s) for s in AUDIO_SUFFIXES)):  # fmt: skip
        if candidate.is_file():
            return candidate
    return None


def clip_of(folder: Path, name: str) -> tuple[str, float] | Skipped:
    """(path, seconds) of a clip, or why there is none."""
    path = find_audio(folder, name)
    if path is None:
        return Skipped(name, "audio not in the folder")
    try:
        return str(path.resolve()), audio_duration_s(path)
    except ValueError:
        return Skipped(name, "audio cannot be decoded")


def stored_clip(path: Path, content: bytes) -> tuple[str, float]:
    """Writes encoded audio (any format that soundfile reads) as 16 kHz FLAC; (path, seconds)."""
    if not path.exists():
        raw = path.with_suffix(".encoded")
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_bytes(content)
        try:
            write_audio(path, load_audio(raw))
        finally:
            raw.unlink()
    return str(path.resolve()), audio_duration_s(path)


def read_table(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[dict[str, str]]:
    """Records of a CSV or TSV with a header.

    Raises:
        FileNotFoundError: no such file. ValueError: a column is missing; names what is there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder that the source unpacks to")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if delimiter == ",":
            reader = csv.DictReader(lines)
        else:  # a quotation mark in a TSV is text
            reader = csv.DictReader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {missing[0]!r}; it has {reader.fieldnames}")
        yield from reader


def seconds(text: str, where: str) -> float:
    """A number of seconds.

    Raises:
        ValueError: names the place and the value.
    """
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no number of seconds; correct the file") from None


def within(events: Iterable[Event], duration_s: float, slack_s: float = 0.5) -> tuple[Event, ...]:
    """Events in order; ends a little behind the clip's are set to its end.

    Raises:
        ValueError: an event lies outside by more than `slack_s`, starts behind the end, or is
            reversed.
    """
    out = []
    for event in events:
        in_order = 0 <= event.start_s <= min(event.end_s, duration_s)
        if not in_order or event.end_s > duration_s + slack_s:
            raise ValueError(
                f"event {event.label!r} {event.start_s:g}-{event.end_s:g} s in {duration_s:g} s"
            )
        out.append(Event(event.start_s, min(event.end_s, duration_s), event.label))
    return tuple(sorted(out, key=lambda e: (e.start_s, e.end_s)))


def run(
    description: str, rows: Callable[[argparse.Namespace], Iterable[Row | Skipped]],
    argv: Sequence[str] | None, arguments: Callable[[argparse.ArgumentParser], None],
) -> None:  # fmt: skip
    """The command line of a recipe: `--source`, `--out` and its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    arguments(parser)
    args = parser.parse_args(argv)
    try:
        asked = json.dumps({key: str(value) for key, value in vars(args).items()})
        written = write_stream(args.out, rows(args), asked)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{written.rows} rows -> {args.out}")
    for reason, count in written.skipped.items():
        print(f"  {count} left out: {reason} (listed in {args.out.stem}.skipped.jsonl)")

"""TACOS: Freesound clips with free captions of what is heard when.

Fetch `annotations_strong.csv` and the audio from Zenodo (record 15379789; CC BY 4.0 for the text,
Freesound's licences for the clips).

    python -m data_recipes.tacos --source annotations_strong.csv --audio AUDIO_DIR --out rows.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from data_recipes.streams import Skipped, clip_of, read_table, run, seconds, within
from data_recipes.timed_questions import timed_rows
from posttrain.data.rows import Event, Row

LICENCE = "CC-BY-4.0 (captions); clips by Freesound's licences"
COLUMNS = ("filename", "text", "onset", "offset")


def rows(source: Path, audio_dir: Path) -> Iterator[Row | Skipped]:
    """Rows about every clip; its lines stand together in the file."""
    for name, lines in groupby(read_table(source, COLUMNS, ","), key=lambda r: r["filename"]):
        where = f"{source}: {name}"
        events = [
            Event(seconds(r["onset"], where), seconds(r["offset"], where), r["text"].strip())
            for r in lines
        ]
        clip = clip_of(audio_dir, name)
        if isinstance(clip, Skipped):
            yield clip
            continue
        try:
            inside = within(events, clip[1])
        except ValueError as error:
            yield Skipped(name, f"annotation outside the clip: {error}")
            continue
        yield from timed_rows(f"tacos/{name}", clip[0], clip[1], inside, "tacos", LICENCE)


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="annotations_strong.csv")
        parser.add_argument("--audio", type=Path, required=True, help="folder of the clips")

    run("TACOS -> rows", lambda args: rows(args.source, args.audio), argv, arguments)


if __name__ == "__main__":
    main()

"""AudioSet-Strong: 10 s clips of YouTube with every sound event's start and end.

Fetch the TSV files from AudioSet's page (CC BY 4.0) and the clips yourself, named by segment id
(YouTube id and start in milliseconds): `AUDIO_DIR/b0RFKhbpFJA_30000.wav`.

    python -m data_recipes.audioset_strong --source audioset_train_strong.tsv \
        --labels mid_to_display_name.tsv --audio AUDIO_DIR --out rows.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from data_recipes.streams import Skipped, clip_of, read_table, run, seconds, within
from data_recipes.timed_questions import timed_rows
from posttrain.data.rows import Event, Row

LICENCE = "CC-BY-4.0 (annotations); clips by their uploaders"
COLUMNS = ("segment_id", "start_time_seconds", "end_time_seconds", "label")


def read_labels(path: Path) -> dict[str, str]:
    """Machine id -> display name; the file has no header."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; fetch mid_to_display_name.tsv")
    pairs = (line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line)
    return {mid.strip(): name.strip().lower() for mid, name in pairs}


def rows(source: Path, labels: Mapping[str, str], audio_dir: Path) -> Iterator[Row | Skipped]:
    """Rows about every clip; lines of one segment stand together in the file."""
    records = read_table(source, COLUMNS, "\t")
    for segment, lines in groupby(records, key=lambda r: r["segment_id"]):
        events = []
        for line in lines:
            if line["label"] not in labels:
                raise ValueError(
                    f"{source}: label {line['label']!r} has no name; give the release's label file"
                )
            start_s, end_s = (seconds(line[name], f"{source}: {segment}") for name in COLUMNS[1:3])
            events.append(Event(start_s, end_s, labels[line["label"]]))
        clip = clip_of(audio_dir, segment)
        if isinstance(clip, Skipped):
            yield clip
            continue
        try:
            inside = within(events, clip[1])
        except ValueError as error:
            yield Skipped(segment, f"annotation outside the clip: {error}")
            continue
        yield from timed_rows(
            f"audioset-strong/{segment}", clip[0], clip[1], inside, "audioset_strong", LICENCE
        )


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="audioset_*_strong.tsv")
        parser.add_argument("--labels", type=Path, required=True, help="mid_to_display_name.tsv")
        parser.add_argument("--audio", type=Path, required=True, help="folder of the clips")

    run(
        "AudioSet-Strong -> rows",
        lambda args: rows(args.source, read_labels(args.labels), args.audio), argv, arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()

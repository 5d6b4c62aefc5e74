"""NVIDIA's conversations about audio: AF-Think, AF-Think-Time, LongAudio, AF-Skills, AF-Chat.

They hold text alone: fetch the JSON from the Hub (`nvidia/AF-Think`, `nvidia/LongAudio`, ...;
NVIDIA OneWay Noncommercial) and the audio from each source that its card names, below one folder.

    python -m data_recipes.af_think --source af_think.json --audio AUDIO_DIR --out rows.jsonl

Durations are read from the clips. Answers whose times are packed minutes are repaired, and counted
in each row's metadata (`repaired_packed`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_recipes.streams import Skipped, clip_of, run
from posttrain.data.rows import Row, parse_row
from reward_models.timestamps import repair_packed

LICENCE = "NVIDIA OneWay Noncommercial"


def rows(source: Path, audio_dir: Path, task: str = "chat") -> Iterator[Row | Skipped]:
    """One row a record; those with several clips or a missing one are left out with the reason."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; download it from the Hub first")
    text = source.read_text(encoding="utf-8")
    records: Any = (
        json.loads(text) if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.split("\n") if line.strip()]
    )  # fmt: skip
    for number, record in enumerate(records, start=1):
        yield _row(record, f"{source}:{number}", audio_dir, source.stem, task)


def _row(
    record: dict[str, Any], where: str, audio_dir: Path, name: str, task: str
) -> Row | Skipped:
    identity = str(record.get("id", where))
    sound = record.get("sound")
    if isinstance(sound, list):
        if len(sound) > 1:
            return Skipped(identity, "several clips in one conversation")
        sound = sound[0] if sound else None
    facts: dict[str, Any] = {"sound": None}
    if sound:
        clip = clip_of(audio_dir, sound)
        if isinstance(clip, Skipped):
            return Skipped(f"{identity}: {sound}", clip.reason)
        facts = {"sound": clip[0], "duration": clip[1], "task": record.get("task", task)}
    try:
        row = parse_row({**record, "id": identity, **facts}, where=where)
    except ValueError as error:
        return Skipped(identity, str(error).removeprefix(f"{where}: "))
    if not row.answer:
        return Skipped(identity, "no answer")
    answer = repair_packed(row.answer, row.duration_s) if row.duration_s else row.answer
    metadata = dict(row.metadata) | ({"repaired_packed": True} if answer != row.answer else {})
    return replace(row, answer=answer, source=name, licence=LICENCE, metadata=metadata)


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="JSON or JSONL of a release")
        parser.add_argument("--audio", type=Path, required=True, help="folder of the clips")

    run("NVIDIA's JSON -> rows", lambda args: rows(args.source, args.audio), argv, arguments)


if __name__ == "__main__":
    main()

"""Clotho-Moment and sets of its form (TUT2017-AMR, UnAV-100-subset, CASTELLA).

Fetch the JSONL and the audio from Zenodo (CC BY 4.0 for the text); one object a line with `qid`,
`query`, `duration`, `vid`, `relevant_windows`, and a clip `AUDIO_DIR/VID.wav`.

    python -m data_recipes.clotho_moment --source test.jsonl --audio AUDIO_DIR --out rows.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.streams import Skipped, clip_of, run, within
from data_recipes.timelines import spans_of
from posttrain.data.rows import Event, Row
from posttrain.types import Task

LICENCE = "CC-BY-4.0 (captions); clips by their sources"


def rows(source: Path, audio_dir: Path) -> Iterator[Row | Skipped]:
    """One `grounding` row a query."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; download it from Zenodo first")
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        for key in ("qid", "query", "vid", "relevant_windows"):
            if key not in record:
                raise ValueError(f"{source}:{number}: `{key}` is missing")
        query, name = str(record["query"]).strip(), str(record["qid"])
        clip = clip_of(audio_dir, str(record["vid"]))
        if isinstance(clip, Skipped):
            yield Skipped(f"{name}: {record['vid']}", clip.reason)
            continue
        try:
            spans = [Event(float(a), float(b), query) for a, b in record["relevant_windows"]]
            events = within(spans, clip[1])
        except ValueError as error:
            yield Skipped(name, f"window outside the clip: {error}")
            continue
        if not events:
            yield Skipped(name, "no window")
            continue
        question = {"role": "user", "content": f"When is the following heard: {query}?"}
        yield Row(
            f"clotho-moment/{name}", (question,), clip[0], clip[1], Task.GROUNDING, events, query,
            spans_of(query, events), source=source.stem, licence=LICENCE,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="JSONL of queries")
        parser.add_argument("--audio", type=Path, required=True, help="folder of the clips")

    run("Clotho-Moment -> rows", lambda args: rows(args.source, args.audio), argv, arguments)


if __name__ == "__main__":
    main()

"""Common Voice: read sentences, one folder a language (CC0).

Download a release from Mozilla (it needs an account) and give its language folder: `SPLIT.tsv` with
`path` and `sentence`, clips in `clips/`.

    python -m data_recipes.common_voice --source cv-corpus-22.0/fr --language fr --out rows.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.speech_tables import TRANSCRIBE, speech_row, tsv_records
from data_recipes.streams import Skipped, run
from posttrain.data.rows import Row
from posttrain.types import Task

LICENCE = "CC0-1.0"


def rows(source: Path, language: str, split: str, audio_dir: Path) -> Iterator[Row | Skipped]:
    """One `transcript` row a clip."""
    for record in tsv_records(source, split, ("path", "sentence"), "clips"):
        name = Path(record["path"]).stem
        yield speech_row(
            f"common-voice/{language}/{name}", record["audio"], record["sentence"],
            task=Task.TRANSCRIPT, prompt=TRANSCRIBE, language=language, source="common_voice",
            licence=LICENCE, split=split, audio_dir=audio_dir,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="a language's folder")
        parser.add_argument("--language", required=True)
        parser.add_argument("--split", default="train", help="train, dev, test, validated ...")

    run(
        "Common Voice -> rows",
        lambda a: rows(a.source, a.language, a.split, a.out.parent / "audio"), argv, arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()

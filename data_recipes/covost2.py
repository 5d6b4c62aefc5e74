"""CoVoST 2: Common Voice clips with translations, 21 languages into English, English into 15 (CC0).

Needs Common Voice 4 of the source language (`clips/`) and the release's table
`covost_v2.SOURCE_TARGET.tsv` in the same folder.

    python -m data_recipes.covost2 --source cv4/en --languages en ar --out rows.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.speech_tables import speech_row, translate_prompt, tsv_records
from data_recipes.streams import Skipped, run
from posttrain.data.rows import Row
from posttrain.types import Task

LICENCE = "CC0-1.0"
COLUMNS = ("path", "sentence", "translation", "split")


def rows(
    source: Path, languages: tuple[str, str], split: str, audio_dir: Path
) -> Iterator[Row | Skipped]:
    """One `translation` row a clip of the split."""
    pair = "_".join(languages)
    for record in tsv_records(source, f"covost_v2.{pair}", COLUMNS, "clips"):
        if record["split"] != split:
            continue
        yield speech_row(
            f"covost2/{pair}/{Path(record['path']).stem}", record["audio"], record["translation"],
            task=Task.TRANSLATION, prompt=translate_prompt(*languages),
            language=languages[1].split("-")[0], source="covost2", licence=LICENCE, split=split,
            audio_dir=audio_dir,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="folder of table and clips")
        parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
        parser.add_argument("--split", default="train", choices=("train", "dev", "test"))

    run(
        "CoVoST 2 -> rows",
        lambda a: rows(a.source, tuple(a.languages), a.split, a.out.parent / "audio"), argv,
        arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()

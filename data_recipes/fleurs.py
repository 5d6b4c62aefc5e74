"""FLEURS: 2,009 sentences read in 102 languages, parallel by id (CC BY 4.0).

    python -m data_recipes.fleurs --source google/fleurs --language ar_eg --out rows.jsonl
    python -m data_recipes.fleurs --source FOLDER --language en_us --translate-to ar_eg --out ...

`--translate-to` joins the speech with the other language's text of the same sentence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.speech_tables import TRANSCRIBE, hub_records, speech_row, translate_prompt
from data_recipes.streams import Skipped, run
from posttrain.data.rows import Row
from posttrain.types import Task

LICENCE = "CC-BY-4.0"


def rows(
    source: str, language: str, split: str, target: str | None, audio_dir: Path
) -> Iterator[Row | Skipped]:
    """`transcript` rows, or `translation` rows where a target language is given."""
    texts: dict[int, str] = {}
    if target is not None:
        texts = {int(r["id"]): r["raw_transcription"] for r in hub_records(source, target, split)}
    for number, record in enumerate(hub_records(source, language, split)):
        sentence = int(record["id"])
        identity = f"fleurs/{language}/{split}/{sentence}-{number}"
        if target is None:
            text, task, prompt = record["raw_transcription"], Task.TRANSCRIPT, TRANSCRIBE
        else:
            if sentence not in texts:
                yield Skipped(identity, f"no sentence of this id in {target}")
                continue
            text, task = texts[sentence], Task.TRANSLATION
            prompt = translate_prompt(language, target)
        yield speech_row(
            identity, record["audio"], text, task=task, prompt=prompt,
            language=(target or language).split("_")[0], source="fleurs", licence=LICENCE,
            split=split, audio_dir=audio_dir,
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", default="google/fleurs", help="Hub id or local folder")
        parser.add_argument("--language", required=True, help="such as ar_eg")
        parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
        parser.add_argument("--translate-to", default=None, help="such as ar_eg")

    run(
        "FLEURS -> rows",
        lambda a: rows(a.source, a.language, a.split, a.translate_to, a.out.parent / "audio"),
        argv, arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""LibriSpeech: read English books (CC BY 4.0), as OpenSLR 12 unpacks.

SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac and SPEAKER-CHAPTER.trans.txt

python -m data_recipes.librispeech --source LibriSpeech --split test-clean --out rows.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.speech_tables import TRANSCRIBE
from data_recipes.streams import Skipped, clip_of, run
from posttrain.data.rows import Row
from posttrain.types import Task

LICENCE = "CC-BY-4.0"


def rows(source: Path, split: str) -> Iterator[Row | Skipped]:
    """One `transcript` row an utterance, by speaker and chapter.

    Raises:
        FileNotFoundError: the split has no transcripts.
    """
    transcripts = sorted((source / split).glob("*/*/*.trans.txt"))
    if not transcripts:
        raise FileNotFoundError(f"{source / split}: no */*/*.trans.txt; unpack the split there")
    for path in transcripts:
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            identity = f"librispeech/{split}/{name}"
            clip = clip_of(path.parent, name)
            if isinstance(clip, Skipped):
                yield Skipped(identity, clip.reason)
            elif not text.strip():
                yield Skipped(identity, "empty text")
            else:
                yield Row(
                    identity, ({"role": "user", "content": TRANSCRIBE},), clip[0], clip[1],
                    Task.TRANSCRIPT, answer=text.strip(), source="librispeech", licence=LICENCE,
                    split="train" if split.startswith("train") else "test",
                )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="folder of the splits")
        parser.add_argument("--split", default="test-clean")

    run("LibriSpeech -> rows", lambda args: rows(args.source, args.split), argv, arguments)


if __name__ == "__main__":
    main()

"""Data of nano's new language: French words to write down, English ones not to forget.

    french.jsonl, french_test.jsonl     recorded French words in new orders, written down with times
    french_unheard.jsonl                the same of French words that no training composition holds
    english.jsonl, english_test.jsonl   the same in English: replayed, and watched
    times.jsonl, times_test.jsonl       when is it heard? in English: replayed, and watched
    refusals.jsonl                      spoken requests to decline, and their harmless twins

Words are letters and the numbers up to twelve, recordings of the same names in both languages,
one speaker each; compositions are held out, not clips. A transcript has the form that nano was
pretrained to answer in, a leading space and every word with its time; error rates leave the times
out.

    python -m data_recipes.new_language --out .cache/data/new_language
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data_recipes import refusals, timelines
from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.recorded_prompts import Recordings, load_recordings
from data_recipes.timelines import TimelineSpec
from posttrain.data.rows import Row, write_rows
from posttrain.types import Task

SPOKEN = TimelineSpec(
    duration_s=(4.0, 9.0), num_events=(2, 5), snr_db=(15.0, 40.0), tasks={"transcript": 1.0}
)
NUMBERS = tuple(f"digits/{number}" for number in range(13))
SPOKEN_NAMES = tuple(n for n in CLIP_NAMES if n in NUMBERS or n.startswith("letters/"))
TIMED = replace(SPOKEN, tasks={"grounding": 1.0})
# name: language, what is asked, split of the compositions, how many, seed
FILES: dict[str, tuple[str, TimelineSpec, str, int, int]] = {
    "french": ("fr", SPOKEN, "train", 1536, 21),
    "french_test": ("fr", SPOKEN, "test", 160, 22),
    "french_unheard": ("fr", SPOKEN, "unheard", 48, 23),
    "english": ("en", SPOKEN, "train", 512, 24),
    "english_test": ("en", SPOKEN, "test", 160, 25),
    "times": ("en", TIMED, "train", 512, 26),
    "times_test": ("en", TIMED, "test", 160, 27),
}


def prepare(out_dir: Path) -> dict[str, Path]:
    """Writes whatever is missing; returns the paths.

    Raises:
        FileNotFoundError: there are no French recordings: they cannot be synthesised.
    """
    paths = {name: out_dir / f"{name}.jsonl" for name in (*FILES, "refusals")}
    recordings: dict[str, Recordings] = {}
    for name, (language, spec, split, count, seed) in FILES.items():
        if paths[name].exists():
            continue
        if language not in recordings:
            recordings[language] = load_recordings(language)
        rows = _rows(recordings[language], spec, split, count, seed, out_dir / name)
        write_rows(paths[name], rows)
    if not paths["refusals"].exists():
        write_rows(paths["refusals"], refusals.rows(out_dir / "refusals"))
    return paths


def _rows(
    recordings: Recordings, spec: TimelineSpec, split: str, count: int, seed: int, out_dir: Path
) -> list[Row]:
    """Compositions of spoken words; tones have nothing to transcribe."""
    wanted = [c for c in recordings.clips if c.name in SPOKEN_NAMES and not c.is_tone]
    sounds = timelines.load_sounds([c for c in wanted if c.unheard == (split == "unheard")])
    indices = timelines.composition_indices(seed, split, count)
    rows = [
        timelines.make_row(
            sounds, spec, seed=seed, split=split, index=index, out_dir=out_dir,
            provenance=recordings.provenance, language=recordings.language,
        )
        for index in tqdm(indices, total=count, desc=out_dir.name, disable=None)
    ]  # fmt: skip
    return [
        replace(
            row, id=f"{recordings.language}/{row.id}",
            answer=f" {timelines.describe(row.events)}" if row.task is Task.TRANSCRIPT
            else f" {row.answer}",
        )
        for row in rows
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Data of nano's new language")
    parser.add_argument("--out", type=Path, default=Path(".cache/data/new_language"))
    for name, path in prepare(parser.parse_args(argv).out).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()

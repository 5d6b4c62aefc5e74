"""Data of nano's ladder: clips with several questions to imitate, others to think about, a test.

    sft.jsonl     one or two events asked for, several questions a clip    imitated
    think.jsonl   one or two events asked for                              a teacher thinks aloud
    grpo.jsonl    any number of events                                     rewarded
    test.jsonl    any number, clips held out                               every stage is scored

A curriculum: what is imitated is the easier kind of question, and rewards teach the rest. Clips are
of the quickstart's kind (`data_recipes.quickstart.SPEC`) from other random numbers. Answers begin
with a space, as nano's do.

    python -m data_recipes.ladder --out .cache/data/ladder
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from data_recipes import timelines
from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.quickstart import SPEC
from data_recipes.recorded_prompts import load_recordings
from posttrain.data.rows import Row, write_rows

COUNTS = {"sft": 256, "think": 1024, "grpo": 2048, "test": 3840}  # clips
SEEDS = {"sft": 11, "think": 12, "grpo": 13, "test": 14}
QUESTIONS_A_CLIP = 3
MOST_EVENTS = 2  # that a question of sft and think asks for


def prepare(out_dir: Path) -> dict[str, Path]:
    """Writes whatever of the four files is missing; returns their paths."""
    paths = {name: out_dir / f"{name}.jsonl" for name in COUNTS}
    missing = [name for name, path in paths.items() if not path.exists()]
    stamp = out_dir / "made_as.json"
    settings = json.dumps([asdict(SPEC), COUNTS, SEEDS, MOST_EVENTS])
    if len(missing) < len(paths) and (not stamp.exists() or stamp.read_text() != settings):
        raise SystemExit(f"error: {out_dir} was made with other settings; remove it")
    out_dir.mkdir(parents=True, exist_ok=True)
    stamp.write_text(settings)
    if not missing:
        return paths
    recordings = load_recordings("en")
    clips = [c for c in recordings.clips if c.name in CLIP_NAMES] or list(recordings.clips)
    sounds = timelines.load_sounds([c for c in clips if not c.unheard])
    for name in missing:
        split, seed = ("test" if name == "test" else "train"), SEEDS[name]
        indices = timelines.composition_indices(seed, split, COUNTS[name])
        rows: list[Row] = []
        for index in tqdm(indices, total=COUNTS[name], desc=f"{name} clips", disable=None):
            row = timelines.make_row(
                sounds, SPEC, seed=seed, split=split, index=index, out_dir=out_dir / name,
                provenance=recordings.provenance,
            )  # fmt: skip
            if name == "sft":
                rows += further_questions(row)
            elif name != "think" or len(row.target_spans) <= MOST_EVENTS:
                rows.append(replace(row, answer=f" {row.answer}"))
        write_rows(paths[name], rows)
    return paths


def further_questions(row: Row) -> list[Row]:
    """Rows about the same clip: when each of some labels is heard, with all of its times."""
    rng = random.Random(f"posttrain/ladder/{row.id}")
    heard = Counter(event.label for event in row.events)
    labels = sorted(label for label, times in heard.items() if times <= MOST_EVENTS)
    rows = []
    for label in rng.sample(labels, min(QUESTIONS_A_CLIP, len(labels))):
        question = timelines.when(label, row.events)
        prompt = ({"role": "user", "content": timelines.full_prompt(question)},)
        rows.append(
            replace(
                row,
                id=f"{row.id}/{label}",
                prompt=prompt,
                query=label,
                answer=f" {question.answer}",
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Data of nano's ladder")
    parser.add_argument("--out", type=Path, default=Path(".cache/data/ladder"))
    for name, path in prepare(parser.parse_args(argv).out).items():
        print(f"{name}: {path}")


if __name__ == "__main__":
    main()

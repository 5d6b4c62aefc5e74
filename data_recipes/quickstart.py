"""The data of `make quickstart`: timelines of recorded prompts, 6 to 15 s, noisy, overlapping.

Half of the sounds are heard before: a label asked for often has several times to be cited, and
nano, when it answers at once, tends to stop after the first.

Written once; a finished set is left alone, an interrupted one is written again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.recorded_prompts import load_recordings
from data_recipes.timelines import TimelineSpec, write_timelines

COUNTS = {"train": 640, "test": 240, "unheard": 48}
SEED = 1
UNLABELLED_ROWS, UNLABELLED_SEED = 640, 2
SPEC = TimelineSpec(
    duration_s=(6.0, 15.0), num_events=(3, 6), snr_db=(5.0, 40.0), gain_db=(-10.0, 0.0),
    overlap_probability=0.1, repeat_probability=0.5, tasks={"grounding": 1.0},
)  # fmt: skip


def prepare(out_dir: Path) -> dict[str, object]:
    """Writes `<out_dir>/timelines/{train,test,unheard}.jsonl`; returns counts and provenance."""
    done = out_dir / "timelines" / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    recordings = load_recordings("en")
    names = CLIP_NAMES if recordings.provenance == "recorded" else None
    write_timelines(
        recordings, SPEC, COUNTS, seed=SEED, out_dir=out_dir / "timelines", clip_names=names
    )
    facts: dict[str, object] = {"provenance": recordings.provenance, "rows": COUNTS}
    done.write_text(json.dumps(facts) + "\n")
    return facts


def prepare_unlabelled(out_dir: Path) -> Path:
    """Writes `<out_dir>/unlabelled/train.jsonl`: other clips of the same kind, with questions and
    nothing else. For training with the learned reward alone."""
    path = out_dir / "unlabelled" / "train.jsonl"
    if path.exists():
        return path
    recordings = load_recordings("en")
    names = CLIP_NAMES if recordings.provenance == "recorded" else None
    labelled = write_timelines(
        recordings, SPEC, {"train": UNLABELLED_ROWS}, seed=UNLABELLED_SEED,
        out_dir=path.parent / "composed", clip_names=names,
    )["train"]  # fmt: skip
    kept = [json.loads(line) for line in labelled.read_text().splitlines()]
    for record in kept:
        record["audio"] = f"composed/{record['audio']}"
        del record["events"], record["answer"]
    labelled.unlink()
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    partial.replace(path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description="Data of the quickstart")
    parser.add_argument("--out", type=Path, default=Path(".cache/data"))
    parser.add_argument("--unlabelled", action="store_true", help="write rows without labels too")
    args = parser.parse_args(argv)
    facts = prepare(args.out)
    print(f"data: {facts['rows']} timelines of {facts['provenance']} speech in {args.out}")

    if args.unlabelled:
        print(
            f"data: {UNLABELLED_ROWS} further rows without labels in {prepare_unlabelled(args.out)}"
        )


if __name__ == "__main__":
    main()

"""Preference pairs about times: every labelled row with an answer, beside the same answer spoilt.

    shifted    one span moved by more than its length        swapped   two labels trade their spans
    merged     two neighbouring spans made one               dropped   one of several left out
    packed     seconds written as packed minutes             invented  one more, where nothing is
    audio      the same answer for another clip

Dropped events weigh more: models tend to find one and stop (see docs/rewards.md). The chosen
answer has the row's labelled times, and opens as the row's own answer does.

    python -m data_recipes.timestamp_pairs --in rows.jsonl --out pairs.jsonl
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_recipes.timelines import format_span
from posttrain.data.pairs import Pair, write_pairs
from posttrain.data.rows import Row, read_rows
from posttrain.types import Task
from reward_models.spans import iou

Spans = list[tuple[float, float]]
DROPPED_WEIGHT = 2.0
TASKS = (Task.GROUNDING, Task.DENSE)
TRIES = 20


def shifted(rng: random.Random, spans: Spans, row: Row) -> Spans | None:
    """One span moved so far that it no longer overlaps itself."""
    place = rng.randrange(len(spans))
    start_s, end_s = spans[place]
    length_s, duration_s = end_s - start_s, row.duration_s or 0.0
    for _ in range(TRIES):
        moved_s = rng.uniform(0, duration_s - length_s)
        moved = (moved_s, moved_s + length_s)
        if iou([moved], [spans[place]]) == 0 and abs(moved_s - start_s) > max(0.3, length_s):
            return sorted([*spans[:place], moved, *spans[place + 1 :]])
    return None


def merged(rng: random.Random, spans: Spans, row: Row) -> Spans | None:
    """Two neighbours become one span that covers both, and the silence between."""
    if len(spans) < 2:
        return None
    place = rng.randrange(len(spans) - 1)
    one = (spans[place][0], max(spans[place][1], spans[place + 1][1]))
    if spans[place + 1][0] - spans[place][1] < 0.2:
        return None  # they touch: one span would be as right
    return [*spans[:place], one, *spans[place + 2 :]]


def dropped(rng: random.Random, spans: Spans, row: Row) -> Spans | None:
    """One of several is missing."""
    if len(spans) < 2:
        return None
    place = rng.randrange(len(spans))
    return [*spans[:place], *spans[place + 1 :]]


def invented(rng: random.Random, spans: Spans, row: Row) -> Spans | None:
    """One span more, of a usual length, that overlaps no event of the clip."""
    length_s = sum(end - start for start, end in spans) / len(spans)
    duration_s = row.duration_s or 0.0
    taken = [(e.start_s, e.end_s) for e in row.events]
    for _ in range(TRIES):
        start_s = rng.uniform(0, max(0.0, duration_s - length_s))
        made = (start_s, start_s + length_s)
        if all(made[1] <= start or made[0] >= end for start, end in taken):
            return sorted([*spans, made])
    return None


EDITS: dict[str, Callable[[random.Random, Spans, Row], Spans | None]] = {
    "shifted": shifted, "merged": merged, "dropped": dropped, "invented": invented,
}  # fmt: skip


def pack_minutes(seconds: float) -> str:
    """Seconds in AF-Next's undeclared second dialect: minutes, point, two digits of seconds, rest.

    >>> pack_minutes(63.4)
    '1.034'
    """
    minutes, rest = divmod(round(10 * seconds), 600)
    return f"{minutes}.{rest // 10:02d}{rest % 10}"


def pairs_of(
    row: Row, others: Sequence[Row], seed: int, dropped_weight: float = DROPPED_WEIGHT
) -> list[Pair]:
    """Every kind of pair that the row gives rise to."""
    rng = random.Random(f"posttrain/pairs/{seed}/{row.id}")
    labelled = [(e.label, e.start_s, e.end_s) for e in row.events
                if row.query is None or e.label == row.query]  # fmt: skip
    spans = [(start, end) for _, start, end in labelled]
    chosen = _written(row, labelled)
    pairs = []

    def add(kind: str, rejected: str, audio: str | None = None) -> None:
        if rejected != chosen or audio is not None:
            weight = dropped_weight if kind == "dropped" else 1.0
            better = replace(row, id=f"{row.id}/{kind}", answer=chosen)
            pairs.append(Pair(better, rejected, audio, kind, weight))

    if row.task is Task.DENSE:
        _dense_pairs(rng, row, labelled, add)
    else:
        label = row.query or ""
        for kind, edit in EDITS.items():
            if (edited := edit(rng, spans, row)) is not None:
                add(kind, _written(row, [(label, *span) for span in edited]))
        packed = " ".join(f"<t>{pack_minutes(a)}-{pack_minutes(b)}</t>" for a, b in spans)
        add("packed", f"{_opening(row)}{packed}")
    if (other := _other_clip(rng, row, others)) is not None:
        add("audio", chosen, audio=other.audio)
    return pairs


def _dense_pairs(
    rng: random.Random, row: Row, labelled: list[tuple[str, float, float]],
    add: Callable[..., None],
) -> None:  # fmt: skip
    """Lists: labels trade places, an event is dropped, one is shifted."""
    places = [(i, j) for i in range(len(labelled)) for j in range(i)
              if labelled[i][0] != labelled[j][0]]  # fmt: skip
    if places:
        i, j = rng.choice(places)
        swapped = list(labelled)
        swapped[i] = (labelled[j][0], *labelled[i][1:])
        swapped[j] = (labelled[i][0], *labelled[j][1:])
        add("swapped", _written(row, swapped))
    if len(labelled) > 1:
        place = rng.randrange(len(labelled))
        add("dropped", _written(row, labelled[:place] + labelled[place + 1 :]))
    place = rng.randrange(len(labelled))
    label, *span = labelled[place]
    if (moved := shifted(rng, [(span[0], span[1])], row)) is not None:
        add(
            "shifted",
            _written(row, [*labelled[:place], (label, *moved[0]), *labelled[place + 1 :]]),
        )


def _opening(row: Row) -> str:
    """What the row's own answer says before its first time: a thought, a label, white space."""
    before, found, _ = row.answer.rpartition("</think>")
    opening, tagged, _ = row.answer[len(before) + len(found) :].partition("<t>")
    return f"{before}{found}{opening}" if tagged else ""


def _written(row: Row, labelled: Sequence[tuple[str, float, float]]) -> str:
    """An answer in the row's manner: its opening before all spans, or each label in a list."""
    if row.task is Task.DENSE:
        space = row.answer[: len(row.answer) - len(row.answer.lstrip())]
        separator = "\n" if "\n" in row.answer.strip() else " "
        return space + separator.join(f"{name} {format_span(a, b)}" for name, a, b in labelled)
    return _opening(row) + " ".join(format_span(a, b) for _, a, b in labelled)


def _other_clip(rng: random.Random, row: Row, others: Sequence[Row]) -> Row | None:
    """A clip for which the answer is wrong: the label is not at these times there."""
    for _ in range(TRIES):
        other = rng.choice(others)
        same = [(e.start_s, e.end_s) for e in other.events if e.label == row.query]
        if other.audio != row.audio and iou(list(row.target_spans), same) < 0.1:
            return other
    return None


def make_pairs(
    rows: Sequence[Row], seed: int = 0, dropped_weight: float = DROPPED_WEIGHT
) -> list[Pair]:
    """Pairs of every labelled row about times; other rows are passed over."""
    usable = [row for row in rows if row.task in TASKS and row.target_spans and row.audio]
    return [pair for row in usable for pair in pairs_of(row, usable, seed, dropped_weight)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Labelled rows -> preference pairs about times")
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="PAIRS.jsonl")
    parser.add_argument("--rows", type=int, metavar="N", help="of the first N rows alone")
    parser.add_argument(
        "--dropped-weight", type=float, default=DROPPED_WEIGHT, metavar="W",
        help="of pairs that leave an event out; others weigh 1 (default: 2)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.dropped_weight <= 0:
        parser.error(f"--dropped-weight {args.dropped_weight:g}: a number above 0 is needed")
    pairs = make_pairs(read_rows(args.source)[: args.rows], args.seed, args.dropped_weight)
    if not pairs:
        raise SystemExit(f"error: {args.source}: no labelled rows about times")
    write_pairs(args.out, pairs)
    counts = Counter(pair.kind for pair in pairs)
    print(f"{len(pairs)} pairs -> {args.out}  ({', '.join(f'{k} {n}' for k, n in counts.items())})")


if __name__ == "__main__":
    main()

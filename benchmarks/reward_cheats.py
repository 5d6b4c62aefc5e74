"""What cheating earns: policies that never hear the clip, against honest ones, in one run.

    python -m benchmarks.reward_cheats --json

Sets of held-out rows: the quickstart's timelines (with questions of every task made from their
events, and those that ask when by themselves), and a simulated moment-retrieval set with the
span statistics of Clotho-Moment's test set
(60 s clips, one span of 8 to 31 s anywhere: the constant [10, 44] gets a mean IoU of 0.41 and
[0, 60] gets 0.33, as published). The blind prior is fitted on the training rows of each set. A
cheat's figure is its mean reward on the set where it earns more.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from data_recipes.quickstart import prepare
from data_recipes.timelines import QUESTIONS, ask
from posttrain.data.rows import Event, Row, read_rows
from posttrain.types import Completion, Task
from reward_models.grounding import TimestampGrounding
from reward_models.spans import SpanS, iou

NUM_SIMULATED = 2_000
Policy = Callable[[Row, random.Random], str]


def timeline_rows(data: Path, split: str) -> list[Row]:
    """The quickstart's rows, and one question of another task for each of their clips."""
    prepare(data)
    rows = read_rows(data / "timelines" / f"{split}.jsonl")
    labels = sorted({e.label for row in rows for e in row.events})
    rng = random.Random(f"cheats/{split}")
    others = {name: 1.0 for name in QUESTIONS if name != "grounding"}
    out = []
    for row in rows:
        question = ask(rng, row.events, labels, others)
        prompt = ({"role": "user", "content": question.text},)
        out += [
            row,
            replace(row, id=f"{row.id}/{question.task.value}", prompt=prompt, task=question.task,
                    query=question.query, answer=question.answer),
        ]  # fmt: skip
    return out


def simulated_moments(split: str) -> list[Row]:
    """Simulated rows with Clotho-Moment's span statistics; no audio."""
    rng = random.Random(f"cheats/moments/{split}")
    rows = []
    for i in range(NUM_SIMULATED):
        length_s = rng.uniform(8, 31)
        start_s = rng.uniform(0, 60 - length_s)
        events = (Event(start_s, start_s + length_s, "a bell"),)
        prompt = ({"role": "user", "content": "When is a bell heard?"},)
        rows.append(Row(f"{split}/{i}", prompt, "-", 60.0, Task.GROUNDING, events, "a bell"))
    return rows


def tag(spans: Sequence[SpanS]) -> str:
    return " ".join(f"<t>{s:.2f}-{e:.2f}</t>" for s, e in spans)


def wrong_span(row: Row, rng: random.Random) -> SpanS:
    """A span of the usual length somewhere; it may overlap the right one by chance."""
    duration_s = row.duration_s or 1.0
    targets = row.target_spans or ((0.0, 0.1 * duration_s),)
    length_s = sum(e - s for s, e in targets) / len(targets)
    start_s = rng.uniform(0, max(0.0, duration_s - length_s))
    return start_s, min(duration_s, start_s + length_s)


def stamps(row: Row, rng: random.Random, count: int) -> str:
    """A thought that names the row's events at times without any relation to them."""
    labels = [e.label for e in row.events] or ["something"]
    return " ".join(
        f"I hear {rng.choice(labels)} {tag([wrong_span(row, rng)])}." for _ in range(count)
    )


def packed(spans: Sequence[SpanS]) -> str:
    def write(seconds: float) -> str:
        minutes, rest = divmod(round(seconds, 1), 60)
        return f"{int(minutes)}.{rest:04.1f}".replace(".", "", 1).replace(".", "", 1)

    def number(seconds: float) -> str:
        digits = write(seconds)
        return f"{digits[:-3]}.{digits[-3:]}"

    return " ".join(f"<t>{number(s)}-{number(e)}</t>" for s, e in spans)


def cheats(guess: Sequence[SpanS], unit: str) -> dict[str, Policy]:
    """Name -> what the policy answers. `guess`: the best constant spans on the training rows."""

    def scaled(row: Row, spans: Sequence[SpanS], by: str = "share") -> list[SpanS]:
        scale = (row.duration_s or 1.0) if by == "share" else 1.0
        return [(scale * s, scale * e) for s, e in spans]

    tenths = [(i / 10, (i + 1) / 10) for i in range(10)]
    return {
        "blind_best_span": lambda row, rng: tag(scaled(row, guess, unit)),
        "whole_clip": lambda row, rng: tag(scaled(row, [(0, 1)])),
        "centre": lambda row, rng: tag(scaled(row, [(0.25, 0.75)])),
        "spray_of_10": lambda row, rng: tag(scaled(row, tenths)),
        "repeat_wrong_span": lambda row, rng: tag([wrong_span(row, rng)] * 10),
        "copy_from_question": lambda row, rng: tag(QUESTION_SPANS),
        "fixed_grid": lambda row, rng: tag([(5 * i, 5 * i + 5) for i in range(12)]),
        "packed_minutes": lambda row, rng: packed(row.target_spans or [(60.0, 62.0)]),
        "stamps_without_relation": lambda row, rng: (
            f"<think>{stamps(row, rng, 8)}</think> {tag([wrong_span(row, rng)])}"
        ),
        "long_thought": lambda row, rng: (
            f"<think>{stamps(row, rng, 8)} {'I listen closely again. ' * 150}</think> "
            f"{tag([wrong_span(row, rng)])}"
        ),
        "always_none": lambda row, rng: "It is not heard.",
    }


QUESTION_SPANS = [(1.0, 2.0), (3.0, 4.5)]


def with_question_spans(row: Row) -> Row:
    """The row with times in its question, for the policy that copies them."""
    text = f"Something is said at {tag(QUESTION_SPANS)}. {row.prompt[-1]['content']}"
    return replace(row, prompt=({"role": "user", "content": text},))


def oracle(row: Row, shift: float = 0.0, share: float = 1.0) -> str:
    """The right answer; `shift`: spans moved by so much of their length; `share`: of the spans."""
    if row.task in (Task.ABSENT, Task.COUNT, Task.ORDER):
        return row.answer
    events = [e for e in row.events if row.query is None or e.label == row.query]
    events = events[: max(1, round(share * len(events)))]
    parts = []
    for event in events:
        by_s = shift * (event.end_s - event.start_s)
        by_s = -by_s if event.end_s + by_s > (row.duration_s or 0) else by_s
        parts.append(f"{event.label} {tag([(event.start_s + by_s, event.end_s + by_s)])}")
    return ", ".join(parts)


def mean_reward(
    reward: TimestampGrounding, rows: Sequence[Row], policy: Callable[[Row], str]
) -> float:
    values = []
    for row in rows:
        result = reward(row, Completion((), (), policy(row), "stop", 0))
        if result.value is not None:
            values.append(result.value)
    return sum(values) / len(values)


def measure(train: Sequence[Row], test: Sequence[Row]) -> dict[str, object]:
    """Every policy on one set."""
    blind = TimestampGrounding()
    prior = blind.fit(train)
    reward = replace(blind, prior=prior)
    rng = random.Random(0)
    spans = list(prior.guess["spans"])  # type: ignore[call-overload]
    earned = {}
    for name, policy in cheats(spans, str(prior.guess["unit"])).items():
        rows = [with_question_spans(r) for r in test] if name == "copy_from_question" else test
        earned[name] = mean_reward(reward, rows, lambda row, policy=policy: policy(row, rng))
    when = [row for row in test if row.target_spans and row.task in (Task.GROUNDING, Task.DENSE)]
    several = [row for row in when if len(row.target_spans) >= 2]
    complete = mean_reward(reward, several, oracle) if several else None
    half = mean_reward(reward, several, lambda r: oracle(r, share=0.5)) if several else None
    return {
        "rows": len(test), "prior": prior.grounding, "cheats": earned,
        "oracle": mean_reward(reward, test, oracle),
        "oracle_repeated": mean_reward(reward, when, lambda r: f"{oracle(r)}, {oracle(r)}"),
        "oracle_said_once": mean_reward(reward, when, oracle),
        "oracle_shift_10pct": mean_reward(reward, when, lambda r: oracle(r, shift=0.1)),
        "half_complete": half, "complete": complete,
    }  # fmt: skip


def constant_iou(rows: Sequence[Row], span: SpanS) -> float:
    return sum(iou([span], row.target_spans) for row in rows) / len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object alone")
    parser.add_argument("--data", type=Path, default=Path(".cache/data"))
    args = parser.parse_args(argv)
    moments = simulated_moments("train"), simulated_moments("test")
    train, test = timeline_rows(args.data, "train"), timeline_rows(args.data, "test")
    sets = {
        "timelines": measure(train, test),
        "timelines_grounding": measure(
            *([row for row in rows if row.task is Task.GROUNDING] for rows in (train, test))
        ),
        "simulated_moments": measure(*moments),
    }
    names = list(sets["timelines"]["cheats"])  # type: ignore[call-overload]
    lowest = {
        key: min(s[key] for s in sets.values())  # type: ignore[type-var]
        for key in ("oracle", "oracle_shift_10pct")
    }
    report = {
        "cheats": {n: max(s["cheats"][n] for s in sets.values()) for n in names},  # type: ignore[index]
        **lowest,
        "half_complete": sets["timelines"]["half_complete"],
        "complete": sets["timelines"]["complete"],
        "constant_10_44_iou": constant_iou(moments[1], (10, 44)),
        "whole_clip_iou": constant_iou(moments[1], (0, 60)),
        "by_set": sets,
    }
    print(json.dumps(report, indent=None if args.json else 1))


if __name__ == "__main__":
    main()

"""`posttrain score`: scores any model's outputs, row by row, at constant memory.

    rows.jsonl --line--> Row + Completion --rewards--> scored.jsonl, and a summary with intervals

A row is `{"id", "completion", "duration_s", "question", "events": [{"start_s", "end_s", "label"}],
"answer", "task"}`; `query`, `choices`, `language`, `audio` and `finish_reason` are read too. What a
reward has no use for may be missing. Every line gets `"rewards": {name: {"reward", "status",
"breakdown"}}`. A bad line is reported with its number and left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from posttrain.data.rows import TIMED_TASKS, Row, parse_events
from posttrain.types import Completion, Reward, RewardStatus, Task
from reward_models.grounding import TimestampGrounding
from reward_models.metrics import MetricSummary, grounding_metrics
from reward_models.registry import call_safely

FLUSH_LINES = 1_000


@dataclass(frozen=True)
class ScoredFile:
    """What came of a file.

    Attributes:
        num_rows: lines scored.
        bad_rows: (line number, what is wrong).
        summary: metric -> n, mean, ci95.
        not_scored: reward -> status -> rows.
    """

    num_rows: int
    bad_rows: tuple[tuple[int, str], ...]
    summary: Mapping[str, Mapping[str, Any]]
    not_scored: Mapping[str, Mapping[str, int]]


def score_file(
    rewards: Sequence[Reward], grounding: TimestampGrounding, source: Path, out: Path, *,
    on_row: Callable[[], object] = lambda: None,
    on_bad: Callable[[int, str], object] = lambda number, reason: None,
) -> ScoredFile:  # fmt: skip
    """Scores every line of `source` and writes `out` atomically.

    Args:
        grounding: gives the summary its `blind_adjusted`, whichever rewards are asked for.
        on_row: called after each line, for a progress bar.
        on_bad: called with each bad line's number and reason.

    Raises:
        FileNotFoundError: no such file.
    """
    if not source.is_file():
        raise FileNotFoundError(f"--in {source}: no such file")
    collected = MetricSummary()
    not_scored: dict[str, dict[str, int]] = {}
    bad: list[tuple[int, str]] = []
    num_rows = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        with source.open("rb") as lines, partial.open("wb") as written:
            for number, line in _numbered(lines):
                try:
                    record = parse_line(line)
                    row, completion = read_row(record)
                except (ValueError, TypeError) as error:
                    bad.append((number, str(error)))
                    on_bad(number, str(error))
                    continue
                record["rewards"] = score_row(rewards, row, completion, collected, not_scored)
                if row.task in TIMED_TASKS:
                    collected.add({"blind_adjusted": grounding(row, completion).value})
                written.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                num_rows += 1
                on_row()
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return ScoredFile(num_rows, tuple(bad), collected.summary(), not_scored)


def parse_line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {str(error).partition(':')[0]}; one object a line") from error


def _numbered(lines: Any) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line


def score_row(
    rewards: Sequence[Reward], row: Row, completion: Completion, collected: MetricSummary,
    not_scored: dict[str, dict[str, int]],
) -> dict[str, Any]:  # fmt: skip
    """The `rewards` entry of one line; its values also go into the summary."""
    entry = {}
    for reward in rewards:
        result = call_safely(reward, row, completion)
        entry[reward.name] = {
            "reward": result.value, "status": result.status.value,
            "breakdown": dict(result.breakdown),
        }  # fmt: skip
        if result.status is RewardStatus.SCORED:
            collected.add({f"reward/{reward.name}": result.value})
        else:
            entry[reward.name]["reason"] = result.reason
            counts = not_scored.setdefault(reward.name, {})
            counts[result.status.value] = counts.get(result.status.value, 0) + 1
    if row.duration_s is not None:
        collected.add(grounding_metrics(row, completion))
    return entry


def read_row(record: Any) -> tuple[Row, Completion]:
    """One line as a row and a completion.

    Raises:
        ValueError: names the key, its value and what is needed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of a JSON object")
    for key in ("id", "completion"):
        if not isinstance(record.get(key), str | int) or record.get(key) is True:
            raise ValueError(f"`{key}` is {record.get(key)!r}; text is needed")
    for key in ("query", "language", "question", "answer", "audio"):
        if record.get(key) is not None and not isinstance(record[key], str):
            raise ValueError(f"`{key}` is {record[key]!r}; text is needed")
    choices = record.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"`choices` is {choices!r}; a list of texts is needed")
    events = parse_events(record.get("events") or (), "row")
    duration_s = record.get("duration_s")
    if duration_s is not None and (
        isinstance(duration_s, bool) or not isinstance(duration_s, int | float) or duration_s <= 0
    ):
        raise ValueError(f"`duration_s` is {duration_s!r}; seconds above 0 are needed")
    for event in events:
        if (
            event.start_s < 0
            or event.end_s < event.start_s
            or (duration_s and event.end_s > duration_s + 0.05)
        ):
            raise ValueError(
                f"event {event.start_s:g}-{event.end_s:g} s is reversed or outside the clip of "
                f"{duration_s} s"
            )
    task = record.get("task") or ("grounding" if events else "chat")
    if task not in [t.value for t in Task]:
        raise ValueError(f"`task` is {task!r}; one of {[t.value for t in Task]}")
    if events and duration_s is None:
        raise ValueError("`duration_s` is missing; events need the clip's length")
    row = Row(
        str(record["id"]), ({"role": "user", "content": str(record.get("question") or "")},),
        record.get("audio"), duration_s, Task(task), events, record.get("query"),
        str(record.get("answer") or ""), tuple(choices),
        str(record.get("language") or "en"),
    )  # fmt: skip
    if row.task in TIMED_TASKS and not row.target_spans:
        raise ValueError(
            f"task {task!r} without labelled events"
            + (f" for query {row.query!r}" if row.query else "")
            + "; give `events`, or task 'absent'"
        )
    finish_reason = str(record.get("finish_reason") or "stop")
    return row, Completion((), (), str(record["completion"]), finish_reason, 0)

"""Held-out evaluation: free-running greedy answers, per-row scores, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.rows import Row
from posttrain.types import Completion, Group, PromptRequest, Reward, SamplingSettings, Task
from reward_models.grounding import TimestampGrounding
from reward_models.scoring import score_all


@dataclass(frozen=True)
class RowScore:
    """One held-out row: IoU of merged spans and event F1 (None: the task has no spans), reward."""

    row_id: str
    miou: float | None
    event_f1: float | None
    reward: float | None
    text: str
    truncated: bool


def greedy_scores(
    rows: Sequence[Row],
    reward: Reward,
    generate: Callable[[Sequence[PromptRequest], SamplingSettings], list[Group]],
    max_tokens: int,
    timeout_s: float = 60.0,
) -> list[RowScore]:
    """Answers every row greedily; a truncated answer has spans scored, but no reward."""
    requests = [PromptRequest(f"eval/{r.id}", r.id, r.prompt, r.audio, 0) for r in rows]
    groups = generate(requests, SamplingSettings(0.0, max_tokens))
    answers = [(row, g.completions[0]) for row, g in zip(rows, groups, strict=True)]
    results = score_all(reward, answers, timeout_s=timeout_s)
    return [
        _score(row, completion, result.value)
        for (row, completion), result in zip(answers, results, strict=True)
    ]


def _score(row: Row, completion: Completion, value: float | None) -> RowScore:
    grounding = TimestampGrounding()(row, completion)
    iou: float | None = grounding.breakdown.get("iou")
    event_f1: float | None = grounding.breakdown.get("event_f1")
    if row.task is Task.ABSENT:
        iou = event_f1 = grounding.breakdown["raw"]
    return RowScore(row.id, iou, event_f1, value, completion.text, completion.truncated)


def means(scores: Sequence[RowScore]) -> dict[str, float]:
    """miou, event_f1 and reward, each over the rows that have one (NaN: none has)."""
    return {
        "miou": _mean([s.miou for s in scores]),
        "event_f1": _mean([s.event_f1 for s in scores]),
        "reward": _mean([s.reward for s in scores]),
    }


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else float("nan")


def bootstrap_ci95(values: Sequence[float], num_samples: int, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), (num_samples, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def compare(
    before: Sequence[RowScore], after: Sequence[RowScore], num_samples: int
) -> dict[str, Any]:
    """The `held_out` record of summary.json: paired over the same rows, those with spans."""
    if [s.row_id for s in before] != [s.row_id for s in after]:
        raise ValueError("held-out rows before and after differ; evaluate the same rows")
    pairs = zip(before, after, strict=True)
    differences = [b.miou - a.miou for a, b in pairs if a.miou is not None and b.miou is not None]
    if not differences:
        return {"n": 0, "metric": "miou", "before": means(before), "after": means(after)}
    low, high = bootstrap_ci95(differences, num_samples)
    return {
        "n": len(differences),
        "metric": "miou",
        "before": means(before),
        "after": means(after),
        "paired_diff": {"mean": float(np.mean(differences)), "ci95": [low, high]},
    }


def to_records(scores: Sequence[RowScore]) -> list[dict[str, Any]]:
    return [vars(s) for s in scores]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[RowScore]:
    return [RowScore(**record) for record in records]

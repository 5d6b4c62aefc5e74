"""Held-out evaluation: free-running greedy answers, per-row scores, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.rows import Row
from posttrain.types import Group, PromptRequest, Reward, SamplingSettings, Task
from reward_models.grounding import TimestampGrounding


@dataclass(frozen=True)
class RowScore:
    """One held-out row: IoU of merged spans, event F1, total reward (None: not scored)."""

    row_id: str
    miou: float
    event_f1: float
    reward: float | None
    text: str
    truncated: bool


def greedy_scores(
    rows: Sequence[Row],
    reward: Reward,
    generate: Callable[[Sequence[PromptRequest], SamplingSettings], list[Group]],
    max_tokens: int,
) -> list[RowScore]:
    """Answers every row greedily and scores it. A truncated answer is scored as it stands."""
    requests = [PromptRequest(f"eval/{r.id}", r.id, r.prompt, r.audio, 0) for r in rows]
    groups = generate(requests, SamplingSettings(0.0, max_tokens))
    return [_score(row, group, reward) for row, group in zip(rows, groups, strict=True)]


def _score(row: Row, group: Group, reward: Reward) -> RowScore:
    completion = group.completions[0]
    grounding = TimestampGrounding()(row, completion)
    if row.task is Task.ABSENT:
        iou = event_f1 = float(grounding.value or 0.0)
    else:
        iou = float(grounding.breakdown.get("iou", 0.0))
        event_f1 = float(grounding.breakdown.get("event_f1", 0.0))
    value = reward(row, completion).value
    return RowScore(row.id, iou, event_f1, value, completion.text, completion.truncated)


def means(scores: Sequence[RowScore]) -> dict[str, float]:
    """miou, event_f1 over all rows; reward over the rows that have one."""
    rewards = [s.reward for s in scores if s.reward is not None]
    return {
        "miou": float(np.mean([s.miou for s in scores])),
        "event_f1": float(np.mean([s.event_f1 for s in scores])),
        "reward": float(np.mean(rewards)) if rewards else float("nan"),
    }


def bootstrap_ci95(values: Sequence[float], num_samples: int, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), (num_samples, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def compare(
    before: Sequence[RowScore], after: Sequence[RowScore], num_samples: int
) -> dict[str, Any]:
    """The `held_out` record of summary.json: paired over the same rows."""
    if [s.row_id for s in before] != [s.row_id for s in after]:
        raise ValueError("held-out rows before and after differ; evaluate the same rows")
    differences = [b.miou - a.miou for a, b in zip(before, after, strict=True)]
    low, high = bootstrap_ci95(differences, num_samples)
    return {
        "n": len(before),
        "metric": "miou",
        "before": means(before),
        "after": means(after),
        "paired_diff": {"mean": float(np.mean(differences)), "ci95": [low, high]},
    }


def to_records(scores: Sequence[RowScore]) -> list[dict[str, Any]]:
    return [vars(s) for s in scores]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[RowScore]:
    return [RowScore(**record) for record in records]

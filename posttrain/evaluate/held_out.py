"""Held-out evaluation: free-running greedy answers, per-row metrics, paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from posttrain.data.rows import Row
from posttrain.evaluate.row_metrics import Contribution, main_metric, row_metrics
from posttrain.evaluate.row_statistics import paired
from posttrain.types import Completion, Group, PromptRequest, Reward, SamplingSettings
from reward_models.scoring import score_all


@dataclass(frozen=True)
class RowScore:
    """One held-out answer.

    Attributes:
        metrics: name -> (sum, weight), see `row_metrics`.
        reward: of the recipe; None where it has none, or the answer has no reward.
    """

    row_id: str
    metric: str
    metrics: Mapping[str, Contribution]
    reward: float | None
    text: str
    truncated: bool


def greedy_scores(
    rows: Sequence[Row],
    reward: Reward | None,
    generate: Callable[[Sequence[PromptRequest], SamplingSettings], list[Group]],
    max_tokens: int,
    timeout_s: float = 60.0,
) -> list[RowScore]:
    """Answers every row greedily; a truncated answer has metrics, but no reward."""
    requests = [PromptRequest(f"eval/{r.id}", r.id, r.prompt, r.audio, 0) for r in rows]
    groups = generate(requests, SamplingSettings(0.0, max_tokens))
    completions = [group.completions[0] for group in groups]
    return _scores(rows, completions, reward, timeout_s)


def rescored(
    record: Mapping[str, Any], rows: Mapping[str, Sequence[Row]], reward: Reward | None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:  # fmt: skip
    """The answers that another run kept of the same model, under this run's reward.

    Args:
        record: a run's `held_out/*.json`, checked by `check_rows`.
    """
    out: dict[str, Any] = {"step": record["step"]}
    for name, part in rows.items():
        completions = [
            Completion((), (), score.text, "length" if score.truncated else "stop", 0)
            for score in from_records(record[name])
        ]
        out[name] = to_records(_scores(part, completions, reward, timeout_s))
    return out


def _scores(
    rows: Sequence[Row], completions: Sequence[Completion], reward: Reward | None, timeout_s: float
) -> list[RowScore]:
    answers = list(zip(rows, completions, strict=True))
    rewards: list[float | None] = [None] * len(answers)
    if reward is not None:
        rewards = [result.value for result in score_all(reward, answers, timeout_s=timeout_s)]
    return [
        RowScore(
            row.id, main_metric(row.task), row_metrics(row, completion), value,
            completion.text, completion.truncated,
        )
        for (row, completion), value in zip(answers, rewards, strict=True)
    ]  # fmt: skip


def means(scores: Sequence[RowScore]) -> dict[str, float]:
    """Every metric over the rows that have it, and the mean reward where there is one."""
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    out = {name: metric_of([s.metrics.get(name) for s in scores]) for name in names}
    rewards = [s.reward for s in scores if s.reward is not None]
    return out | ({"reward": float(np.mean(rewards))} if rewards else {})


def means_by_source(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of a run's `held_out/*.json`: source -> metrics."""
    sources = {name: scores for name, scores in record.items() if name != "step"}
    return {name: means(from_records(scores)) for name, scores in sources.items()}


def metric_of(contributions: Sequence[Contribution | None]) -> float:
    """Sum of sums over sum of weights; NaN where no row has the metric."""
    known = [c for c in contributions if c is not None]
    weight = sum(w for _, w in known)
    return sum(s for s, _ in known) / weight if weight else float("nan")


def compare(
    before: Sequence[RowScore], after: Sequence[RowScore], num_samples: int
) -> dict[str, Any]:
    """The `held_out` record of summary.json: paired over the same rows, by their task's metric.

    Rows of several tasks are compared by the metric that most of them have; the others are in the
    means. Where no row has one (`UNMEASURED` tasks) there is no difference.
    """
    if [s.row_id for s in before] != [s.row_id for s in after]:
        raise ValueError("held-out rows before and after differ; evaluate the same rows")
    measured = [score.metric for score in before if score.metric in score.metrics]
    names = measured or [score.metric for score in before]
    metric = max(sorted(set(names)), key=names.count)
    pairs = [
        (a.metrics[metric], b.metrics[metric])
        for a, b in zip(before, after, strict=True)
        if metric in a.metrics and metric in b.metrics
    ]
    record = {
        "n": len(pairs), "metric": metric, "before": means(before), "after": means(after),
    }  # fmt: skip
    if not pairs:
        return record
    before_N2, after_N2 = np.asarray(pairs).swapaxes(0, 1)
    mean, low, high = paired(metric, before_N2, after_N2, num_samples)
    return record | {"paired_diff": {"mean": mean, "ci95": [low, high]}}


def summary_of(
    load_json: Callable[[str], Any], held_out: Iterable[str], reported: Iterable[str],
    num_samples: int,
) -> dict[str, Any]:  # fmt: skip
    """`held_out` for the sources that count, `reported` for those that gate nothing.

    Args:
        load_json: reads `held_out/before.json` and `held_out/after.json` of a run, None if missing.
    """
    before, after = (load_json(f"held_out/{when}.json") for when in ("before", "after"))
    if not (before and after):
        return {}

    def compared(names: Sequence[str]) -> dict[str, Any]:
        pair = [from_records([r for n in names for r in record[n]]) for record in (before, after)]
        return compare(pair[0], pair[1], num_samples)

    out: dict[str, Any] = {}
    if names := list(held_out):
        out["held_out"] = compared(names)
        if len(names) > 1:
            out["by_source"] = {name: compared([name]) for name in names}
    if names := list(reported):
        out["reported"] = {name: compared([name]) for name in names}
    return out


def check_rows(record: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> None:
    """Raises ValueError where a run's `held_out/*.json` is about other rows."""
    for name, part in rows.items():
        if [score["row_id"] for score in record.get(name, ())] != [row.id for row in part]:
            raise ValueError(
                f"held-out answers of step {record['step']} are not to the rows of data: {name}; "
                "with evaluation.before set, evaluate the same rows or set it to null"
            )


def to_records(scores: Sequence[RowScore]) -> list[dict[str, Any]]:
    return [asdict(score) for score in scores]


def from_records(records: Sequence[Mapping[str, Any]]) -> list[RowScore]:
    return [
        RowScore(**{**r, "metrics": {name: (c[0], c[1]) for name, c in r["metrics"].items()}})
        for r in records
    ]

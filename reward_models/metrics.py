"""Numbers that people compare: mIoU, R1, event F1, onset error, rates; each with its interval.

Definitions in docs/metrics.md. Values of one row are floats or None where the row has none.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, Task
from reward_models.grounding import count_stated
from reward_models.spans import distinct, event_f1, iou, match, span_iou
from reward_models.timestamps import ParseStatus, parse_spans

METRICS = (
    "miou", "r1@0.3", "r1@0.5", "r1@0.7", "event_f1", "onset_error_s", "count_accuracy",
    "packed_rate", "round_number_rate", "absent_accuracy", "unparseable_rate",
)  # fmt: skip
ROUND_TO_S = 5.0


def grounding_metrics(row: Row, completion: Completion) -> dict[str, float | None]:
    """Every metric of one answer; spans are read as plain text even where a reward refuses them."""
    out: dict[str, float | None] = dict.fromkeys(METRICS)
    _, answer = split_thinking(completion.text)
    parsed = parse_spans(answer, row.duration_s, form="grounding")
    spans = distinct(parsed.valid_spans)
    out["packed_rate"] = float(parsed.packed)
    if parsed.spans:
        ends = [t for s in parsed.spans for t in {s.start_s, s.end_s}]
        out["round_number_rate"] = sum(t % ROUND_TO_S == 0 for t in ends) / len(ends)
    if row.task is Task.ABSENT:
        out["absent_accuracy"] = float(parsed.status is ParseStatus.NONE_STATED)
        return out
    targets = row.target_spans
    if row.task is Task.COUNT:
        times = parse_spans(answer, row.duration_s).spans
        out["count_accuracy"] = float(count_stated(answer, row.query, times) == len(targets))
        return out
    if row.task not in (Task.GROUNDING, Task.POINTS, Task.DENSE) or not targets:
        return out
    unread = (ParseStatus.UNPARSEABLE, ParseStatus.EMPTY)
    out["unparseable_rate"] = float(parsed.status in unread)
    if len(targets) > 1:
        out["count_accuracy"] = float(len(spans) == len(targets))
    if row.task is Task.POINTS or all(s == e for s, e in targets):
        if spans:
            out["onset_error_s"] = _nearest_onset(spans, targets)
        return out
    out["miou"] = iou(spans, targets)
    first = max((span_iou(spans[0], t) for t in targets), default=0.0) if spans else 0.0
    out |= {f"r1@{at}": float(first >= at) for at in (0.3, 0.5, 0.7)}
    out["event_f1"] = event_f1(spans, targets)
    if pairs := match(spans, targets):
        errors = [abs(spans[i][0] - targets[j][0]) for i, j, _ in pairs]
        out["onset_error_s"] = sum(errors) / len(errors)
    return out


def _nearest_onset(
    spans: Sequence[tuple[float, float]], targets: Sequence[tuple[float, float]]
) -> float:
    return sum(min(abs(s - t) for s, _ in spans) for t, _ in targets) / len(targets)


class MetricSummary:
    """Collects one float a row and metric (4 bytes each), and summarises them at the end."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}

    def add(self, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._values.setdefault(name, array("f")).append(value)

    def summary(self, num_samples: int = 1_000, seed: int = 0) -> dict[str, dict[str, object]]:
        """Name -> n, mean, 95 % percentile bootstrap interval; onset errors with their median.

        Above 100,000 values 200 bootstrap samples are drawn: the interval is narrow there.
        """
        out: dict[str, dict[str, object]] = {}
        for name, values in self._values.items():
            data = np.frombuffer(values, dtype=np.float32)
            low, high = _bootstrap(data, num_samples if len(data) <= 100_000 else 200, seed)
            out[name] = {
                "n": len(data),
                "mean": float(data.mean(dtype=np.float64)),
                "ci95": [low, high],
            }
            if name == "onset_error_s":
                out[name]["median"] = float(np.median(data))
        return out


def _bootstrap(data: np.ndarray, num_samples: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    means = [
        data[rng.integers(0, len(data), len(data))].mean(dtype=np.float64)
        for _ in range(num_samples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

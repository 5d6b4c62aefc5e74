"""Arithmetic on spans [start, end) in seconds; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

SpanS = tuple[float, float]


def merge(spans: Sequence[SpanS]) -> list[SpanS]:
    """Sorted union without overlaps; zero-length spans vanish."""
    out: list[SpanS] = []
    for start, end in sorted(s for s in spans if s[1] > s[0]):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(spans: Sequence[SpanS]) -> float:
    return sum(end - start for start, end in merge(spans))


def iou(predicted: Sequence[SpanS], target: Sequence[SpanS]) -> float:
    """|A and B| / |A or B| on merged sets; 0 when either is empty."""
    a, b = merge(predicted), merge(target)
    both = sum(max(0.0, min(e1, e2) - max(s1, s2)) for s1, e1 in a for s2, e2 in b)
    union = length([*a, *b])
    return both / union if union > 0 else 0.0


def span_iou(a: SpanS, b: SpanS) -> float:
    """IoU of two single spans; 0 when one has no length."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    if both <= 0:
        return 0.0
    return both / (max(a[1], b[1]) - min(a[0], b[0]))


def assign(scores: Sequence[Sequence[float]]) -> list[tuple[int, int, float]]:
    """One-to-one pairs (row, column, score) that maximise the sum; pairs of score 0 are left out.

    Args:
        scores: (num_predicted, num_target), none negative.
    """
    if not scores or not scores[0]:
        return []
    if len(scores) == 1:
        best = max(range(len(scores[0])), key=scores[0].__getitem__)
        return [(0, best, scores[0][best])] if scores[0][best] > 0 else []
    matrix = np.asarray(scores)
    rows, columns = linear_sum_assignment(-matrix)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(i, j, float(matrix[i, j])) for i, j in pairs if matrix[i, j] > 0]


def match(predicted: Sequence[SpanS], target: Sequence[SpanS]) -> list[tuple[int, int, float]]:
    """One-to-one pairs (predicted index, target index, IoU) that maximise the sum of IoU."""
    return assign([[span_iou(p, t) for t in target] for p in predicted])


def distinct(spans: Sequence[SpanS], within_s: float = 0.01) -> list[SpanS]:
    """Without exact repetitions; first appearance counts."""
    out: list[SpanS] = []
    seen: set[tuple[int, int]] = set()
    for start, end in spans:
        key = (round(start / within_s), round(end / within_s))
        if key not in seen:
            seen.add(key)
            out.append((start, end))
    return out


def near(predicted: SpanS, target: SpanS, collar_s: float = 0.2) -> bool:
    """Onset within the collar, offset within max(collar, half the target's length)."""
    offset_s = max(collar_s, 0.5 * (target[1] - target[0]))
    onset_near = abs(predicted[0] - target[0]) <= collar_s
    return onset_near and abs(predicted[1] - target[1]) <= offset_s


def event_f1(predicted: Sequence[SpanS], target: Sequence[SpanS], collar_s: float = 0.2) -> float:
    """F1 of events matched one to one by `near`.

    Source: Mesaros et al. 2016, "Metrics for polyphonic sound event detection", as in sed_eval.
    """
    if not predicted or not target:
        return 0.0
    hits = assign([[float(near(p, t, collar_s)) for t in target] for p in predicted])
    return 2 * len(hits) / (len(predicted) + len(target))

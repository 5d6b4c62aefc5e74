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


def match(predicted: Sequence[SpanS], target: Sequence[SpanS]) -> list[tuple[int, int, float]]:
    """One-to-one pairs (predicted index, target index, IoU) that maximise the sum of IoU."""
    if not predicted or not target:
        return []
    scores = np.array([[iou([p], [t]) for t in target] for p in predicted])
    rows, columns = linear_sum_assignment(-scores)
    pairs = zip(rows.tolist(), columns.tolist(), strict=True)
    return [(i, j, float(scores[i, j])) for i, j in pairs if scores[i, j] > 0]


def event_f1(predicted: Sequence[SpanS], target: Sequence[SpanS], collar_s: float = 0.2) -> float:
    """F1 of events matched one to one: onset within the collar, offset within
    max(collar, half the event's length).

    Source: Mesaros et al. 2016, "Metrics for polyphonic sound event detection", as in sed_eval.
    """
    if not predicted or not target:
        return 0.0
    hits = np.zeros((len(predicted), len(target)))
    for i, (ps, pe) in enumerate(predicted):
        for j, (ts, te) in enumerate(target):
            near = abs(ps - ts) <= collar_s and abs(pe - te) <= max(collar_s, 0.5 * (te - ts))
            hits[i, j] = float(near)
    rows, columns = linear_sum_assignment(-hits)
    return 2 * float(hits[rows, columns].sum()) / (len(predicted) + len(target))

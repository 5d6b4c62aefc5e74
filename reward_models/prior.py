"""What an answer earns that has not heard the clip: the blind prior that rewards subtract.

    value = (r - b) / (1 - b), kept signed          b: the best constant answer's mean raw score r

Source: on Clotho-Moment the constant span [10, 44] reaches a mean IoU of 0.41; clipped at 0 the
guess would still earn on the rows that it happens to hit, so the value stays signed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from posttrain.data.rows import Row
from posttrain.types import Task
from reward_models.spans import SpanS

DEFAULT_COUNT_PRIOR = 0.3
WITH_SPANS = (Task.GROUNDING, Task.POINTS, Task.DENSE)
RawScore = Callable[[Sequence[SpanS], Row], float]


@dataclass(frozen=True)
class BlindPrior:
    """Mean raw score of the best constant answer, by what is asked.

    Attributes:
        grounding, points: None: the documented default, computed from each row (see `of`).
        count: share of the commonest count.
        absent_share: share of absent-event rows among the rows that ask when.
        guess: the constant answer behind `grounding`, as shares of the clip or seconds.
        num_rows: rows that it was fitted on.
    """

    grounding: float | None = None
    points: float | None = None
    count: float = DEFAULT_COUNT_PRIOR
    absent_share: float = 0.0
    guess: Mapping[str, object] = field(default_factory=dict)
    num_rows: int = 0

    def of_spans(self, row: Row) -> float:
        """b of a grounding row. Default: the best constant span against one span of the row's mean
        length placed uniformly, divided among several targets as F-beta would."""
        if self.grounding is not None:
            return self.grounding
        targets, duration_s = row.target_spans, row.duration_s
        if not targets or not duration_s:
            return 0.0
        mean_s = sum(end - start for start, end in targets) / len(targets)
        return uniform_placement_prior(min(1.0, mean_s / duration_s)) / len(targets)

    def of_points(self, row: Row, tolerance_s: float) -> float:
        """b of a points row. Default: a constant point against one placed uniformly."""
        if self.points is not None:
            return self.points
        return min(0.5, tolerance_s / row.duration_s) if row.duration_s else 0.0

    @property
    def cost_of_none(self) -> float:
        """What saying "none" costs where the event is there, so that always saying it earns 0."""
        if self.absent_share >= 0.5:
            return 1.0
        return self.absent_share / (1 - self.absent_share)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BlindPrior:
        """Reads what `save` wrote.

        Raises:
            ValueError: not such a file; names it and the key.
        """
        try:
            record = json.loads(Path(path).read_text())
            prior = cls(**record)
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"prior {path}: {error}; give the prior.json of a run, or fit one"
            ) from error
        for name in ("grounding", "points", "count", "absent_share"):
            value = getattr(prior, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"prior {path}: {name} is {value!r}; must be from 0 to below 1")
        return prior


def adjusted(raw: float, blind: float) -> float:
    """(r - b) / (1 - b), at least -1."""
    return max(-1.0, (raw - blind) / (1 - blind))


@lru_cache(maxsize=512)
def _uniform(percent: int) -> float:
    share = percent / 100
    if share >= 0.995:
        return 1.0 - 0.005
    starts = np.linspace(0, 1 - share, 101)
    best = 0.0
    for width in np.linspace(share, 1.0, 41):
        low, high = 0.5 - width / 2, 0.5 + width / 2
        both = np.clip(np.minimum(starts + share, high) - np.maximum(starts, low), 0, None)
        union = share + width - both
        best = max(best, float(np.mean(both / union)))
    return best


def uniform_placement_prior(share: float) -> float:
    """Best constant span's mean IoU with one span of `share` of the clip, placed uniformly.

    Args:
        share: the span's length over the clip's, 0 to 1; rounded up to a hundredth.
    """
    return _uniform(int(np.ceil(100 * share - 1e-9)))


MAX_FIT_ROWS = 2_000
GRID = 20


def fit_prior(rows: Iterable[Row], raw_score: RawScore, point_score: RawScore) -> BlindPrior:
    """The best constant answers on training rows.

    Constant spans tried: all with both ends on a grid of 20 parts of the clip, and all with ends
    on quantiles of the labelled starts and ends in seconds; then two and three such spans.

    Args:
        rows: training rows; at most 2,000 evenly spaced ones of each task are used, and none
            without labels.
        raw_score: score in [0, 1] of spans (seconds) on a grounding row, before any prior.
        point_score: the same for a points row.
    """
    by_task: dict[Task, list[Row]] = {}
    labelled = (r for r in rows if r.target_spans or r.task in (Task.ABSENT, Task.COUNT))
    for row in labelled:
        by_task.setdefault(row.task, []).append(row)
    counts = Counter(_target_count(row) for row in by_task.get(Task.COUNT, []))
    asked_when = sum(len(by_task.get(task, [])) for task in WITH_SPANS)
    absent = len(by_task.get(Task.ABSENT, []))
    grounding, guess = _fit_spans(_thinned(by_task.get(Task.GROUNDING, [])), raw_score)
    points = _fit_points(_thinned(by_task.get(Task.POINTS, [])), point_score)
    total = sum(counts.values())
    return BlindPrior(
        grounding=grounding,
        points=points,
        count=min(0.95, counts.most_common(1)[0][1] / total) if total else DEFAULT_COUNT_PRIOR,
        absent_share=min(0.95, absent / (absent + asked_when)) if absent else 0.0,
        guess=guess,
        num_rows=sum(map(len, by_task.values())),
    )


def _target_count(row: Row) -> int:
    return len(row.target_spans)


def _thinned(rows: Sequence[Row], limit: int = MAX_FIT_ROWS) -> list[Row]:
    step = max(1, -(-len(rows) // limit))
    return list(rows[::step])


def _fit_spans(rows: Sequence[Row], raw_score: RawScore) -> tuple[float | None, dict[str, object]]:
    if not rows:
        return None, {}
    relative = [(i / GRID, j / GRID) for i in range(GRID) for j in range(i + 1, GRID + 1)]
    edges = np.quantile(
        [t for row in rows for t in row.target_spans], np.linspace(0.05, 0.95, 8), axis=0
    )
    absolute = [(float(s), float(e)) for s in edges[:, 0] for e in edges[:, 1] if s < e]
    few = _thinned(rows, 200)
    ranked = [
        (_mean_score([span], unit, few, raw_score), unit, span)
        for unit, spans in (("share", relative), ("seconds", absolute))
        for span in spans
    ]
    ranked.sort(reverse=True)
    best, best_guess = -1.0, {}
    for _, unit, first in ranked[:8]:
        for guess in _grown(
            [first], unit, few, raw_score, [s for _, u, s in ranked[:40] if u == unit]
        ):
            score = _mean_score(guess, unit, rows, raw_score)
            if score > best:
                best, best_guess = score, {"unit": unit, "spans": guess}
    return min(0.95, best), dict(best_guess)


def _grown(
    guess: list[SpanS], unit: str, rows: Sequence[Row], raw_score: RawScore,
    candidates: Sequence[SpanS],
) -> list[list[SpanS]]:  # fmt: skip
    """`guess` alone and with up to two further spans, added as long as they help."""
    guesses = [guess]
    score = _mean_score(guess, unit, rows, raw_score)
    for _ in range(2):
        further = [[*guesses[-1], span] for span in candidates if span not in guesses[-1]]
        scored = [(_mean_score(g, unit, rows, raw_score), g) for g in further]
        top = max(scored, default=(0.0, guess))
        if top[0] <= score:
            break
        score = top[0]
        guesses.append(top[1])
    return guesses


def _mean_score(
    guess: Sequence[SpanS], unit: str, rows: Sequence[Row], raw_score: RawScore
) -> float:
    total = 0.0
    for row in rows:
        scale = (row.duration_s or 1.0) if unit == "share" else 1.0
        total += raw_score([(scale * s, scale * e) for s, e in guess], row)
    return total / len(rows)


def _fit_points(rows: Sequence[Row], point_score: RawScore) -> float | None:
    if not rows:
        return None
    places = [[(i / 40, i / 40)] for i in range(41)]
    return min(0.95, max(_mean_score(place, "share", rows, point_score) for place in places))

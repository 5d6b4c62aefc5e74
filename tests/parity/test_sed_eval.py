"""Event F1 and IoU against sed_eval on random cases."""

from __future__ import annotations

import random

import dcase_util
import pytest
import sed_eval

from reward_models.spans import event_f1, iou


def random_spans(rng: random.Random) -> list[tuple[float, float]]:
    """One to five spans inside 12 s on a grid of 1/16 s, which floats hold exactly."""
    spans = []
    for _ in range(rng.randint(1, 5)):
        start = rng.randint(0, 160)
        spans.append((start / 16, rng.randint(start + 1, start + 32) / 16))
    return spans


def near(spans: list[tuple[float, float]], rng: random.Random) -> list[tuple[float, float]]:
    """Spans moved a little, some left out, so that hits and misses both occur."""
    moved = []
    for start, end in spans:
        if rng.random() < 0.8:
            start = max(0.0, start + rng.randint(-5, 5) / 16)
            moved.append((start, max(start + 1 / 16, end + rng.randint(-10, 10) / 16)))
    return moved or random_spans(rng)


def as_list(spans: list[tuple[float, float]]) -> dcase_util.containers.MetaDataContainer:
    return dcase_util.containers.MetaDataContainer(
        [{"event_label": "x", "onset": s, "offset": e, "filename": "a.wav"} for s, e in spans]
    )


def test_event_f1_and_iou_equal_sed_eval_on_200_cases() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        target = random_spans(rng)
        predicted = near(target, rng) if rng.random() < 0.7 else random_spans(rng)
        events = sed_eval.sound_event.EventBasedMetrics(
            event_label_list=["x"], t_collar=0.2, percentage_of_length=0.5,
            event_matching_type="optimal",
        )  # fmt: skip
        events.evaluate(as_list(target), as_list(predicted))
        theirs = events.results_overall_metrics()["f_measure"]["f_measure"]
        ours = event_f1(predicted, target, collar_s=0.2)
        assert ours == pytest.approx(0.0 if theirs != theirs else theirs, abs=1e-6)
        segments = sed_eval.sound_event.SegmentBasedMetrics(
            event_label_list=["x"], time_resolution=1 / 16
        )
        segments.evaluate(as_list(target), as_list(predicted))
        counts = segments.overall
        both, union = counts["Ntp"], counts["Ntp"] + counts["Nfp"] + counts["Nfn"]
        assert iou(predicted, target) == pytest.approx(both / union, abs=1e-6)
        seen.add(round(ours, 1))
    assert len(seen) > 5  # the cases are not all alike

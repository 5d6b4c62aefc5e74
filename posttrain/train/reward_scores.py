"""How good a learned grounding reward is: AUC, calibration, agreement with labels, intervals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, spearmanr

from posttrain.data.rows import Row
from posttrain.model.audio_text_model import AudioTextModel
from posttrain.train.reward_data import KINDS, claim_examples, shifted_span
from reward_models.audio_text import expected_iou
from reward_models.spans import iou

BOOTSTRAP_SAMPLES = 500


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a true claim scores above a false one; ties count half.

    Args:
        scores: (n,) float; positive: (n,) bool.
    """
    num_true, num_false = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def expected_calibration_error(
    probabilities: np.ndarray, positive: np.ndarray, num_bins: int = 15
) -> float:
    """Mean gap between stated and observed share over equally wide bins, weighted by their size.

    Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 3.
    """
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    total = 0.0
    for b in np.unique(bins):
        inside = bins == b
        gap = abs(probabilities[inside].mean() - positive[inside].mean())
        total += inside.mean() * gap
    return float(total)


def evaluate(model: AudioTextModel, rows: Sequence[Row], labels: Sequence[str], seed: int) -> Any:
    """Scores on rows that were not trained on; intervals come from resampling clips.

    Args:
        labels: phrases that absent claims are drawn from.
    """
    rng = random.Random(f"posttrain/reward-eval/{seed}")
    examples = claim_examples(rows, labels, rng)
    probabilities = np.array(
        model.claims_batch(
            [(str(rows[e.row_index].audio), e.phrase, e.start_s, e.end_s) for e in examples]
        )
    )
    positive = np.array([e.is_true for e in examples])
    clip = np.array([e.row_index for e in examples])
    kinds = np.array([e.kind for e in examples])
    ranked, ranked_clip = _ranked_pairs(model, rows, rng)
    agreement = _agreement(model, rows, rng)
    return {
        "clips": len(rows),
        "claims": {kind: int((kinds == kind).sum()) for kind in KINDS},
        "auc": _with_interval(lambda keep: auc(probabilities[keep], positive[keep]), clip),
        "auc_by_kind": {
            kind: auc(probabilities[kept], positive[kept])
            for kind in KINDS[1:]
            if (kept := positive | (kinds == kind)).any() and (kinds == kind).any()
        },
        "ece": _with_interval(
            lambda keep: expected_calibration_error(probabilities[keep], positive[keep]), clip
        ),
        "true_above_shifted": _with_interval(lambda keep: float(ranked[keep].mean()), ranked_clip),
        **agreement,
    }


def _ranked_pairs(
    model: AudioTextModel, rows: Sequence[Row], rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each true span scores above a shifted one of the same phrase, and its clip."""
    pairs, clip = [], []
    for i, row in enumerate(rows):
        for event in row.events:
            if event.label and (shifted := shifted_span(event, row, rng)):
                audio = str(row.audio)
                pairs += [
                    (audio, event.label, event.start_s, event.end_s),
                    (audio, event.label, *shifted),
                ]
                clip.append(i)
    scores = np.array(model.claims_batch(pairs)).reshape(-1, 2)
    return scores[:, 0] > scores[:, 1], np.array(clip)


def _agreement(model: AudioTextModel, rows: Sequence[Row], rng: random.Random) -> dict[str, float]:
    """Expected IoU beside the labelled one, on answers of all qualities: the right spans, moved
    ones, one too few, and other places."""
    expected, labelled = [], []
    for row in rows:
        label = rng.choice(sorted({e.label for e in row.events if e.label}))
        targets = [(e.start_s, e.end_s) for e in row.events if e.label == label]
        duration_s = row.duration_s or 0.0
        moved = []
        for start_s, end_s in targets:
            by_s = rng.uniform(-0.6, 0.6) * (end_s - start_s)
            moved.append((max(0.0, start_s + by_s), min(duration_s, end_s + by_s)))
        length_s = targets[0][1] - targets[0][0]
        place_s = rng.uniform(0, max(0.0, duration_s - length_s))
        relevance, frame_s = model.relevance(str(row.audio), label)
        for answer in (targets, moved, targets[:1], [(place_s, place_s + length_s)]):
            expected.append(expected_iou(relevance, frame_s, answer))
            labelled.append(iou(answer, targets))
    return {
        "iou_spearman": float(spearmanr(expected, labelled).statistic),
        "iou_mean_error": float(np.mean(np.abs(np.subtract(expected, labelled)))),
    }


def _with_interval(score: Any, clip: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The score on all claims, and its 95 % interval over resampled clips."""
    rng = np.random.default_rng(seed)
    places = {c: np.flatnonzero(clip == c) for c in np.unique(clip)}
    names = np.array(list(places))
    samples = []
    for _ in range(BOOTSTRAP_SAMPLES):
        keep = np.concatenate([places[c] for c in rng.choice(names, len(names))])
        samples.append(score(keep))
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return {"value": score(np.arange(len(clip))), "ci95": [float(low), float(high)]}

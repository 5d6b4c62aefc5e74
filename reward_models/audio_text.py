"""`audio_text_grounding`: a learned reward that needs audio and a question, but no labels.

    value = E[IoU] = sum of p inside the stated spans / (their length + sum of p outside)

p is the probability, frame by frame, that the phrase asked for is heard; the model behind it is
trained by `posttrain run recipes/reward_grounding.yaml`. Stated spans are merged first. An answer
that says "none" earns 1 - p(heard at all), calibrated by itself: a phrase that the model is unsure
of is hardly ever absent, and 1 - max p would pay for denying it. Rows without a `query` (dense
timelines) earn the mean p(claim | span) over the claims of the answer, each with the words beside
its span as the phrase.

Range [0, 1]. One invalid span makes the answer worth 0; spans copied from the question are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import AudioTextScorer, Completion, RewardResult, RewardStatus, Task
from reward_models.claims import claims_of
from reward_models.grounding import question_spans, without_copies
from reward_models.spans import merge
from reward_models.timestamps import ParseStatus, parse_spans

SCORABLE = (Task.GROUNDING, Task.POINTS, Task.DENSE, Task.ABSENT)


@dataclass(frozen=True)
class AudioTextGrounding:
    """Attributes:
    scorer: the learned model, in this process or behind an actor.
    packed: "refuse" or "accept" answers in packed minutes.
    """

    scorer: AudioTextScorer
    packed: str = "refuse"
    name: str = "audio_text_grounding"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.audio is None or row.task not in SCORABLE:
            reason = f"task {row.task.value!r} is not about when something is heard"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        _, answer = split_thinking(completion.text)
        parsed = parse_spans(answer, row.duration_s, form="grounding")
        spans = without_copies(parsed.spans, question_spans(row))
        says_none = parsed.status is ParseStatus.NONE_STATED
        terms = {"num_predicted": float(len(spans)), "none_stated": float(says_none)}
        refused = parsed.packed and self.packed == "refuse"
        if says_none and row.query:
            return RewardResult(1 - self.scorer.presence(row.audio, row.query), terms)
        if not spans or refused or not all(s.valid for s in spans):
            return RewardResult(0.0, terms)
        stated = merge([(s.start_s, s.end_s) for s in spans])
        if row.query:
            probabilities, frame_s = self.scorer.relevance(row.audio, row.query)
            value = expected_iou(probabilities, frame_s, stated)
            return RewardResult(value, terms)
        claims = claims_of(answer, spans)
        scores = self.scorer.claim_probabilities(
            row.audio, [(c.text, c.span.start_s, c.span.end_s) for c in claims if c.text]
        )
        return RewardResult(sum(scores) / len(claims), terms | {"num_claims": float(len(claims))})


def expected_iou(
    probabilities: ArrayLike, frame_s: float, stated: Sequence[tuple[float, float]]
) -> float:
    """The formula of this file's head; broken frames count by their share.

    Args:
        probabilities: (N,) p of every frame.
        stated: merged spans, seconds.
    """
    total = np.concatenate([[0.0], np.cumsum(probabilities, dtype=np.float64)])
    ends = np.asarray(stated, dtype=np.float64).reshape(-1, 2) / frame_s
    inside = float(np.diff(np.interp(ends, np.arange(len(total)), total)).sum())
    union = float(np.diff(ends).sum() + total[-1]) - inside
    return inside / union if union > 0 else 0.0

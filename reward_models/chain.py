"""`chain_grounding`: are the times that the thought cites true?

    value = (cited steps that are true) / (cited steps that name a labelled event)     in [0, 1]

Each span in `<think>` is a step; the text beside it says which event it means
(`reward_models.claims`). It is true when it overlaps an event of that label with an IoU of 0.5 or
more, or, for a single time, lies inside one (0.2 s of grace). Steps that name no labelled event
count neither way, so stamps as decoration earn nothing. Where the task has a right answer, a
thought before a wrong one earns 0.

Source: each cited step is checked instead of its mere presence (8 % of Time-R1's thoughts cite a
time at all, arXiv 2606.09248); paid on a right answer alone, as Audio-Thinker does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.data.rows import Event, Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, Reward, RewardResult, RewardStatus, Task
from reward_models.choice import Choice
from reward_models.claims import Similarity, claims_of, label_named
from reward_models.grounding import TimestampGrounding, question_spans, without_copies
from reward_models.spans import span_iou
from reward_models.timestamps import Span, parse_spans

TRUE_IOU = 0.5
GRACE_S = 0.2
RIGHT_RAW_SCORE = 0.5


@dataclass(frozen=True)
class ChainGrounding:
    """Checks the cited steps of a thought against the row's events.

    Attributes:
        packed: "refuse" or "accept" thoughts in packed minutes.
        similarity: text similarity for labels, None: words alone.
    """

    packed: str = "refuse"
    similarity: Similarity | None = None
    name: str = "chain_grounding"
    _grounding: TimestampGrounding = field(default_factory=TimestampGrounding, repr=False)
    _choice: Choice = field(default_factory=Choice, repr=False)

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if not any(event.label for event in row.events):
            reason = "row has no labelled events to check a thought against"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        right = self._right(row, completion)
        thought, _ = split_thinking(completion.text)
        parsed = parse_spans(thought, row.duration_s)
        spans = [] if parsed.packed and self.packed == "refuse" else parsed.spans
        true, checked = self._check(row, thought, without_copies(spans, question_spans(row)))
        precision = true / checked if checked else 0.0
        terms = {
            "num_cited": float(len(parsed.spans)), "num_checked": float(checked),
            "num_true": float(true), "answer_right": float(right),
        }  # fmt: skip
        return RewardResult(precision if right else 0.0, terms)

    def _check(self, row: Row, thought: str, spans: Sequence[Span]) -> tuple[int, int]:
        """(true steps, steps that name an event); a repeated step counts once."""
        labels = sorted({e.label for e in row.events if e.label})
        steps: dict[tuple[str, int, int], bool] = {}
        for claim in claims_of(thought, spans):
            label = label_named(claim, labels, self.similarity)
            if label is not None:
                key = (label, round(100 * claim.span.start_s), round(100 * claim.span.end_s))
                steps[key] = is_true(claim.span, [e for e in row.events if e.label == label])
        return sum(steps.values()), len(steps)

    def _right(self, row: Row, completion: Completion) -> bool:
        """Whether the answer is right, or the task has no right answer."""
        judge: Reward = self._choice if row.task is Task.CHOICE else self._grounding
        result = judge(row, completion)
        if result.value is None:
            return True
        return result.breakdown.get("raw", result.value) >= RIGHT_RAW_SCORE


def is_true(span: Span, events: Sequence[Event]) -> bool:
    """Whether a cited time is that of one of the events."""
    if not span.valid:
        return False
    if span.end_s == span.start_s:
        return any(e.start_s - GRACE_S <= span.start_s <= e.end_s + GRACE_S for e in events)
    stated = (span.start_s, span.end_s)
    return any(span_iou(stated, (e.start_s, e.end_s)) >= TRUE_IOU for e in events)

"""`timestamp_grounding`: are the times in the answer true?

    value = 2 * sum(IoU of matched pairs) / (predicted + target)      in [0, 1]

which is the matched F1 times the mean IoU of the matched pairs: copies and sprayed spans add to
the denominator and match nothing, so they lower the value. Absent events pay 1 for saying so and
0 for anything else. Source: one-to-one matching as in TempR1; see docs/rewards.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.spans import event_f1, iou, match
from reward_models.timestamps import ParseStatus, parse_spans

SCORABLE = (Task.GROUNDING, Task.ABSENT, Task.DENSE)


@dataclass(frozen=True)
class TimestampGrounding:
    """Reads the answer (after the last `</think>`) and scores its spans against the row's."""

    name: str = "timestamp_grounding"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.task not in SCORABLE:
            return RewardResult(
                None, {}, RewardStatus.UNSCORABLE, f"task {row.task.value!r} has no spans"
            )
        _, answer = split_thinking(completion.text)
        parsed = parse_spans(answer, row.duration_s, form="grounding")
        if row.task is Task.ABSENT:
            value = float(parsed.status is ParseStatus.NONE_STATED)
            return RewardResult(value, {"none_stated": value})
        return score_spans(parsed.valid_spans, row.target_spans, num_stated=len(parsed.spans))


def score_spans(
    predicted: tuple[tuple[float, float], ...],
    target: tuple[tuple[float, float], ...],
    *,
    num_stated: int,
) -> RewardResult:
    """The formula above.

    Args:
        predicted: valid spans, seconds.
        num_stated: spans in the text, invalid ones included: those cost precision too.
    """
    pairs = match(predicted, target)
    overlap = sum(score for _, _, score in pairs)
    matched_iou = overlap / len(pairs) if pairs else 0.0
    f1 = 2 * len(pairs) / (num_stated + len(target))
    return RewardResult(
        f1 * matched_iou,
        {
            "f1": f1,
            "matched_iou": matched_iou,
            "iou": iou(predicted, target),
            "event_f1": event_f1(predicted, target),
            "num_predicted": float(num_stated),
            "num_invalid": float(num_stated - len(predicted)),
        },
    )

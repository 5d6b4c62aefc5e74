"""What one answer contributes to each metric, by the row's task.

A contribution is (sum, weight), and a metric over rows is the sum of sums over the sum of weights:
mIoU has weight 1 a row, an error rate the reference's length. Rows without a metric leave it out;
an empty reference has no error rate.
"""

from __future__ import annotations

import jiwer

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.evaluate.refusal import refuses
from posttrain.types import Completion, Task
from reward_models.choice import Choice
from reward_models.grounding import TimestampGrounding
from reward_models.text_normal import normalise_text
from reward_models.translation import Translation

Contribution = tuple[float, float]
TASK_METRIC = {
    Task.TRANSCRIPT: "cer", Task.TRANSLATION: "chrf", Task.CHOICE: "accuracy",
    Task.REFUSAL: "refusal", Task.CHAT: "over_refusal",
}  # fmt: skip
UNMEASURED = (Task.COUNT, Task.ORDER, Task.POINTS)
LOWER_IS_BETTER = frozenset({"cer", "wer", "over_refusal"})


def main_metric(task: Task) -> str:
    """The metric that rows of a task are compared by (rows of `UNMEASURED` have a reward alone)."""
    return TASK_METRIC.get(task, "miou")


def row_metrics(row: Row, completion: Completion) -> dict[str, Contribution]:
    """Every metric that the row has."""
    if row.task is Task.TRANSCRIPT:
        return transcript_metrics(row, completion.text)
    if row.task is Task.TRANSLATION:
        chrf = Translation()(row, completion).breakdown
        return {name: (value, 1.0) for name, value in chrf.items()}
    if row.task is Task.CHOICE:
        scored = Choice()(row, completion)
        return {} if scored.value is None else {"accuracy": (scored.value, 1.0)}
    if row.task in (Task.REFUSAL, Task.CHAT):
        _, answer = split_thinking(completion.text)
        return {main_metric(row.task): (float(refuses(answer)), 1.0)}
    breakdown = TimestampGrounding()(row, completion).breakdown
    if row.task is Task.ABSENT:
        return {name: (breakdown["raw"], 1.0) for name in ("miou", "event_f1")}
    found = {"miou": breakdown.get("iou"), "event_f1": breakdown.get("event_f1")}
    return {name: (value, 1.0) for name, value in found.items() if value is not None}


def transcript_metrics(row: Row, text: str) -> dict[str, Contribution]:
    """Edits and lengths, in words and in characters without spaces, of normalised texts."""
    _, answer = split_thinking(text)
    reference = normalise_text(row.answer, row.language)
    hypothesis = normalise_text(answer, row.language)
    if not reference:
        return {}
    out = {}
    for name, split in (("wer", str.split), ("cer", lambda s: list(s.replace(" ", "")))):
        wanted, got = split(reference), split(hypothesis)
        out[name] = (float(edits(wanted, got)), float(len(wanted)))
    return out


def edits(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein distance in symbols."""
    if not hypothesis:
        return len(reference)
    # jiwer reads words: every symbol becomes one
    result = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    return result.substitutions + result.deletions + result.insertions

"""`translation`: chrF of the answer against the row's reference, in [0, 1].

sacrebleu's sentence chrF (character 6-grams, beta 2, no word n-grams, version-stable signature),
divided by 100. An empty reference is unscorable. Source: Popovic 2015, "chrF".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@dataclass(frozen=True)
class Translation:
    """Compares the answer with the reference translation."""

    name: str = "translation"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.task is not Task.TRANSLATION:
            reason = f"task {row.task.value!r} has no translation"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        if not row.answer.strip():
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "the reference is empty")
        _, answer = split_thinking(completion.text)
        value = _chrf().sentence_score(answer, [row.answer.strip()]).score / 100
        return RewardResult(value, {"chrf": 100 * value})

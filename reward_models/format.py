"""`format`: a closed thought, then a non-empty answer. Worth at most 0.2 in any recipe."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult


@dataclass(frozen=True)
class Format:
    """1 for one `</think>` with text on both sides, else 0; a missing `<think>` is tolerated."""

    name: str = "format"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        thought, answer = split_thinking(completion.text)
        once = completion.text.count("</think>") == 1 and completion.text.count("<think>") <= 1
        value = float(once and bool(thought) and bool(answer))
        return RewardResult(value, {"well_formed": value})

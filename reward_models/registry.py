"""Names to rewards, and their weighted sum. Adding a reward: one file and one line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.types import Completion, Reward, RewardResult, RewardStatus
from reward_models.choice import Choice
from reward_models.format import Format
from reward_models.grounding import TimestampGrounding

REWARDS: dict[str, Callable[[], Reward]] = {
    "timestamp_grounding": TimestampGrounding,
    "choice": Choice,
    "format": Format,
}


@dataclass(frozen=True)
class Term:
    """A reward, its weight, and whether a value of 0 or less zeroes the sum."""

    reward: Reward
    weight: float = 1.0
    gate: bool = False


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i * value_i over the terms that apply to the row; itself a `Reward`.

    A term that is unscorable for the row is left out. The sum is unscorable when all terms are,
    truncated when the completion is (unless `score_truncated`), and errored when one term raised
    or returned a value that is not finite: never a number in its place.
    """

    terms: tuple[Term, ...]
    score_truncated: bool = False
    name: str = "reward"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if completion.truncated and not self.score_truncated:
            return RewardResult(None, {}, RewardStatus.TRUNCATED, "cut at max_completion_length")
        breakdown: dict[str, float] = {}
        total, scored, gated = 0.0, 0, False
        for term in self.terms:
            result = call_safely(term.reward, row, completion)
            if result.status is RewardStatus.ERRORED:
                return result
            if result.value is None:
                continue
            scored += 1
            breakdown[term.reward.name] = result.value
            breakdown |= {f"{term.reward.name}/{k}": v for k, v in result.breakdown.items()}
            total += term.weight * result.value
            gated |= term.gate and result.value <= 0
        if scored == 0:
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "no reward applies to the row")
        return RewardResult(0.0 if gated else total, breakdown)


def call_safely(reward: Reward, row: Row, completion: Completion) -> RewardResult:
    """The reward's result; an exception or a value that is not finite becomes `errored`."""
    try:
        result = reward(row, completion)
    except Exception as error:
        reason = f"{reward.name} on row {row.id!r}: {type(error).__name__}: {error}"
        return RewardResult(None, {}, RewardStatus.ERRORED, reason)
    if result.value is not None and not math.isfinite(result.value):
        reason = f"{reward.name} on row {row.id!r}: value {result.value}; must be finite"
        return RewardResult(None, {}, RewardStatus.ERRORED, reason)
    return result


def check_scorable(reward: WeightedSum, rows: Iterable[Row]) -> None:
    """Every row is scored by a reward that reads the content; else its form alone would train.

    Raises:
        ValueError: the row, its task, and what to do.
    """
    contents = [term.reward for term in reward.terms if not isinstance(term.reward, Format)]
    for row in rows:
        reference = Completion((), (), row.answer, "stop", 0)
        results = [call_safely(content, row, reference) for content in contents]
        if all(result.status is RewardStatus.UNSCORABLE for result in results):
            named = zip(contents, results, strict=True)
            reasons = "; ".join(f"{content.name}: {result.reason}" for content, result in named)
            raise ValueError(
                f"row {row.id!r} of task {row.task.value!r}: no reward but `format` scores it "
                f"({reasons or 'none is on'}); keep such rows out with data.train.NAME.tasks, or "
                "add a reward for the task"
            )


def build_rewards(
    weights: Mapping[str, tuple[float, bool]], *, score_truncated: bool = False
) -> WeightedSum:
    """The sum that a recipe asks for.

    Args:
        weights: reward name -> (weight, gate).

    Raises:
        ValueError: unknown name.
    """
    for name in weights:
        if name not in REWARDS:
            raise ValueError(f"rewards.{name}: unknown reward; known: {', '.join(REWARDS)}")
    terms = (Term(REWARDS[name](), weight, gate) for name, (weight, gate) in weights.items())
    return WeightedSum(tuple(terms), score_truncated)

"""Names to rewards, and their gated sum. Adding a reward: one file and one line here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from posttrain.data.rows import Row
from posttrain.types import (
    AnswerScorer,
    AudioTextScorer,
    Completion,
    Reward,
    RewardResult,
    RewardStatus,
)
from reward_models.audio_text import AudioTextGrounding
from reward_models.chain import ChainGrounding
from reward_models.choice import Choice
from reward_models.evidence import EvidenceAblation
from reward_models.format import Format
from reward_models.grounding import TimestampGrounding
from reward_models.length_band import LengthBand
from reward_models.names import FORM_ONLY
from reward_models.prior import BlindPrior
from reward_models.repetition import Repetition
from reward_models.transcript import Transcript
from reward_models.translation import Translation

REWARDS: dict[str, type] = {
    "timestamp_grounding": TimestampGrounding,
    "chain_grounding": ChainGrounding,
    "choice": Choice,
    "transcript": Transcript,
    "translation": Translation,
    "format": Format,
    "length_band": LengthBand,
    "repetition": Repetition,
    "evidence_ablation": EvidenceAblation,
    "audio_text_grounding": AudioTextGrounding,
}
SUPPLIED = ("prior", "scorer", "similarity", "name")
"""Arguments that the program gives and no recipe sets."""


@dataclass(frozen=True)
class RewardSpec:
    """What a recipe says of one reward.

    Attributes:
        gate: name of another reward of the recipe; this term counts only where that one is
            scored above 0.
        path: `package.module:name` of a reward of your own.
        options: arguments of the reward, such as {"packed": "accept"}.
    """

    weight: float = 1.0
    gate: str | None = None
    path: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardContext:
    """What rewards need beside their options; learned ones get their model from here."""

    prior: BlindPrior = field(default_factory=BlindPrior)
    audio_text: AudioTextScorer | None = None
    evidence: AnswerScorer | None = None


@dataclass(frozen=True)
class Term:
    """A reward, its weight, and the name of the reward that gates it."""

    reward: Reward
    weight: float = 1.0
    gate: str | None = None


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i * value_i over the terms that apply to the row; itself a `Reward`.

    A term that is unscorable for the row is left out; so is one whose gate is not open, with 0 in
    its place. The sum is unscorable when no term that looks at the content applies.

    A truncated completion is, by `truncated`, left out ("drop"), worth 0 at most ("0": terms below
    0 stay, so that never ending pays no more than ending wrongly) or scored like any other
    ("score"). A term that raised, or returned a value that is not finite, makes the sample errored:
    never a number in its place.
    """

    terms: tuple[Term, ...]
    truncated: str = "drop"
    name: str = "reward"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if completion.truncated and self.truncated == "drop":
            return RewardResult(None, {}, RewardStatus.TRUNCATED, "cut at max_completion_length")
        results: dict[str, RewardResult] = {}
        for term in self.terms:
            result = call_safely(term.reward, row, completion)
            if completion.truncated and self.truncated == "0":
                result = _at_most_zero(result)
            results[term.reward.name] = result
            if result.status is RewardStatus.ERRORED:
                return result
        breakdown: dict[str, float] = {}
        total = 0.0
        for term in self.terms:
            name, result = term.reward.name, results[term.reward.name]
            if result.value is None:
                continue
            is_open = term.gate is None or (results[term.gate].value or 0.0) > 0
            breakdown[name] = result.value * is_open
            breakdown |= {f"{name}/{key}": value for key, value in result.breakdown.items()}
            total += term.weight * result.value * is_open
        contents = [t for t in self.terms if t.weight and t.reward.name not in FORM_ONLY]
        if not breakdown or (contents and not any(t.reward.name in breakdown for t in contents)):
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "no reward applies to the row")
        return RewardResult(total, breakdown)

    @property
    def weights(self) -> dict[str, float]:
        return {term.reward.name: term.weight for term in self.terms}


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


def _at_most_zero(result: RewardResult) -> RewardResult:
    if result.value is None:
        return result
    return replace(result, value=min(0.0, result.value))


def check_scorable(reward: WeightedSum, rows: Iterable[Row]) -> None:
    """Every row is scored by a reward that reads the content; else its form alone would train.

    Raises:
        ValueError: the row, its task, and what to do.
    """
    contents = [t.reward for t in reward.terms if t.reward.name not in FORM_ONLY and t.weight]
    for row in rows:
        reference = Completion((), (), row.answer, "stop", 0)
        results = [call_safely(content, row, reference) for content in contents]
        if all(result.status is RewardStatus.UNSCORABLE for result in results):
            named = zip(contents, results, strict=True)
            reasons = "; ".join(f"{content.name}: {result.reason}" for content, result in named)
            raise ValueError(
                f"row {row.id!r} of task {row.task.value!r}: no reward but "
                f"{' or '.join(f'`{name}`' for name in FORM_ONLY)} scores it "
                f"({reasons or 'none is on'}); keep such rows out with data.train.NAME.tasks, or "
                "add a reward for the task"
            )


def build_rewards(
    specs: Mapping[str, RewardSpec], context: RewardContext | None = None, *,
    truncated: str = "drop",
) -> WeightedSum:  # fmt: skip
    """The sum that a recipe asks for.

    Args:
        specs: reward name -> what the recipe says of it.
        context: prior and models.

    Raises:
        ValueError: unknown name, option or gate; names the key and the known ones.
    """
    context = context or RewardContext()
    terms = []
    for name, spec in specs.items():
        if spec.gate is not None and (spec.gate not in specs or spec.gate == name):
            others = ", ".join(other for other in specs if other != name) or "none"
            raise ValueError(
                f"rewards.{name}.gate={spec.gate}: must name another reward of the recipe; "
                f"others: {others}"
            )
        terms.append(Term(build_reward(name, spec, context), spec.weight, spec.gate))
    return WeightedSum(tuple(terms), truncated)


def build_reward(name: str, spec: RewardSpec, context: RewardContext) -> Reward:
    """One reward with its options.

    Raises:
        ValueError: unknown name or option, or a model that is not there.
    """
    if spec.path is not None:
        return load_reward(name, spec.path, spec.options)
    if name not in REWARDS:
        raise ValueError(
            f"rewards.{name}: unknown reward; known: {', '.join(REWARDS)}, or give "
            f"rewards.{name}.path=package.module:function"
        )
    kind = REWARDS[name]
    known = {f.name for f in fields(kind) if not f.name.startswith("_")} - set(SUPPLIED)
    options = {k: v for k, v in spec.options.items() if k not in SERVICE_OPTIONS.get(name, ())}
    for option in options:
        if option not in known:
            known_here = sorted(known | set(SERVICE_OPTIONS.get(name, ())))
            raise ValueError(
                f"rewards.{name}.options.{option}: unknown option; known: {known_here}"
            )
    arguments = options | _supplied(name, context)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"rewards.{name}.options={dict(options)}: {error}") from error


SERVICE_OPTIONS = {
    "audio_text_grounding": ("head", "checkpoint", "device", "max_batch"),
    "evidence_ablation": ("checkpoint", "device"),
}
"""Options that say where a reward's model runs; read by whoever starts it."""


def _supplied(name: str, context: RewardContext) -> dict[str, Any]:
    if name == "timestamp_grounding":
        return {"prior": context.prior}
    models = {"audio_text_grounding": context.audio_text, "evidence_ablation": context.evidence}
    if name not in models:
        return {}
    if models[name] is None:
        raise ValueError(f"rewards.{name}: needs a model, and none is served here")
    return {"scorer": models[name]}


@dataclass(frozen=True)
class UserReward:
    """A function of your own as a `Reward`: it returns a number, None, or a `RewardResult`."""

    function: Callable[..., Any]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        value = self.function(row, completion, **self.options)
        if isinstance(value, RewardResult):
            return value
        if value is None:
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, f"{self.name} gave None")
        return RewardResult(float(value))


def load_reward(name: str, path: str, options: Mapping[str, Any]) -> Reward:
    """The reward at `package.module:name`: a function `(row, completion, **options)`, or a class
    that is built with the options and called so.

    Raises:
        ValueError: no such module or name, or not callable.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"rewards.{name}.path={path}: write package.module:function")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards.{name}.path={path}: {error}; is it on PYTHONPATH?") from error
    if not callable(target):
        raise ValueError(f"rewards.{name}.path={path}: {type(target).__name__} is not callable")
    if isinstance(target, type):
        built: Any = target(**options)
        return UserReward(built, name)
    return UserReward(target, name, dict(options))


def with_prior(reward: WeightedSum, rows: Sequence[Row]) -> tuple[WeightedSum, BlindPrior | None]:
    """`reward` with its blind prior fitted on training rows; None where no term uses one."""
    for term in reward.terms:
        if isinstance(term.reward, TimestampGrounding):
            prior = term.reward.fit(rows)
            return _replace_prior(reward, prior), prior
    return reward, None


def _replace_prior(reward: WeightedSum, prior: BlindPrior) -> WeightedSum:
    terms = tuple(
        replace(t, reward=replace(t.reward, prior=prior))
        if isinstance(t.reward, TimestampGrounding)
        else t
        for t in reward.terms
    )
    return replace(reward, terms=terms)

"""From a recipe's `rewards:` to the function that scores: prior, models, gates, clocks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.rows import Row
from posttrain.model.audio_text import load_head
from posttrain.schema import Recipe
from posttrain.train.reward_workers import (
    ActorAnswerScorer,
    ActorAudioTextScorer,
    AudioTextActor,
    EvidenceActor,
    start_actor,
)
from posttrain.types import RewardResult, RewardStatus
from reward_models.prior import BlindPrior
from reward_models.registry import (
    RewardContext,
    RewardSpec,
    WeightedSum,
    build_rewards,
    check_scorable,
    with_prior,
)


def specs_of(recipe: Recipe) -> dict[str, RewardSpec]:
    return {
        name: RewardSpec(term.weight, term.gate, term.path, dict(term.options))
        for name, term in recipe.rewards.items()
    }


class _NotStarted:
    """Stands for a model that is started later; asking it is a mistake."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the reward's model has not been started; {name} was asked")


def check_rewards(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Builds the rewards once before anything heavy starts: options, gates, files, rows.

    Raises:
        ValueError, FileNotFoundError: the key, and what to do.
    """
    stand_in: Any = _NotStarted()
    context = RewardContext(audio_text=stand_in, evidence=stand_in)
    reward = build_rewards(specs_of(recipe), context, truncated=recipe.scoring.truncated)
    if "audio_text_grounding" in recipe.rewards:
        load_head(_head_folder(recipe.rewards["audio_text_grounding"].options))
    if recipe.scoring.prior is not None:
        BlindPrior.load(recipe.scoring.prior)
    check_scorable(reward, rows)


def _head_folder(options: Mapping[str, Any]) -> str:
    if not options.get("head"):
        raise ValueError(
            "rewards.audio_text_grounding.options.head: give the folder of a trained head, the "
            "`reward_model` folder of a run of recipes/reward_grounding.yaml"
        )
    return str(options["head"])


def recipe_rewards(recipe: Recipe, rows: Sequence[Row], run_dir: Path) -> WeightedSum:
    """The recipe's rewards with their models started; the blind prior is saved as prior.json."""
    context = RewardContext(
        prior=BlindPrior.load(recipe.scoring.prior) if recipe.scoring.prior else BlindPrior(),
        audio_text=_audio_text(recipe),
        evidence=_evidence(recipe),
    )
    reward = build_rewards(specs_of(recipe), context, truncated=recipe.scoring.truncated)
    saved = run_dir / "prior.json"
    if recipe.scoring.prior is not None:
        context.prior.save(saved)
        return reward
    reward, prior = with_prior(reward, rows)
    if prior is not None:
        prior.save(saved)
    return reward


def _audio_text(recipe: Recipe) -> ActorAudioTextScorer | None:
    if "audio_text_grounding" not in recipe.rewards:
        return None
    options = recipe.rewards["audio_text_grounding"].options
    device = str(options.get("device", "cpu"))
    head = str(Path(_head_folder(options)).resolve())
    checkpoint = options.get("checkpoint") or load_head(head)[1]
    if Path(checkpoint).exists():
        checkpoint = str(Path(checkpoint).resolve())
    max_batch = int(options.get("max_batch", 64))
    return ActorAudioTextScorer(
        start_actor(AudioTextActor, device, _threads(), head, checkpoint, device, max_batch)
    )


def _evidence(recipe: Recipe) -> ActorAnswerScorer | None:
    if "evidence_ablation" not in recipe.rewards:
        return None
    options = recipe.rewards["evidence_ablation"].options
    device = str(options.get("device", "cpu"))
    checkpoint = str(options.get("checkpoint") or recipe.model.path)
    return ActorAnswerScorer(
        start_actor(EvidenceActor, device, _threads(), checkpoint, device, recipe.model.dtype)
    )


def _threads() -> int:
    return os.cpu_count() or 1


def errors_of(results: Sequence[Sequence[RewardResult]], policy: str) -> dict[str, float]:
    """How many completions errored, as a metric.

    Raises:
        RuntimeError: under `scoring.errored: stop`, or when not one completion could be scored;
            the first reason is quoted.
    """
    flat = [result for line in results for result in line]
    errors = [r.reason for r in flat if r.status is RewardStatus.ERRORED]
    if errors and (policy == "stop" or len(errors) == len(flat)):
        raise RuntimeError(f"{len(errors)} completions could not be scored; first: {errors[0]}")
    return {"reward/errored": float(len(errors))}

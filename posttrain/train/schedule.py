"""Learning-rate schedules as pure functions of the step. No torch."""

from __future__ import annotations

import math

from posttrain.schema import Recipe


def lr_factor(recipe: Recipe, step: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0)."""
    training = recipe.training
    warmup = math.ceil(training.warmup_ratio * training.max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, training.max_steps - warmup)
    if training.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if training.lr_scheduler_type == "linear" else 1.0

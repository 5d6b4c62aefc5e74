"""`posttrain data select`: rows that a model gets right sometimes, and not without hearing them.

    rows --> 8 samples each, and 8 with a silent clip --> share right --> kept, or why not

A row that is always right or always wrong teaches GRPO nothing; one that silence answers as well
teaches guessing. Samples lie in chunks beside the output, so an interrupted selection goes on.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_recipes.temporal_cot import ChainSettings, all_asked, answer_score, asked_rows, collect
from posttrain.data.rows import Row, read_rows, write_rows
from posttrain.rollout.chain_teachers import ListeningTeacher
from posttrain.schema import Recipe
from posttrain.train.resources import ray_session, serving

RIGHT = 0.5
RANGE = re.compile(r"^(\d*\.?\d+)\.\.(\d*\.?\d+)$")


def pass_rate_range(text: str) -> tuple[float, float]:
    """ "0.375..0.75" as (0.375, 0.75).

    Raises:
        ValueError: not such a range, or not within 0 to 1.
    """
    match = RANGE.match(text)
    low, high = (float(match[1]), float(match[2])) if match else (1.0, 0.0)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--pass-rate {text}: give a range such as 0.375..0.75")
    return low, high


def select_rows(
    source: Path, out: Path, recipe: Recipe, limits: tuple[float, float], *, samples: int,
    blind_share: float,
) -> dict[str, Any]:  # fmt: skip
    """Writes the rows that are kept, with their shares in `metadata.selection`; returns counts.

    Args:
        recipe: model and engine to ask with.
        blind_share: highest share of answers to silence that may be right.
    """
    rows = read_rows(source)
    settings = ChainSettings(num_chains=samples, blind_samples=samples, seed=recipe.seed)
    folder = out.with_name(f"{out.stem}.samples")
    teacher = ListeningTeacher(
        recipe.model.path, recipe.sampling.temperature, recipe.sampling.max_completion_length
    )
    if not all_asked(rows, teacher.name, settings, folder):
        with ray_session(recipe), serving(recipe) as teacher.pool:
            collect(rows, teacher, settings, folder)
    kept: list[Row] = []
    reasons: Counter[str] = Counter()
    for row, said, blind in asked_rows(rows, settings, folder):
        scores = [[answer_score(row, c) for c in answers] for answers in (said, blind)]
        if None in scores[0]:
            reasons["nothing to judge the answer by"] += 1
            continue
        right, guessed = (
            sum((score or 0.0) >= RIGHT for score in part) / len(part) for part in scores
        )
        if guessed > blind_share:
            reasons["silence answers it as well"] += 1
        elif right < limits[0]:
            reasons["too hard"] += 1
        elif right > limits[1]:
            reasons["too easy"] += 1
        else:
            shares = {"pass_rate": right, "blind_pass_rate": guessed, "model": recipe.model.path}
            kept.append(replace(row, metadata=dict(row.metadata) | {"selection": shares}))
    if not kept:
        raise ValueError(
            f"{source}: none of {len(rows)} rows kept ({dict(reasons)}); widen --pass-rate"
        )
    write_rows(out, kept)
    return {"rows": len(rows), "kept": len(kept), "left_out": dict(reasons)}

"""A ladder: recipes one after the other, each from where the one before ended, on the same rows.

    base --stage 1--> checkpoint --stage 2--> checkpoint ...      every one scored on data.held_out

    posttrain run recipes/nano/ladder.yaml

Stages are ordinary runs in RUN/stages/NAME; finished ones are not run again. A stage starts from
the model that the one before was scored with, so those answers are taken over, and get its rewards.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.config import load_recipe
from posttrain.evaluate.row_metrics import UNMEASURED
from posttrain.recipe_rules import TRAINING_KINDS, validate
from posttrain.schema import Recipe
from posttrain.train.batches import held_out_rows
from posttrain.train.final_model import model_of
from posttrain.train.kinds import run_recipe
from posttrain.train.run_folder import RunFolder
from posttrain.types import GateFailed
from reward_models.names import REWARD_NAMES


def climb(recipe: Recipe) -> Path:
    """Runs, or continues, all stages; returns the run folder.

    Raises:
        GateFailed: a stage did not pass its gates; the next one does not start from it.
    """
    stages = stage_recipes(recipe, Path(recipe.output_dir))
    _check_measurable(recipe)
    run = RunFolder(recipe)
    started = time.monotonic()
    model = recipe.model.path
    records: list[dict[str, Any]] = []
    previous: str | None = None
    for name in stages:
        folder = run.path / "stages" / name
        if not (folder / "summary.json").exists():
            Console().rule(f"{run.path.name}: {name}")
            stage = stage_recipes(recipe, run.path, model)[name]
            if previous:
                known = run.path / "stages" / previous / "held_out" / "after.json"
                alike = answers_alike(stage, stages[previous])
                stage.evaluation = replace(stage.evaluation, before=str(known) if alike else None)
            run_recipe(stage)
        summary = json.loads((folder / "summary.json").read_text())
        if failed := [gate["name"] for gate in summary.get("gates", ()) if not gate["passed"]]:
            raise GateFailed(f"stage {name}: {', '.join(failed)} (run folder: {folder})")
        compared = summary["held_out"]
        score = {when: compared[when][compared["metric"]] for when in ("before", "after")}
        if not records:
            records.append({"name": "base", "score": score["before"], "model": model})
        model, previous = model_of(str(folder)), name
        records.append({
            "name": name, "score": score["after"], "paired_diff": compared["paired_diff"],
            "before": compared["before"], "after": compared["after"], "model": model,
            "wall_s": summary.get("wall_s"),
        })  # fmt: skip
    summary = {
        "run": run.path.name, "kind": "ladder", "metric": compared["metric"], "n": compared["n"],
        "seed": recipe.seed, "stages": records, "wall_s": round(time.monotonic() - started, 1),
    }  # fmt: skip
    run.finish(summary)
    show(summary)
    return run.path


def stage_recipes(recipe: Recipe, out: Path, model: str | None = None) -> dict[str, Recipe]:
    """Every stage's recipe, checked; all of them before the first starts.

    Raises:
        ValueError: the stage's file or key, the value and the fix.
    """
    shared = [f"seed={recipe.seed}", f"output_dir={out / 'stages'}"]
    stages = {}
    for name, stage in recipe.stages.items():
        own = [f"run_name={name}", f"model.path={model or recipe.model.path}", *stage.overrides]
        one = load_recipe(stage.recipe, [*shared, *own])
        one.data.held_out, one.data.reported = recipe.data.held_out, recipe.data.reported
        one.evaluation = recipe.evaluation
        validate(one, REWARD_NAMES)
        if one.kind not in TRAINING_KINDS:
            raise ValueError(
                f"stages.{name}.recipe={stage.recipe}: kind={one.kind} trains no policy; a stage "
                f"is one of {', '.join(TRAINING_KINDS)}"
            )
        stages[name] = one
    return stages


def _check_measurable(recipe: Recipe) -> None:
    evaluated = held_out_rows(recipe)
    rows = [row for name in recipe.data.held_out for row in evaluated[name]]
    if all(row.task in UNMEASURED for row in rows):
        raise ValueError(
            f"data.held_out: {len(rows)} rows of tasks without a metric "
            f"({', '.join(UNMEASURED)}); a ladder needs others to score its stages on"
        )


def answers_alike(stage: Recipe, previous: Recipe) -> bool:
    """Whether both stages get the same answers from a model; rewards are given anew."""

    def settings(recipe: Recipe) -> tuple[object, ...]:
        return recipe.sampling.max_completion_length, recipe.rollout, recipe.model.dtype

    return settings(stage) == settings(previous)


def show(summary: dict[str, Any]) -> None:
    table = Table(title=f"{summary['run']}: held-out {summary['metric']}, n={summary['n']}, greedy")
    for column in ("stage", summary["metric"], "against the stage before, 95 %", "minutes"):
        table.add_column(column)
    for stage in summary["stages"]:
        gain = ""
        if "paired_diff" in stage:
            low, high = stage["paired_diff"]["ci95"]
            gain = f"{stage['paired_diff']['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        minutes = f"{stage['wall_s'] / 60:.1f}" if stage.get("wall_s") else ""
        table.add_row(stage["name"], f"{stage['score']:.3f}", gain, minutes)
    Console().print(table)

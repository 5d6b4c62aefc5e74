"""A run's gates: judged on its held-out answers, written beside its checkpoint, enforced."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from posttrain.evaluate import held_out
from posttrain.evaluate.gates import GateResult, failures, judge_gates
from posttrain.schema import Recipe
from posttrain.train.progress import Progress
from posttrain.train.run_folder import RunFolder, finite
from posttrain.types import GateFailed


def check_gates(recipe: Recipe, run: RunFolder) -> None:
    """Whether every gate's source has its metric, as soon as the starting model was evaluated.

    Raises:
        ValueError: one has not; correct the recipe and start again, gates may change on the way.
    """
    before = _metrics(run, "before")
    if before is not None:
        judge_gates(recipe.gates, before, before)


def gate_records(recipe: Recipe, run: RunFolder) -> list[dict[str, Any]]:
    """The gates of summary.json."""
    return [asdict(result) | {"passed": result.passed} for result in _judged(recipe, run)]


def refuse_failed_gates(recipe: Recipe, run: RunFolder, progress: Progress) -> None:
    """Writes `gates.json` into the last checkpoint and says how each gate went.

    Raises:
        GateFailed: one was not passed.
    """
    results = _judged(recipe, run)
    checkpoint = run.checkpoints.latest()
    if results and checkpoint is not None:
        records = json.dumps(finite(gate_records(recipe, run)), indent=1)
        (checkpoint.path / "gates.json").write_text(records + "\n")
        for result in results:
            progress.write(f"gate {result.line()}")
    if failed := failures(results):
        raise GateFailed(f"{failed} (run folder: {run.path})")


def _judged(recipe: Recipe, run: RunFolder) -> list[GateResult]:
    before, after = (_metrics(run, when) for when in ("before", "after"))
    if before is None or after is None:
        return []
    return judge_gates(recipe.gates, before, after)


def _metrics(run: RunFolder, when: str) -> dict[str, dict[str, float]] | None:
    record = run.load_json(f"held_out/{when}.json")
    return None if record is None else held_out.means_by_source(record)

"""A run's folder: what happened, readable by people and by the next start.

runs/NAME/  recipe.yaml  metrics.jsonl  rollouts.jsonl  summary.json  checkpoints/  tensorboard/
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.config import to_yaml
from posttrain.data.rows import Row
from posttrain.schema import Recipe
from posttrain.types import Group, RewardResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its folder, the steps done, and the policy version."""

    path: Path
    step: int
    policy_version: int


class RunFolder:
    """Opens or continues `output_dir/run_name`.

    A finished run is never overwritten (NAME-2, NAME-3, ...); an unfinished one is continued under
    `resume: auto`. Files are appended to; lines of steps after the checkpoint are dropped first.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.path, self.resumed = _choose(recipe)
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.latest_checkpoint() if self.resumed else None
        self.recipe = recipe
        if self.resumed:
            _refuse_changed_recipe(self.path / "recipe.yaml", recipe)
        else:
            (self.path / "recipe.yaml").write_text(to_yaml(recipe))
        done = self.checkpoint.step if self.checkpoint else 0
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            _keep_lines_until(self.path / name, done)
        self.sinks = _open_sinks(recipe, self.path)

    @property
    def steps_done(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends to metrics.jsonl, then to every reporter; a reporter's failure is a warning."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with (self.path / "metrics.jsonl").open("a") as out:
            out.write(json.dumps({"step": step, "time_s": time.time(), **finite}) + "\n")
        for sink in self.sinks:
            try:
                sink.log(metrics, step)
            except Exception as error:
                log.warning("%s failed and is skipped: %s", type(sink).__name__, error)

    def log_rollouts(
        self, rows: Sequence[Row], groups: Sequence[Group],
        results: Sequence[Sequence[RewardResult]], step: int,
    ) -> None:  # fmt: skip
        with (self.path / "rollouts.jsonl").open("a") as out:
            for row, group, scores in zip(rows, groups, results, strict=True):
                for index, (completion, score) in enumerate(
                    zip(group.completions, scores, strict=True)
                ):
                    record = {
                        "step": step, "group_id": group.group_id, "index": index,
                        "prompt_id": row.id, "prompt": list(row.prompt), "audio": row.audio,
                        "completion": completion.text, "num_tokens": completion.num_tokens,
                        "finish_reason": completion.finish_reason, "reward": score.value,
                        "status": score.status.value, "reason": score.reason,
                        "breakdown": dict(score.breakdown),
                        "policy_version": completion.policy_version, "worker": group.worker,
                        "attempts": group.attempts,
                    }  # fmt: skip
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")

    def new_checkpoint(self, step: int) -> Path:
        """A folder to fill; `finish_checkpoint` makes it count."""
        partial = self.path / "checkpoints" / f".step-{step:06d}.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def finish_checkpoint(self, partial: Path, step: int, policy_version: int) -> Checkpoint:
        """Renames the folder into place (atomic) and removes what exceeds `save_total_limit`."""
        state = {"step": step, "policy_version": policy_version}
        (partial / "state.json").write_text(json.dumps(state) + "\n")
        final = self.path / "checkpoints" / f"step-{step:06d}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        limit = self.recipe.training.save_total_limit
        for old in sorted((self.path / "checkpoints").glob("step-*"))[: -limit if limit else 0]:
            shutil.rmtree(old)
        return Checkpoint(final, step, policy_version)

    def latest_checkpoint(self) -> Checkpoint | None:
        folders = sorted((self.path / "checkpoints").glob("step-*"))
        if not folders:
            return None
        state = json.loads((folders[-1] / "state.json").read_text())
        return Checkpoint(folders[-1], state["step"], state["policy_version"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which marks the run as finished."""
        partial = self.path / ".summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, self.path / "summary.json")
        for sink in self.sinks:
            sink.close()

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def save_json(self, name: str, content: Any) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)

    def load_json(self, name: str) -> Any | None:
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None


def _choose(recipe: Recipe) -> tuple[Path, bool]:
    """(folder, whether an unfinished run is continued there)."""
    base = Path(recipe.output_dir)
    name = str(recipe.run_name)
    candidates: Iterable[str] = (name, *(f"{name}-{n}" for n in range(2, 1_000)))
    for candidate in candidates:
        path = base / candidate
        if not (path / "recipe.yaml").exists():
            return path, False
        if not (path / "summary.json").exists() and recipe.resume == "auto":
            return path, True
    raise ValueError(f"run_name={name}: 999 runs of this name in {base}; choose another")


FREE_TO_CHANGE = {"resume", "report_to", "output_dir", "rollout"}


def _refuse_changed_recipe(path: Path, recipe: Recipe) -> None:
    """An unfinished run goes on only with the recipe that it was started with."""
    from omegaconf import OmegaConf

    before = OmegaConf.to_container(OmegaConf.load(path))
    now = asdict(recipe)
    changed = [k for k in now if k not in FREE_TO_CHANGE and before.get(k) != now[k]]
    if changed:
        raise ValueError(
            f"{path.parent}: unfinished run with another {changed[0]!r} section; set "
            "resume=never for a new run, or another run_name"
        )


def _keep_lines_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped a line cut off by an interruption", path)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    os.replace(partial, path)


def _open_sinks(recipe: Recipe, path: Path) -> list[Any]:
    from posttrain.train.sinks import SINKS

    sinks = []
    for name in recipe.report_to:
        try:
            sinks.append(SINKS[name](recipe, path))
        except Exception as error:
            log.warning("report_to=%s cannot start and is skipped: %s", name, error)
    return sinks

"""A run's folder: what happened, readable by people and by the next start.

runs/NAME/  recipe.yaml  environment.json  data.json  metrics.jsonl  rollouts.jsonl  summary.json
            held_out/  checkpoints/  tensorboard/
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain.config import to_yaml
from posttrain.data.rows import Row
from posttrain.evaluate.held_out import check_rows, rescored
from posttrain.schema import Recipe
from posttrain.train.checkpoints import Checkpoints
from posttrain.train.environment import data_files, environment
from posttrain.types import Group, Reward, RewardResult

log = logging.getLogger(__name__)


class RunFolder:
    """Opens or continues `output_dir/run_name`.

    A finished run is never overwritten (NAME-2, NAME-3, ...); an unfinished one is continued under
    `resume: auto`. Files are appended to; lines of steps after the checkpoint are dropped first,
    all of them where there is none: the recipe may have changed.
    """

    def __init__(self, recipe: Recipe) -> None:
        known = recipe.evaluation.before
        if known and not Path(known).is_file():
            raise ValueError(f"evaluation.before={known}: no such file; null asks the model itself")
        self.path, self.resumed = _choose(recipe)
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(self.path, recipe.training.save_total_limit)
        self.checkpoint = self.checkpoints.latest() if self.resumed else None
        self.recipe = recipe
        data = data_files(recipe.data)
        if self.checkpoint or (self.resumed and recipe.kind in WITHOUT_CHECKPOINT):
            _refuse_changed_recipe(self.path / "recipe.yaml", recipe)
            _refuse_changed_data(self.path, self.load_json("data.json") or {}, data)
        (self.path / "recipe.yaml").write_text(to_yaml(recipe))
        self.save_json("environment.json", environment(recipe.model.path))
        self.save_json("data.json", data)
        done = self.steps_done
        _drop_later_evaluations(self.path / "held_out", done, keep_before=bool(self.checkpoint))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            _keep_lines_until(self.path / name, done if self.checkpoint else -1)
        self.sinks = _open_sinks(recipe, self.path)

    @property
    def steps_done(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def has_answers(
        self, when: str, step: int, rows: Mapping[str, Sequence[Row]], reward: Reward | None
    ) -> bool:
        """Whether `held_out/WHEN.json` is there, or could be taken over from `evaluation.before`.

        Raises:
            ValueError: its answers are to other rows.
        """
        name = f"held_out/{when}.json"
        kept = self.load_json(name)
        if kept and kept["step"] == step:
            check_rows(kept, rows)
            return True
        known = self.recipe.evaluation.before
        if when != "before" or not known:
            return False
        record = json.loads(Path(known).read_text()) | {"step": step}
        check_rows(record, rows)
        self.save_json(name, rescored(record, rows, reward, self.recipe.scoring.timeout_s))
        return True

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends to metrics.jsonl, then to every reporter; a reporter's failure is a warning."""
        record = {"step": step, "time_s": time.time(), **metrics}
        with (self.path / "metrics.jsonl").open("a") as out:
            out.write(json.dumps(finite(record), allow_nan=False) + "\n")
        for sink in self.sinks:
            try:
                sink.log(metrics, step)
            except Exception as error:
                log.warning("%s failed and is skipped: %s", type(sink).__name__, error)

    def log_rollouts(
        self, rows: Sequence[Row], groups: Sequence[Group],
        results: Sequence[Sequence[RewardResult]], step: int,
    ) -> None:  # fmt: skip
        with (self.path / "rollouts.jsonl").open("a", encoding="utf-8") as out:
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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, which marks the run as finished."""
        partial = self.path / ".summary.json.partial"
        partial.write_text(json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
        os.replace(partial, self.path / "summary.json")
        for sink in self.sinks:
            sink.close()

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as lines:  # a text may hold U+2028: no splitlines()
            return [json.loads(line) for line in lines]

    def save_json(self, name: str, content: Any) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n")
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


WITHOUT_CHECKPOINT = ("ladder", "distill")  # kinds that do lasting work before there is one
FREE_TO_CHANGE = (
    "resume", "report_to", "output_dir", "rollout.", "training.max_steps", "training.learning_rate",
    "training.save_", "training.eval_steps", "training.max_skipped_steps",
    "evaluation.bootstrap_samples", "evaluation.before", "gates",
)  # fmt: skip


def _refuse_changed_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on only with what it was started with, but for `FREE_TO_CHANGE`."""
    # an older posttrain did not write keys that are new: they had what is their default
    before = _leaves(asdict(Recipe())) | _leaves(OmegaConf.to_container(OmegaConf.load(path)))
    now = _leaves(asdict(recipe))
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new and not key.startswith(FREE_TO_CHANGE):
            raise ValueError(
                f"{path.parent}: unfinished run with {key}={old}, now {new}; set it back, or "
                "resume=never or another run_name for a new run"
            )


def _refuse_changed_data(
    run: Path, before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> None:
    """A run goes on only with the rows it was started with."""
    for key in before.keys() & now.keys():
        if before[key]["sha256"] != now[key]["sha256"]:
            raise ValueError(
                f"{run}: unfinished run, and {key} ({now[key]['path']}) has changed since it was "
                "started; put the old file back, or resume=never or another run_name for a new run"
            )


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        deeper = _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        out |= {f"{prefix}{key}": value} if deeper is None else deeper
    return out


def _drop_later_evaluations(folder: Path, done: int, *, keep_before: bool) -> None:
    """Evaluations of steps that will be trained again do not count."""
    for path in folder.glob("*.json"):
        if json.loads(path.read_text())["step"] > done or not keep_before:
            path.unlink()


def _keep_lines_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            log.warning("%s: dropped a line cut off by an interruption", path)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
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


def finite(value: Any) -> Any:
    """The same JSON value with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

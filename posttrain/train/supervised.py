"""Supervised runs: SFT and DPO.

    data.train --> DeepSpeed ranks (TRL's SFTTrainer, packed groups) --> checkpoint
                                                                            |
    data.held_out --> vLLM workers: greedy answers before and after <-------+

Try it:      posttrain run recipes/nano/sft.yaml       (2 cores, no GPU)
Full scale:  posttrain run recipes/sft.yaml            (LoRA, 8 GPUs), recipes/sft_full_zero3.yaml

Workers and ranks take turns on the same devices. What is evaluated afterwards is the checkpoint on
disk, loaded by vLLM, not the weights in memory.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from posttrain.data.rows import Row
from posttrain.evaluate import held_out
from posttrain.evaluate.fertility import as_lines, by_language
from posttrain.model.load import check_architecture, load_processor
from posttrain.schema import Recipe
from posttrain.train.batches import (
    held_out_rows,
    provenance_of,
    training_pairs,
    training_rows,
)
from posttrain.train.learner_group import LearnerGroup
from posttrain.train.objectives import bundled
from posttrain.train.progress import Progress
from posttrain.train.resources import check_gpus, device_of, num_gpus, ray_session, serving
from posttrain.train.rewards import check_rewards, recipe_rewards
from posttrain.train.run_folder import RunFolder
from posttrain.train.run_gates import check_gates, gate_records, refuse_failed_gates
from posttrain.train.supervised_rank import TRAINER_STATE, SupervisedRank, renamed
from posttrain.types import Reward

POLL_S = 1.0


def train(recipe: Recipe) -> Path:
    """Runs, or continues, an SFT or DPO recipe; returns the run folder.

    Raises:
        GateFailed: the run is done and a gate was not passed.
    """
    check_architecture(recipe.model.path)
    trained, facts = check_data(recipe)
    rows = held_out_rows(recipe, check=False)
    run = RunFolder(recipe)
    with ray_session(recipe):
        check_devices(recipe)
        SupervisedRun(recipe, run, trained, rows).all_phases(facts)
    return run.path


class SupervisedRun:
    """A run between its phases.

    Args:
        trained: rows that are learned; rewards fit their blind prior on them.
        rows: evaluated rows by source.
        started: on the monotonic clock, where work came before this; None: now.
    """

    def __init__(
        self, recipe: Recipe, run: RunFolder, trained: Sequence[Row], rows: dict[str, list[Row]],
        started: float | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.rows = recipe, run, rows
        self.started = time.monotonic() if started is None else started
        self.progress = Progress(recipe.run_name or recipe.kind)
        self.reward: Reward | None = None
        if recipe.rewards:
            check_rewards(recipe, trained)
            self.reward = recipe_rewards(recipe, trained, run.path)

    def all_phases(self, facts: dict[str, Any]) -> None:
        """Evaluate, train, evaluate, summarise, judge the gates."""
        for line in as_lines(facts.get("tokenizer", {})):
            self.progress.write(f"tokenizer {line}")
        self.evaluate("before", 0)
        check_gates(self.recipe, self.run)
        sizes = self.fit()
        self.evaluate("after", self.recipe.training.max_steps)
        self.finish(facts | sizes | {"wall_s": round(time.monotonic() - self.started, 1)})
        refuse_failed_gates(self.recipe, self.run, self.progress)

    def fit(self) -> dict[str, Any]:
        """All steps that are left; every step is logged here, by this process."""
        recipe, checkpoint = self.recipe, self.run.checkpoint
        if self.run.steps_done >= recipe.training.max_steps:
            return {}
        if checkpoint is not None:
            self._log_what_was_missed(checkpoint.path)
        device = device_of(recipe.learner.device, "learner.device")
        resume = str(checkpoint.path.resolve()) if checkpoint else None
        learners = LearnerGroup(recipe, device, SupervisedRank, max_concurrency=2)
        try:
            sizes = learners.build(resume)
            calls = [rank.train.remote(str(self.run.path.resolve()), resume)
                     for rank in learners.ranks]  # fmt: skip
            with self.progress.bar(self.run.steps_done, recipe.training.max_steps) as advance:
                while calls:
                    done, calls = ray.wait(calls, num_returns=len(calls), timeout=POLL_S)
                    learners.get(done)
                    logs, scoring = learners.call_one("news")
                    for step, metrics in logs:
                        self.run.log(metrics, step)
                        advance(step, metrics)
                    self.progress.scoring(scoring)
        finally:
            learners.stop()
        return sizes

    def _log_what_was_missed(self, checkpoint: Path) -> None:
        """Lines that the ranks had logged and this process had not fetched when it was ended."""
        logged = {(m["step"], _held_out_only(m)) for m in self.run.read_jsonl("metrics.jsonl")}
        history = json.loads((checkpoint / TRAINER_STATE).read_text())["log_history"]
        for entry in history:
            metrics = renamed(entry, entry["step"], self.recipe)
            if metrics and (entry["step"], _held_out_only(metrics)) not in logged:
                self.run.log(metrics, entry["step"])

    def evaluate(self, when: str, done: int) -> None:
        """Greedy answers of the starting model, or of the last checkpoint, on held-out rows."""
        if not self.rows or self.run.has_answers(when, done, self.rows, self.reward):
            return
        checkpoint = self.run.checkpoints.latest() if done else None
        recipe = self.recipe
        record: dict[str, Any] = {"step": done}
        with serving(recipe, checkpoint.path if checkpoint else None) as pool:
            for name, rows in self.rows.items():
                scores = held_out.greedy_scores(
                    rows, self.reward, pool.generate, recipe.sampling.max_completion_length,
                    recipe.scoring.timeout_s,
                )  # fmt: skip
                record[name] = held_out.to_records(scores)
                self.progress.note(f"{when}: {name} (n={len(rows)})", held_out.means(scores))
        self.run.save_json(f"held_out/{when}.json", record)

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes summary.json: what was run, and held-out scores before and after."""
        gates = gate_records(self.recipe, self.run)
        losses = [m for m in self.run.read_jsonl("metrics.jsonl") if _held_out_only(m)]
        summary = {
            "run": self.run.path.name, "kind": self.recipe.kind, "model": self.recipe.model.path,
            "steps": self.recipe.training.max_steps, **facts, "gates": gates,
            "held_out_metrics": {"before": losses[0], "after": losses[-1]} if losses else None,
            **held_out.summary_of(
                self.run.load_json, self.recipe.data.held_out, self.recipe.data.reported,
                self.recipe.evaluation.bootstrap_samples,
            ),
        }  # fmt: skip
        self.run.finish(summary)
        self.progress.table(summary)


def check_devices(recipe: Recipe) -> None:
    """Whether the cluster can run the recipe; asks Ray, since GPUs may be on other machines alone.

    Raises:
        ValueError: the key, its value and the fix.
    """
    learner = device_of(recipe.learner.device, "learner.device")
    rollout = device_of(recipe.rollout.device, "rollout.device")
    if learner == "cpu" and recipe.model.dtype == "bfloat16":
        raise ValueError(
            "model.dtype=bfloat16 with learner.device=cpu: transformers' Trainer refuses it; use "
            "float32"
        )
    check_gpus(recipe, learner, rollout, num_gpus(), in_turns=True)


def check_data(recipe: Recipe) -> tuple[list[Row], dict[str, Any]]:
    """Reads and checks everything before anything heavy starts; returns trained rows and counts.

    Raises:
        ValueError, FileNotFoundError: the file, the row and the fix.
    """
    if recipe.kind == "dpo":
        return _check_pairs(recipe)
    rows, _ = training_rows(recipe)
    unanswered = [row.id for row in rows if not row.answer.strip()]
    if unanswered:
        raise ValueError(
            f"data.train: row {unanswered[0]!r} ({len(unanswered)} in all) has no `answer` to "
            "learn from; give one or drop it"
        )
    clips = len(bundled(rows, recipe.training.rows_per_clip))
    _check_enough(recipe, clips)
    return rows, {
        "rows": len(rows), "clips": clips, "data": provenance_of(rows),
        "tokenizer": by_language(load_processor(recipe.model.path).tokenizer, rows),
    }  # fmt: skip


def _check_pairs(recipe: Recipe) -> tuple[list[Row], dict[str, Any]]:
    pairs, _ = training_pairs(recipe)
    clips = len(bundled(pairs, recipe.training.rows_per_clip))
    _check_enough(recipe, clips)
    rows = [pair.row for pair in pairs]
    kinds = dict(Counter(pair.kind for pair in pairs))
    return rows, {
        "pairs": len(pairs), "clips": clips, "pair_kinds": kinds, "data": provenance_of(rows),
    }  # fmt: skip


def _check_enough(recipe: Recipe, clips: int) -> None:
    if recipe.training.prompts_per_step > clips:
        raise ValueError(
            f"training.prompts_per_step={recipe.training.prompts_per_step}: more than the {clips} "
            "clips of data.train; lower it or add rows"
        )


def _held_out_only(metrics: dict[str, Any]) -> bool:
    return any(name.startswith("held_out/") for name in metrics)

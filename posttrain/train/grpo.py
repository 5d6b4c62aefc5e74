"""GRPO on long audio.

    rows --> rollout workers (vLLM) --> rewards --> advantages --> learners (DeepSpeed)
      ^            ^                                                     |
      |            +----------------- weights or adapter ----------------+
      +-- data position                                              checkpoints

Try it:      posttrain run recipes/nano/grpo_long_audio.yaml      (2 cores, no GPU)
Full scale:  posttrain run recipes/grpo_long_audio.yaml           (8 GPUs, or a Ray cluster)

Source: DeepSeekMath (arXiv 2402.03300), with TRL's names for every hyper-parameter.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.algorithm.advantages import decoupled_advantages, group_advantages
from posttrain.data.rows import Row
from posttrain.evaluate import held_out
from posttrain.schema import AlgorithmConfig, Recipe, ScoringConfig
from posttrain.train.batches import PromptBatches
from posttrain.train.learner import ScoredGroup
from posttrain.train.progress import Progress
from posttrain.train.resources import Cluster, start_cluster
from posttrain.train.rewards import check_rewards, errors_of, recipe_rewards
from posttrain.train.run_folder import RunFolder
from posttrain.train.run_gates import check_gates, gate_records, refuse_failed_gates
from posttrain.types import Group, PromptRequest, RewardResult, SamplingSettings
from reward_models.registry import WeightedSum
from reward_models.scoring import score_all


def train(recipe: Recipe) -> Path:
    """Runs, or continues, a GRPO recipe; returns the run folder.

    Raises:
        GateFailed: the run is done and a gate was not passed.
    """
    data = PromptBatches.from_recipe(recipe)
    rewarded = recipe.teacher.path is None or any(t.weight for t in recipe.rewards.values())
    if rewarded:
        check_rewards(recipe, data.rows)
    run = RunFolder(recipe)
    with start_cluster(recipe, run.checkpoint) as cluster:
        reward = recipe_rewards(recipe, data.rows, run.path) if rewarded else None
        loop = GrpoLoop(recipe, run, data, reward, cluster)
        loop.evaluate("before", 0)
        check_gates(recipe, run)
        for step in loop.progress.track(run.steps_done, recipe.training.max_steps):
            loop.step(step)
        loop.evaluate("after", recipe.training.max_steps)
        loop.finish()
    refuse_failed_gates(recipe, run, loop.progress)
    return run.path


class GrpoLoop:
    """The state of a run between steps: the policy version, and skipped steps in a row."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, data: PromptBatches, reward: WeightedSum | None,
        cluster: Cluster,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.data, self.cluster = recipe, run, data, cluster
        self.reward = reward
        self.sampling = SamplingSettings(
            recipe.sampling.temperature,
            recipe.sampling.max_completion_length,
            recipe.sampling.num_generations,
        )
        self.policy_version = run.checkpoint.policy_version if run.checkpoint else 0
        self.skipped_in_a_row = 0
        self.progress = Progress(recipe.run_name or "grpo")
        self.started = time.monotonic()
        self.sync_report: Any = None

    def step(self, step: int) -> None:
        """Sample, score, advantage, update, sync, log; rollouts first, to look at what failed."""
        rows = self.data.batch(step)
        groups = self.sample(rows, step)
        results, metrics = self.score(rows, groups, step)
        advantages, more = advantages_of(results, self.reward, self.recipe.algorithm)
        scored = scored_groups(rows, groups, results, advantages)
        metrics |= more | self.cluster.learners.update(scored, step)
        self.check_skipped(bool(metrics["train/skipped"]), step)
        metrics |= self.sync()
        metrics |= rollout_metrics(groups, results, self.cluster.pool)
        self.run.log(metrics, step + 1)
        self.progress.show(metrics)
        self.periodic(step + 1)

    def sample(self, rows: Sequence[Row], step: int) -> list[Group]:
        """One group a row; seeds depend on the run seed, the step and the prompt alone."""
        requests = [
            PromptRequest(
                f"{step}/{row.id}", row.id, row.prompt, row.audio,
                sampling_seed(self.recipe.seed, step, row.id),
            )
            for row in rows
        ]  # fmt: skip
        return self.cluster.pool.generate(requests, self.sampling)

    def score(
        self, rows: Sequence[Row], groups: Sequence[Group], step: int
    ) -> tuple[list[list[RewardResult]], dict[str, float]]:
        """One result a completion, logged at once; those that errored are counted and shown."""
        started = time.monotonic()
        results = score(self.reward, rows, groups, self.recipe.scoring)
        seconds = time.monotonic() - started
        self.run.log_rollouts(rows, groups, results, step + 1)
        self.progress.warn_of_errors(results, step + 1)
        errors = errors_of(results, self.recipe.scoring.errored)
        return results, errors | {"reward/seconds": seconds}

    def sync(self) -> dict[str, float]:
        """Brings the workers to the new policy."""
        self.policy_version += 1
        self.sync_report = self.cluster.sync(self.policy_version)
        return {
            "sync/seconds": self.sync_report.seconds,
            "sync/bytes": float(self.sync_report.num_bytes),
        }

    def check_skipped(self, skipped: bool, step: int) -> None:
        """NaN gradients leave the weights alone; too many in a row end the run."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        limit = self.recipe.training.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"step {step}: loss or gradients not finite for {limit} steps in a row "
                "(training.max_skipped_steps); lower training.learning_rate and resume"
            )

    def periodic(self, done: int) -> None:
        """Evaluation and checkpoints that fall due after `done` steps."""
        training = self.recipe.training
        last = done == training.max_steps
        if training.eval_steps and done % training.eval_steps == 0 and not last:
            self.evaluate(f"step-{done:06d}", done)
        if done % training.save_steps == 0 or last:
            self.save(done)

    def evaluate(self, when: str, done: int) -> None:
        """Greedy answers on the held-out rows; kept in the run folder, so resuming repeats none."""
        rows_of = self.data.held_out
        if not rows_of or self.run.has_answers(when, done, rows_of, self.reward):
            return
        limit = self.recipe.sampling.max_completion_length
        generate = self.cluster.pool.generate
        record: dict[str, Any] = {"step": done}
        for name, rows in rows_of.items():
            timeout_s = self.recipe.scoring.timeout_s
            scores = held_out.greedy_scores(rows, self.reward, generate, limit, timeout_s)
            record[name] = held_out.to_records(scores)
            self.progress.note(f"{when}: {name} (n={len(rows)})", held_out.means(scores))
        self.run.save_json(f"held_out/{when}.json", record)

    def save(self, done: int) -> None:
        partial = self.run.checkpoints.begin(done)
        self.cluster.learners.call_all("save", str(partial.resolve()))
        self.run.checkpoints.finish(done, self.policy_version)

    def finish(self) -> None:
        """Writes summary.json: what was run, and held-out scores before and after."""
        report = self.sync_report
        summary: dict[str, Any] = {
            "run": self.run.path.name,
            "kind": self.recipe.kind,
            "steps": self.recipe.training.max_steps,
            "data": self.data.provenance,
            "engines": {
                "rollout": f"{self.recipe.rollout.engine} on {self.cluster.rollout_device}",
                "learner": f"deepspeed zero-{self.recipe.learner.zero_stage} x "
                f"{self.recipe.learner.num_processes} on {self.cluster.learner_device}",
                "orchestration": "ray",
            },
            "model": self.recipe.model.path,
            **self.cluster.sizes,
            "policy_version": self.policy_version,
            "worker_restarts": self.cluster.pool.restarts,
            "sync": vars(report) if report else None,
            "wall_s": round(time.monotonic() - self.started, 1),
        }
        summary["gates"] = gate_records(self.recipe, self.run)
        summary |= held_out.summary_of(
            self.run.load_json, self.recipe.data.held_out, self.recipe.data.reported,
            self.recipe.evaluation.bootstrap_samples,
        )  # fmt: skip
        self.run.finish(summary)
        self.progress.table(summary)


def sampling_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """31-bit seed of a group's first completion; completion i adds i."""
    digest = hashlib.sha256(f"posttrain/sample/{run_seed}/{step}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def score(
    reward: WeightedSum | None, rows: Sequence[Row], groups: Sequence[Group],
    scoring: ScoringConfig,
) -> list[list[RewardResult]]:  # fmt: skip
    """One result a completion; without a reward (a teacher alone says what is good) all are 0."""
    if reward is None:
        return [[RewardResult(0.0) for _ in group.completions] for group in groups]
    items = [(row, c) for row, group in zip(rows, groups, strict=True) for c in group.completions]
    results = iter(
        score_all(reward, items, timeout_s=scoring.timeout_s, num_threads=scoring.num_threads)
    )
    return [[next(results) for _ in group.completions] for group in groups]


def advantages_of(
    results: Sequence[Sequence[RewardResult]],
    reward: WeightedSum | None,
    algorithm: AlgorithmConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(N, G) advantages and reward metrics.

    Raises:
        ValueError: no completion has a reward.
    """
    values = torch.tensor([[r.value or 0.0 for r in line] for line in results])
    valid = torch.tensor([[r.value is not None for r in line] for line in results])
    if reward is not None and algorithm.multi_objective_aggregation == "normalize_then_sum":
        nan = float("nan")
        parts = torch.tensor(
            [[[r.breakdown.get(name, nan) for name in reward.weights] for r in line]
             for line in results]
        )  # fmt: skip
        weights = torch.tensor(list(reward.weights.values()))
        advantages, metrics = decoupled_advantages(parts, weights, valid)
    else:
        advantages, metrics = group_advantages(values, valid, algorithm.scale_rewards)
    metrics["reward/mean"] = float(values[valid].mean())
    metrics["reward/std"] = float(values[valid].std(correction=0))
    return advantages, metrics


def scored_groups(
    rows: Sequence[Row], groups: Sequence[Group],
    results: Sequence[Sequence[RewardResult]], advantages: torch.Tensor,
) -> list[ScoredGroup]:  # fmt: skip
    return [
        ScoredGroup(row, group, tuple(line_advantages), tuple(r.value is not None for r in line))
        for row, group, line, line_advantages in zip(
            rows, groups, results, advantages.tolist(), strict=True
        )
    ]


def rollout_metrics(
    groups: Sequence[Group], results: Sequence[Sequence[RewardResult]], pool: Any
) -> dict[str, float]:
    completions = [c for g in groups for c in g.completions]
    tokens = sum(c.num_tokens for c in completions)
    metrics = {
        "rollout/completion_tokens": tokens / len(completions),
        "rollout/truncated": sum(c.truncated for c in completions) / len(completions),
        "rollout/prompt_tokens": sum(g.num_prompt_tokens for g in groups) / len(groups),
        "rollout/seconds": pool.last.wall_s,
        "rollout/tokens_per_s": tokens / max(pool.last.wall_s, 1e-9),
        "rollout/waiting_share": pool.last.waiting_share,
        "rollout/reissued_groups": float(pool.last.reissued_groups),
    }
    terms: dict[str, list[float]] = {}
    for result in (r for line in results for r in line if r.value is not None):
        for name, value in result.breakdown.items():
            terms.setdefault(f"reward/{name}", []).append(value)
    return metrics | {name: sum(values) / len(values) for name, values in terms.items()}

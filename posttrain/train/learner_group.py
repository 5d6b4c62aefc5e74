"""The learner ranks as Ray actors in one placement group, and what each of them forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import AutoConfig

from posttrain.model.flops import attended_pairs, forward_flops
from posttrain.model.sequence_parallel import check_heads
from posttrain.rollout.rendezvous import meeting_point
from posttrain.schema import Recipe
from posttrain.train.learner import LearnerRank, ScoredGroup
from posttrain.train.micro_batches import MicroBatch, Planner, balance


def planner(recipe: Recipe) -> Planner:
    """Parts weighed by the operations that the recipe's language model needs for them."""
    config: Any = AutoConfig.from_pretrained(recipe.model.path, trust_remote_code=False)
    check_heads(config.text_config.num_attention_heads, recipe.learner.sequence_parallel_size)

    def cost(num_prompt: int, lengths: Sequence[int]) -> float:
        tokens = num_prompt + sum(lengths)
        pairs = attended_pairs(num_prompt, lengths)
        return forward_flops(config.text_config, tokens, pairs, sum(lengths) + len(lengths))

    return Planner(cost, recipe.training.micro_batch_tokens, dense=not recipe.shared_prefix.enabled)


class LearnerGroup:
    """`learner.num_processes` ranks; neighbours share a sequence where the recipe says so."""

    def __init__(
        self, recipe: Recipe, device: str, rank_class: type = LearnerRank, **options: Any
    ) -> None:
        """`options` are Ray's, of every rank."""
        self.num_ranks = recipe.learner.num_processes
        self.ranks_a_sequence = recipe.learner.sequence_parallel_size
        self.planner = planner(recipe)
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        # the ranks of a sequence trade tokens in every layer: one bundle, so one machine
        together = {name: count * self.ranks_a_sequence for name, count in bundle.items()}
        num_sequences = self.num_ranks // self.ranks_a_sequence
        self._placement = placement_group([together] * num_sequences, strategy="PACK")
        ray.get(self._placement.ready(), timeout=300)
        actor = ray.remote(rank_class)
        threads = recipe.learner.threads_per_process
        environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        address, port = ray.get(ray.remote(meeting_point).options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, 0), num_cpus=0
        ).remote())  # fmt: skip
        arguments = (self.num_ranks, address, port, device)
        self.ranks: list[Any] = [
            self._actor(actor, i, bundle, environment, options).remote(recipe, i, *arguments)
            for i in range(self.num_ranks)
        ]

    def _actor(
        self, actor: Any, index: int, bundle: dict[str, float], env: dict[str, str],
        options: dict[str, Any],
    ) -> Any:  # fmt: skip
        return actor.options(
            **options,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            runtime_env={"env_vars": env},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, index // self.ranks_a_sequence
            ),
        )

    def build(self, resume_dir: str | None = None) -> dict[str, int]:
        """Loads the policy on every rank; returns its sizes."""
        return self.call_all("build", resume_dir)[0]

    def update(self, scored: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """One step on `scored`, dealt out to the ranks; returns metrics over all ranks."""
        plan, shares = self.shares(scored)
        calls = [
            rank.update.remote(share, step) for rank, share in zip(self.ranks, shares, strict=True)
        ]
        tokens = [[sum(part.num_tokens for part in batch) for batch in rank] for rank in plan]
        sizes = {
            "train/forwarded_tokens": float(sum(map(sum, tokens))),
            "train/largest_micro_batch_tokens": float(max(map(max, tokens))),
            "train/micro_batches": float(len(plan[0])),
            "train/rank_balance": balance(plan),
        }
        return self.get(calls)[0] | sizes

    def shares(
        self, scored: Sequence[ScoredGroup]
    ) -> tuple[list[list[MicroBatch]], list[list[list[ScoredGroup]]]]:
        """The plan, and the micro-batches of every rank."""
        sizes = [
            (one.group.num_prompt_tokens, [c.num_tokens for c in one.group.completions])
            for one in scored
        ]
        plan = self.planner.plan(sizes, self.num_ranks // self.ranks_a_sequence)
        shares = [
            [[scored[part.group].only(part.completions) for part in batch] for batch in batches]
            for batches in plan
        ]
        return plan, [share for share in shares for _ in range(self.ranks_a_sequence)]

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self.get([getattr(rank, method).remote(*arguments) for rank in self.ranks])

    def call_first(self, method: str, *arguments: Any) -> Any:
        """Calls a collective on every rank; returns rank 0's answer."""
        return self.call_all(method, *arguments)[0]

    def call_one(self, method: str, *arguments: Any) -> Any:
        """Calls rank 0 alone."""
        return self.get([getattr(self.ranks[0], method).remote(*arguments)])[0]

    def get(self, calls: list[Any]) -> list[Any]:
        """Answers of calls; a rank's own error is raised as it was, a dead one with what to do."""
        try:
            return ray.get(calls)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise RuntimeError(
                f"a learner process died: {str(error).splitlines()[-1]}; out of memory? "
                "learner.zero_stage=3, learner.cpu_offload, model.activation_offload, a smaller "
                "training.micro_batch_tokens or a larger learner.sequence_parallel_size; "
                "resume=auto goes on from the last checkpoint"
            ) from error

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        ray.util.remove_placement_group(self._placement)

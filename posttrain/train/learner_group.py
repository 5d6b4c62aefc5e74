"""The learner ranks as Ray actors in one placement group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.rollout.rendezvous import meeting_point
from posttrain.schema import Recipe
from posttrain.train.learner import LearnerRank, ScoredGroup


class LearnerGroup:
    """`learner.num_processes` ranks; groups are dealt out in contiguous shares."""

    def __init__(self, recipe: Recipe, device: str, rank_class: type = LearnerRank) -> None:
        self.num_ranks = recipe.learner.num_processes
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        self._placement = placement_group([bundle] * self.num_ranks, strategy="PACK")
        ray.get(self._placement.ready(), timeout=300)
        actor = ray.remote(rank_class)
        threads = recipe.learner.threads_per_process
        environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        address, port = ray.get(ray.remote(meeting_point).options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, 0), num_cpus=0
        ).remote())  # fmt: skip
        arguments = (self.num_ranks, address, port, device)
        self.ranks: list[Any] = [
            self._actor(actor, i, bundle, environment).remote(recipe, i, *arguments)
            for i in range(self.num_ranks)
        ]

    def _actor(self, actor: Any, index: int, bundle: dict[str, float], env: dict[str, str]) -> Any:
        return actor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            runtime_env={"env_vars": env},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
        )

    def build(self, resume_dir: str | None = None) -> dict[str, int]:
        """Loads the policy on every rank; returns its sizes."""
        return self.call_all("build", resume_dir)[0]

    def update(self, scored: Sequence[ScoredGroup], step: int) -> dict[str, float]:
        """One step on `scored`, split over the ranks; returns metrics over all ranks."""
        share = len(scored) // self.num_ranks
        calls = [
            rank.update.remote(list(scored[i * share : (i + 1) * share]), step)
            for i, rank in enumerate(self.ranks)
        ]
        return self._get(calls)[0]

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._get([getattr(rank, method).remote(*arguments) for rank in self.ranks])

    def call_first(self, method: str, *arguments: Any) -> Any:
        """Calls a collective on every rank; returns rank 0's answer."""
        return self.call_all(method, *arguments)[0]

    def call_one(self, method: str, *arguments: Any) -> Any:
        """Calls rank 0 alone."""
        return self._get([getattr(self.ranks[0], method).remote(*arguments)])[0]

    def _get(self, calls: list[Any]) -> list[Any]:
        try:
            return ray.get(calls)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise RuntimeError(
                f"a learner process died: {str(error).splitlines()[-1]}; out of memory? "
                "learner.zero_stage=3, learner.cpu_offload or fewer "
                "training.per_device_group_batch_size; resume=auto goes on from the last checkpoint"
            ) from error

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        ray.util.remove_placement_group(self._placement)

"""Rollout workers as a pool: fan out, keep groups whole, replace the dead and the hung.

    requests --round robin--> workers --groups--> checked: every group once, in order

A worker that dies (or answers nothing within `timeout_s`) is killed, started anew, brought to the
current policy version and given its unanswered groups again. A group keeps its id, so a late
answer of a replaced worker can never be trained twice: its actor is gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from posttrain.rollout.settings import EngineSettings
from posttrain.rollout.worker import Place, RolloutWorker, end_process
from posttrain.types import Group, PromptRequest, SamplingSettings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 1_800.0
KILL_TIMEOUT_S = 60.0
HEAL_TIMEOUT_S = 60.0


@dataclass
class PoolStatistics:
    """Of the last `generate`: seconds in all, idle share of the workers, reissued groups."""

    wall_s: float = 0.0
    waiting_share: float = 0.0
    reissued_groups: int = 0


@dataclass
class RolloutPool:
    """`num_workers` engines behind one `generate`.

    Attributes:
        resources: Ray options of one worker (`num_gpus`, `num_cpus`, scheduling strategy).
        on_replaced: called after a worker was replaced; brings new workers to the policy.
        places: where every worker runs.
        losses: workers that died or hung so far, a broken-off weight sync being one; more than
            `max_restarts` end the run.
        restarts: workers started anew so far; after a broken-off sync the sound ones, too.
    """

    settings: EngineSettings
    num_workers: int
    timeout_s: float
    max_restarts: int
    resources: dict[str, Any] = field(default_factory=lambda: {"num_cpus": 0})
    on_replaced: Callable[[], None] | None = None
    workers: list[Any] = field(default_factory=list)
    places: dict[Any, Place] = field(default_factory=dict)
    losses: int = 0
    restarts: int = 0
    last: PoolStatistics = field(default_factory=PoolStatistics)

    def start(self) -> None:
        """Starts all workers at once; `wait` returns when their engines stand."""
        self.workers = [self._new_worker(i) for i in range(self.num_workers)]

    def wait(self) -> None:
        self._await_ready(self.workers)

    def heal(self) -> None:
        """Replaces workers that do not answer; for the moments before a weight sync."""
        if lost := self.lost():
            self._count(len(lost))
            self._restart(lost)

    def lost(self, timeout_s: float = HEAL_TIMEOUT_S) -> list[int]:
        """Indices of workers that are dead, or silent for `timeout_s`."""
        lost = []
        answers = [worker.ready.remote() for worker in self.workers]
        for index, answer in enumerate(answers):
            try:
                ray.get(answer, timeout=timeout_s)
            except (RayActorError, GetTimeoutError):
                log.warning("rollout worker %d does not answer", index)
                lost.append(index)
        return lost

    def _new_worker(self, index: int) -> Any:
        name = f"rollout-{index}.{self.restarts}"
        actor = ray.remote(RolloutWorker).options(max_restarts=0, **self.resources)
        return actor.remote(name, self.settings)

    def _await_ready(self, workers: Sequence[Any]) -> None:
        try:
            places = ray.get([w.ready.remote() for w in workers], timeout=START_TIMEOUT_S)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except (RayActorError, GetTimeoutError) as error:
            raise RuntimeError(
                f"a rollout worker did not start: {str(error).splitlines()[-1]}; out of memory? "
                "lower rollout.gpu_memory_utilization or rollout.max_model_len"
            ) from error
        self.places |= dict(zip(workers, places, strict=True))

    def pids(self) -> list[int]:
        return [self.places[worker].pid for worker in self.workers]

    def generate(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> list[Group]:
        """One group a request, in the order asked.

        Raises:
            RuntimeError: more than `max_restarts` workers were lost.
            ValueError: a worker refused a request (bad audio): the original message.
        """
        started = time.monotonic()
        answered: dict[str, Group] = {}
        attempts = {request.group_id: 0 for request in requests}
        if len(attempts) != len(requests):
            raise ValueError("rollout pool: two requests with one group_id")
        busy_s = 0.0
        while missing := [r for r in requests if r.group_id not in answered]:
            turn = missing[: len(self.workers) * self._groups_per_call(settings)]
            shares = [turn[i :: len(self.workers)] for i in range(len(self.workers))]
            for request in turn:
                attempts[request.group_id] += 1
            results, lost = self._one_round(shares, settings)
            for groups, seconds in results:
                busy_s += seconds
                answered |= {g.group_id: g for g in groups}
            if lost:
                self._replace(lost)
        wall_s = time.monotonic() - started
        self.last = PoolStatistics(
            wall_s=wall_s,
            waiting_share=1.0 - busy_s / max(wall_s * len(self.workers), 1e-9),
            reissued_groups=sum(n > 1 for n in attempts.values()),
        )
        return [replace(answered[r.group_id], attempts=attempts[r.group_id]) for r in requests]

    def _groups_per_call(self, settings: SamplingSettings) -> int:
        """As many as the engine decodes at once: a deadline then bounds a known amount of work."""
        return max(1, self.settings.max_num_seqs // settings.num_completions)

    def _one_round(
        self, shares: Sequence[Sequence[PromptRequest]], settings: SamplingSettings
    ) -> tuple[list[tuple[list[Group], float]], list[int]]:
        """(answers, indices of workers that died or hung)."""
        deadline = time.monotonic() + self.timeout_s
        pending = [
            (i, self.workers[i].generate.remote(list(share), settings))
            for i, share in enumerate(shares)
            if share
        ]
        results, lost = [], []
        for index, reference in pending:
            try:
                left_s = max(0.1, deadline - time.monotonic())
                results.append(ray.get(reference, timeout=left_s))
            except RayActorError as error:
                log.warning("rollout worker %d died: %s", index, str(error).splitlines()[0])
                lost.append(index)
            except GetTimeoutError:
                log.warning("rollout worker %d silent for %.0f s", index, self.timeout_s)
                lost.append(index)
            except RayTaskError as error:
                raise error.as_instanceof_cause() from error
        return results, lost

    def restart_all(self) -> None:
        """Starts every worker anew; for a weight sync that broke off. Counts as one loss."""
        self._count(1)
        self._restart(range(len(self.workers)))

    def _replace(self, lost: Sequence[int]) -> None:
        self._count(len(lost))
        self._restart(lost)
        if self.on_replaced is not None:
            self.on_replaced()

    def _count(self, num_lost: int) -> None:
        self.losses += num_lost
        if self.losses > self.max_restarts:
            raise RuntimeError(
                f"{self.losses} rollout workers lost, rollout.max_restarts={self.max_restarts}; "
                "look at the worker's log for memory or timeouts (rollout.timeout_s)"
            )

    def _restart(self, indices: Sequence[int]) -> None:
        self.restarts += len(indices)
        for index in indices:
            self._kill(self.workers[index])
            self.workers[index] = self._new_worker(index)
        self._await_ready([self.workers[i] for i in indices])

    def _kill(self, worker: Any) -> None:
        """Ends the actor and its process: one that hangs does not hear `ray.kill`."""
        ray.kill(worker)
        place = self.places.pop(worker, None)
        if place is None:
            return
        strategy = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
        end = ray.remote(end_process).options(num_cpus=0, scheduling_strategy=strategy)
        with suppress(RayError):  # the whole node may be gone
            ray.get(end.remote(place), timeout=KILL_TIMEOUT_S)

    def call_all(self, method: str, *arguments: Any, timeout_s: float | None = None) -> list[Any]:
        """Calls a method on every worker at once."""
        references = [getattr(w, method).remote(*arguments) for w in self.workers]
        return ray.get(references, timeout=timeout_s or self.timeout_s)

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        strategy = self.resources.get("scheduling_strategy")
        if isinstance(strategy, PlacementGroupSchedulingStrategy):
            ray.util.remove_placement_group(strategy.placement_group)

"""New weights from the learners to the inference workers.

    full     learner rank 0 --nccl or gloo broadcast, vLLM's weight-transfer engine--> workers
             (transformers engine: through Ray's object store)
    adapter  LoRA files through Ray's object store, under a new adapter name each version

After either, every cache that depends on the weights is dropped.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

log = logging.getLogger(__name__)

BROKEN_OFF_TIMEOUT_S = 5.0  # all workers are started anew then, a busy one too


@dataclass(frozen=True)
class SyncReport:
    """What one sync moved: mode, bytes sent by the learner, seconds until all workers serve it."""

    mode: str
    num_bytes: int
    seconds: float


class RayTransferClient:
    """vLLM's `VLLMWeightSyncClient` over Ray actors; each worker gets its own ranks."""

    def __init__(self, workers: list[Any], ranks_per_worker: int) -> None:
        self.workers, self.ranks_per_worker = workers, ranks_per_worker

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        calls = []
        for i, worker in enumerate(self.workers):
            info = init_info | {"rank_offset": 1 + i * self.ranks_per_worker}
            calls.append(worker.transfer_rpc.remote("init_weight_transfer_engine", info))
        ray.get(calls)

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update")

    def _all(self, method: str, *arguments: Any) -> None:
        ray.get([worker.transfer_rpc.remote(method, *arguments) for worker in self.workers])


def trainer_transfer(
    source: Any, client: RayTransferClient, *, rank: int, address: str, port: int,
    world_size: int, backend: str,
) -> Any:  # fmt: skip
    """The learner's end of vLLM's weight transfer; `backend` is "nccl" or "gloo"."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from posttrain.rollout.plugin import register_gloo_transfer

    register_gloo_transfer()
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo as InitInfo
    else:
        from posttrain.rollout.gloo_transfer import GlooTrainerInitInfo as InitInfo
    info = InitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


class WeightSync:
    """Brings a pool of workers to the learners' policy."""

    def __init__(self, pool: Any, learners: Any, *, mode: str) -> None:
        self.pool, self.learners, self.mode = pool, learners, mode
        self.policy_version = 0
        self._connected: list[Any] = []

    def repeat(self) -> None:
        """Brings workers that were replaced to the version of the others."""
        self(self.policy_version)

    def __call__(self, policy_version: int) -> SyncReport:
        """One sync; all workers serve `policy_version` when it returns.

        A worker lost on the way leaves the others with half of the weights, and the learner with
        a broken connection: all workers are started anew and the sync is tried once more.
        """
        started = time.monotonic()
        self.policy_version = policy_version
        self.pool.heal()
        try:
            num_bytes = self._send()
        except (RayError, RuntimeError) as error:
            if not self.pool.lost(BROKEN_OFF_TIMEOUT_S):
                raise
            log.warning("weight sync broke off: %s", str(error).splitlines()[0])
            self._connected = []
            self.pool.restart_all()
            num_bytes = self._send()
        return SyncReport(self.mode, num_bytes, time.monotonic() - started)

    def _send(self) -> int:
        """Sends the learners' weights; returns their bytes."""
        if self.mode == "adapter":
            files = self.learners.call_first("adapter")
            self.pool.call_all("load_adapter", ray.put(files), self.policy_version)
            return sum(map(len, files.values()))
        if self.pool.settings.engine == "transformers":
            weights = self.learners.call_first("trainable_weights")
            self.pool.call_all("load_weights", ray.put(weights))
            num_bytes = sum(t.numel() * t.element_size() for t in weights.values())
        else:
            self._connect()
            num_bytes = self.learners.call_all("send_weights")[0]
        self.pool.call_all("set_policy_version", self.policy_version)
        return num_bytes

    def _connect(self) -> None:
        """Rebuilds the transfer group whenever the workers are not the ones it was built with."""
        if self._connected == self.pool.workers:
            return
        ranks = self.pool.settings.tensor_parallel_size
        client = RayTransferClient(list(self.pool.workers), ranks)
        address, port = self.learners.call_one("meeting_point")
        world_size = 1 + ranks * len(self.pool.workers)
        backend = self.pool.settings.transfer_backend
        self.learners.call_all("connect_transfer", client, address, port, world_size, backend)
        self._connected = list(self.pool.workers)

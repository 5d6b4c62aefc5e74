"""vLLM's weight-transfer protocol over gloo, for machines without NCCL.

Registered in vLLM's own factories under "gloo", so that a run on CPU makes the same calls
(`trainer_init`, `send_weights`, `init/start/update/finish`) as a run on GPUs with "nccl".
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from posttrain.rollout.rendezvous import TIMEOUT, open_store

BACKEND = "gloo"


class GlooGroup:
    """A broadcast group of its own, beside any default process group."""

    def __init__(self, master_address: str, master_port: int, rank: int, world_size: int) -> None:
        store = open_store(master_address, master_port, rank, world_size)
        self._store = store
        self._group = dist.ProcessGroupGloo(store, rank, world_size, TIMEOUT)

    def broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where engine workers meet the trainer; `rank_offset` is the first rank of the engine."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Names, torch dtype names and shapes, in the order of the broadcasts."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The inference side: receives canonical weights and reloads the model layer by layer."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        if self.group is None:
            raise RuntimeError("gloo weight transfer: init_transfer_engine was not called")
        self.model.load_weights(self._received(update_info))

    def _received(self, info: GlooUpdateInfo) -> Iterable[tuple[str, torch.Tensor]]:
        for name, dtype_name, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
            self.group.broadcast(tensor)
            yield name, tensor

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self.group = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Where the trainer listens; `world_size` counts it and every engine worker."""

    backend: ClassVar[str] = BACKEND
    master_address: str
    master_port: int
    world_size: int


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The learner side: rank 0 broadcasts, other ranks only help to gather."""

    init_info_cls = GlooTrainerInitInfo
    group: Any = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: Any, source: WeightSource | None = None
    ) -> GlooTrainerWeightTransferEngine:
        if source is None:
            raise ValueError("gloo weight transfer: a WeightSource is needed")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if not engine.is_sender:
            return engine
        worker_info = GlooInitInfo(
            init_info.master_address, init_info.master_port, 1, init_info.world_size
        )
        with ThreadPoolExecutor(max_workers=1) as pool:
            joined = pool.submit(client.init_weight_transfer_engine, asdict(worker_info))
            engine.group = GlooGroup(
                init_info.master_address, init_info.master_port, 0, init_info.world_size
            )
            joined.result()
        return engine

    def send_weights(self) -> None:
        meta = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        weights = iter(self.source)
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            self.client.start_weight_update()
            received = pool.submit(self.client.update_weights, asdict(_update_info(meta)))
            for _, tensor in weights:
                self.group.broadcast(tensor.cpu().contiguous())
            received.result()
        finally:
            pool.shutdown(wait=False)
            for _ in weights:  # a worker was lost: the other ranks gather to the end regardless
                pass
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.group = None


def _update_info(meta: list[ParamMeta]) -> GlooUpdateInfo:
    return GlooUpdateInfo(
        names=[m.name for m in meta],
        dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
        shapes=[list(m.shape) for m in meta],
    )

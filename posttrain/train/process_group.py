"""torch.distributed and DeepSpeed for one learner rank."""

from __future__ import annotations

import os

import torch.distributed as dist

from posttrain.rollout.rendezvous import open_store


def join_process_group(rank: int, world_size: int, address: str, port: int, device: str) -> None:
    """Makes this process `rank` of `world_size`: NCCL on "cuda", gloo on "cpu"."""
    os.environ |= {
        "MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(rank),
        "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0",
    }  # fmt: skip
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # the shared-memory collective is compiled at start and needs a compiler; gloo does the work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device == "cuda" else "gloo"
    store = open_store(address, port, rank, world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)

"""Where processes meet: an address, a free port, and a store that listens nowhere else."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray

TIMEOUT = timedelta(seconds=300)


def meeting_point() -> tuple[str, int]:
    """(address, free port) of the node this runs on."""
    return ray.util.get_node_ip_address(), free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def open_store(address: str, port: int, rank: int, world_size: int) -> Any:
    """A `TCPStore` whose server (rank 0) listens on `address` alone, not on every interface."""
    import torch.distributed as dist

    if address.startswith("127."):
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    listen_fd = socket.create_server((address, port)).detach() if rank == 0 else None
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=TIMEOUT,
        master_listen_fd=listen_fd,
    )

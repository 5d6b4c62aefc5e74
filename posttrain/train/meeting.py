"""Where processes meet: an address and a free port of this node. Imports nothing heavy."""

from __future__ import annotations

import socket

import ray


def meeting_point() -> tuple[str, int]:
    """(address, free port) of the node this runs on."""
    return ray.util.get_node_ip_address(), free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

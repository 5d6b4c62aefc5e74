"""What a run ran on, for those who read it later: commit, versions, hardware, data."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from posttrain.schema import DataConfig

PACKAGES = ("posttrain", "torch", "transformers", "trl", "peft", "deepspeed", "vllm", "ray")


def environment(model: str) -> dict[str, Any]:
    """Of the machine that drives the run; a cluster's other nodes are named by Ray's address.

    Args:
        model: what the run starts from; a folder is written down as an absolute path.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "started_from": str(Path(model).absolute()) if Path(model).exists() else model,
        "commit": commit(), "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES}, "cpus": cpus,
        "gpus": gpus, "memory_gib": _memory_gib(), "cluster": bool(os.environ.get("RAY_ADDRESS")),
    }  # fmt: skip


def data_files(data: DataConfig) -> dict[str, dict[str, Any]]:
    """`data.train.main: {path, bytes, sha256}` of each file of rows, not of the clips."""
    sources = {
        f"data.{part}.{name}": Path(source.path)
        for part in ("train", "replay", "held_out", "held_out_pairs", "reported")
        for name, source in getattr(data, part).items()
    }
    return {
        key: {"path": str(path.absolute()), "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for key, path in sources.items()
        if path.is_file()  # a missing one is named where it is read
    }


def hardware(record: dict[str, Any]) -> str:
    """One line: `8 x NVIDIA H100 80GB HBM3`, or `2 CPU cores, 24 GiB`."""
    gpus = record.get("gpus") or []
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    machine = kinds or f"{record.get('cpus')} CPU cores, {record.get('memory_gib')} GiB"
    return f"{machine}, and other nodes of a cluster" if record.get("cluster") else machine


def commit() -> str | None:
    """Of posttrain's source, with "+" when it was changed; None where it is no checkout."""
    source = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "posttrain/types.py") is None:
        return None
    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else None


def package_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None

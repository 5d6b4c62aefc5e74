"""A rank's optimizer state in safetensors: DeepSpeed's own checkpoints are pickles.

ZeRO keeps one flat fp32 partition of every parameter group (stage 2) or sub-group (stage 3) on
each rank, with Adam's moments beside it. Those, and the RNG state, are all that a rank owns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _flat_partitions(zero_optimizer: Any) -> list[torch.Tensor]:
    if hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        return list(zero_optimizer.fp32_partitioned_groups_flat)
    return list(zero_optimizer.single_partition_of_fp32_groups)


def save_rank_state(engine: Any, path: Path) -> None:
    """Writes this rank's partitions, moments and RNG state."""
    state = {"rng": torch.get_rng_state()}
    for i, flat in enumerate(_flat_partitions(engine.optimizer)):
        state[f"{i}/weights"] = flat.detach().cpu()
        for name, value in engine.optimizer.optimizer.state.get(flat, {}).items():
            if name in MOMENTS:
                state[f"{i}/{name}"] = torch.as_tensor(value).detach().cpu()
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def _like(value: torch.Tensor, current: Any, device: torch.device) -> Any:
    """`value` as the optimizer keeps it: a plain int, or a tensor on the partition's device."""
    if isinstance(current, int):
        return int(value)
    return value if value.dim() == 0 else value.to(device)


def load_rank_state(engine: Any, path: Path) -> None:
    """Restores what `save_rank_state` wrote.

    Raises:
        FileNotFoundError: no state of this rank; ValueError: another ZeRO stage or rank count.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no optimizer state of this rank; resume with the learner.num_processes "
            "that wrote the checkpoint"
        )
    state = load_file(path)
    for i, flat in enumerate(_flat_partitions(engine.optimizer)):
        saved = state.get(f"{i}/weights")
        if saved is None or saved.shape != flat.shape:
            raise ValueError(
                f"{path}: partition {i} has shape {None if saved is None else tuple(saved.shape)}, "
                f"here {tuple(flat.shape)}; resume with the same learner.zero_stage, "
                "learner.num_processes and trainable weights"
            )
        flat.data.copy_(saved)
        own = engine.optimizer.optimizer.state[flat]
        for name in MOMENTS:
            if (value := state.get(f"{i}/{name}")) is not None:
                own[name] = _like(value, own.get(name), flat.device)
    load_rng_state(path)


def load_rng_state(path: Path) -> None:
    """Restores torch's random numbers as `save_rank_state` found them."""
    with safe_open(path, framework="pt") as state:
        torch.set_rng_state(state.get_tensor("rng"))
        if "cuda_rng" in state.keys() and torch.cuda.is_available():  # noqa: SIM118
            torch.cuda.set_rng_state(state.get_tensor("cuda_rng"))

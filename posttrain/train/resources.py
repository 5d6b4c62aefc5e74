"""Ray, learners, rollout workers and weight sync of one run, started together, stopped together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from posttrain.model.load import check_architecture
from posttrain.rollout.pool import RolloutPool
from posttrain.rollout.settings import EngineSettings
from posttrain.rollout.weight_sync import WeightSync
from posttrain.schema import Recipe
from posttrain.train.audio_inputs import audio_store_settings
from posttrain.train.checkpoints import Checkpoint
from posttrain.train.learner_group import LearnerGroup
from reward_models.names import MODEL_REWARDS

LOOPBACK = "127.0.0.1"
STARTUP_ENV = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@dataclass
class Cluster:
    """What the loop talks to."""

    learners: LearnerGroup
    pool: RolloutPool
    sync: WeightSync
    learner_device: str
    rollout_device: str
    sizes: dict[str, int]


def device_of(choice: str, key: str) -> str:
    """ "cuda" or "cpu" for a recipe's device choice.

    Raises:
        ValueError: cuda asked for and none there.
    """
    available = torch.cuda.is_available() or (
        ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    )
    if choice == "cuda" and not available:
        raise ValueError(f"{key}=cuda: no GPU here; use cpu or auto")
    if choice == "auto":
        return "cuda" if available else "cpu"
    return choice


@contextmanager
def ray_session(recipe: Recipe) -> Iterator[None]:
    """Ray for one run, taken down at the end, also after an error."""
    start_ray(recipe)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def start_cluster(recipe: Recipe, checkpoint: Checkpoint | None) -> Iterator[Cluster]:
    """Learners and workers side by side, for a loop that needs both in every step.

    Raises:
        ValueError: a wrong checkpoint, or more GPUs than there are.
    """
    check_architecture(recipe.model.path)
    learners: LearnerGroup | None = None
    pool: RolloutPool | None = None
    with ray_session(recipe):
        try:
            learner_device = device_of(recipe.learner.device, "learner.device")
            rollout_device = device_of(recipe.rollout.device, "rollout.device")
            check_gpus(recipe, learner_device, rollout_device, num_gpus())
            pool = new_pool(recipe, engine_settings(recipe, learner_device, rollout_device))
            pool.start()
            learners = LearnerGroup(recipe, learner_device)
            sizes = learners.build(str(checkpoint.path.resolve()) if checkpoint else None)
            pool.wait()
            sync = WeightSync(pool, learners, mode=_sync_mode(recipe))
            sync.policy_version = checkpoint.policy_version if checkpoint else 0
            pool.on_replaced = sync.repeat
            if checkpoint or recipe.lora.enabled:
                sync(sync.policy_version)
            yield Cluster(learners, pool, sync, learner_device, rollout_device, sizes)
        finally:
            if pool is not None:
                pool.stop()
            if learners is not None:
                learners.stop()


@contextmanager
def serving(recipe: Recipe, checkpoint: Path | None = None) -> Iterator[RolloutPool]:
    """Workers that serve the recipe's model, or a checkpoint of its run, and nothing beside them.

    Args:
        checkpoint: a folder of `Checkpoints`, with `model/` or `adapter/` in it.
    """
    device = device_of(recipe.rollout.device, "rollout.device")
    settings = engine_settings(recipe, "cpu", device)
    adapter = checkpoint / "adapter" if checkpoint else None
    if checkpoint and (checkpoint / "model").exists():
        settings = replace(settings, checkpoint=str((checkpoint / "model").resolve()))
    pool = new_pool(recipe, settings)
    try:
        pool.start()
        pool.wait()
        if adapter and adapter.exists():
            files = {path.name: path.read_bytes() for path in sorted(adapter.iterdir())}

            stored = ray.put(files)  # once, however many workers read it

            def load_adapter() -> None:
                pool.call_all("load_adapter", stored, 1)

            pool.on_replaced = load_adapter
            load_adapter()
        yield pool
    finally:
        pool.stop()


def new_pool(recipe: Recipe, settings: EngineSettings) -> RolloutPool:
    rollout = recipe.rollout
    return RolloutPool(
        settings, rollout.num_workers, rollout.timeout_s, rollout.max_restarts,
        resources=_worker_resources(recipe, settings.device),
    )  # fmt: skip


def num_gpus() -> int:
    """Of the Ray cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def start_ray(recipe: Recipe) -> None:
    os.environ |= {k: v for k, v in STARTUP_ENV.items() if k not in os.environ}
    rewards = sum(name in MODEL_REWARDS for name in recipe.rewards)
    needed = recipe.learner.num_processes + recipe.rollout.num_workers + rewards + 1
    options: dict[str, Any] = {
        "log_to_driver": False, "include_dashboard": False, "logging_level": "ERROR",
    }  # fmt: skip
    if "RAY_ADDRESS" not in os.environ:
        options |= {
            "num_cpus": max(needed, os.cpu_count() or 1),
            "object_store_memory": 512 * 2**20,
            "_node_ip_address": LOOPBACK,
        }
    ray.init(**options)


def check_gpus(
    recipe: Recipe, learner_device: str, rollout_device: str, available: int, *,
    in_turns: bool = False,
) -> None:  # fmt: skip
    """Refuses a recipe that asks for more GPUs than `available`.

    Args:
        in_turns: learners and workers are never there at the same time.
    """
    learners = recipe.learner.num_processes if learner_device == "cuda" else 0
    workers = recipe.rollout.num_workers * recipe.rollout.tensor_parallel_size
    workers = workers if rollout_device == "cuda" else 0
    needed = max(learners, workers) if in_turns else learners + workers
    rewards = sum(term.options.get("device") == "cuda" for term in recipe.rewards.values())
    needed += rewards
    if needed > available:
        raise ValueError(
            f"learner.num_processes={recipe.learner.num_processes}, "
            f"rollout.num_workers={recipe.rollout.num_workers} x "
            f"tensor_parallel_size={recipe.rollout.tensor_parallel_size} and {rewards} rewards "
            f"with options.device=cuda need {needed} GPUs, "
            f"the cluster has {available}; lower them, or join more nodes to the Ray cluster"
        )


def _sync_mode(recipe: Recipe) -> str:
    if recipe.rollout.weight_sync != "auto":
        return recipe.rollout.weight_sync
    return "adapter" if recipe.lora.enabled else "full"


def _worker_resources(recipe: Recipe, device: str) -> dict[str, Any]:
    threads = recipe.rollout.threads_per_worker or os.cpu_count() or 1
    if device == "cpu":
        return {
            "num_cpus": 1,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
    gpus = recipe.rollout.tensor_parallel_size
    bundles = [{"CPU": 1.0, "GPU": float(gpus)}] * recipe.rollout.num_workers
    group = placement_group(bundles, strategy="PACK")
    ray.get(group.ready(), timeout=300)
    return {
        "num_cpus": 1,
        "num_gpus": gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
    }


def engine_settings(recipe: Recipe, learner_device: str, device: str) -> EngineSettings:
    rollout = recipe.rollout
    both_on_gpus = learner_device == device == "cuda"
    return EngineSettings(
        checkpoint=recipe.model.path, engine=rollout.engine, device=device,
        dtype=recipe.model.dtype, seed=recipe.seed,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        cpu_kv_cache_gib=rollout.cpu_kv_cache_gib, max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs, max_audio_len_s=recipe.model.max_audio_len_s,
        max_lora_rank=recipe.lora.r if recipe.lora.enabled else None,
        threads=rollout.threads_per_worker,
        transfer_backend="nccl" if both_on_gpus else "gloo",
        audio_store=audio_store_settings(recipe),
    )  # fmt: skip

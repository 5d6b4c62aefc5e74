"""A Ray actor around one engine. Requests name files; waveforms are read here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray

from posttrain.rollout.settings import EngineSettings
from posttrain.types import Group, PromptRequest, SamplingSettings


def build_engine(settings: EngineSettings) -> Any:
    """The engine that the settings name.

    Raises:
        ValueError: unknown engine.
    """
    if settings.engine == "vllm":
        from posttrain.rollout.vllm_engine import VllmEngine

        return VllmEngine(settings)
    if settings.engine == "transformers":
        from posttrain.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    raise ValueError(f"rollout.engine={settings.engine!r}; vllm or transformers")


@dataclass(frozen=True)
class Place:
    """A process on a node; `created_s` tells it from a later one with the same id."""

    pid: int
    created_s: float
    node_id: str


def end_process(place: Place) -> None:
    """Kills that very process and its children, if it still runs; call it on its node."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(place.pid)
        if process.create_time() == place.created_s:
            for one in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    one.kill()


class RolloutWorker:
    """One engine; made into an actor by `posttrain.rollout.pool`."""

    def __init__(self, name: str, settings: EngineSettings) -> None:
        self.name = name
        self.engine = build_engine(settings)

    def ready(self) -> Place:
        """Blocks until the engine stands; says where it runs."""
        node_id = ray.get_runtime_context().get_node_id()
        return Place(os.getpid(), psutil.Process().create_time(), node_id)

    def generate(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> tuple[list[Group], float]:
        """Groups in the order asked, and the seconds it took."""
        started = time.monotonic()
        groups = self.engine.generate(requests, settings)
        return [replace(g, worker=self.name) for g in groups], time.monotonic() - started

    def score(self, request: PromptRequest, token_ids: Sequence[int]) -> list[float]:
        return self.engine.score(request, token_ids)

    def transfer_rpc(self, method: str, *arguments: Any) -> None:
        self.engine.transfer_rpc(method, *arguments)

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        self.engine.load_weights(weights)

    def load_adapter(self, files: Mapping[str, bytes], policy_version: int) -> None:
        self.engine.load_adapter(files, policy_version)

    def set_policy_version(self, policy_version: int) -> None:
        self.engine.set_policy_version(policy_version)

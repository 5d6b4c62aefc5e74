"""One process, two with ZeRO-2, two with ZeRO-3: same gradients, same update."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import ray
import torch
from probes import ProbeRank
from safetensors.torch import load

from posttrain.config import load_recipe
from posttrain.data.audio import load_audio
from posttrain.data.chat import encode
from posttrain.data.rows import read_rows
from posttrain.model.load import load_processor
from posttrain.train.learner import ScoredGroup
from posttrain.train.learner_group import LearnerGroup
from posttrain.train.resources import start_ray
from posttrain.types import Completion, Group, token_runs

pytestmark = pytest.mark.slow


def replayed_groups(nano: str, timelines: Path, count: int) -> list[ScoredGroup]:
    """Groups with random completions, log-probabilities and advantages: the same every time."""
    processor = load_processor(nano)
    rng = random.Random(0)
    groups = []
    for row in read_rows(timelines / "train.jsonl")[:count]:
        prompt = encode(processor, row.prompt, load_audio(row.audio))["input_ids"][0]
        completions = tuple(
            Completion(
                tuple(rng.randrange(300) for _ in range(length)),
                tuple(-6 - rng.random() for _ in range(length)), "", "stop", 0,
            )
            for length in (5, 9, 3, 12)
        )  # fmt: skip
        group = Group(row.id, row.id, token_runs(prompt.tolist()), completions)
        advantages = tuple(rng.uniform(-1, 1) for _ in completions)
        groups.append(ScoredGroup(row, group, advantages, (True, True, False, True)))
    return groups


def run_once(recipe_file: Path, groups: list[ScoredGroup], *overrides: str) -> tuple:
    recipe = load_recipe(
        recipe_file,
        ["algorithm.vllm_importance_sampling_mode=token_truncate", "algorithm.beta=0.01",
         "training.max_grad_norm=1000000", *overrides],
    )  # fmt: skip
    start_ray(recipe)
    assert ray.util.get_node_ip_address() == "127.0.0.1", "servers stay on loopback"
    try:
        learners = LearnerGroup(recipe, "cpu", ProbeRank)
        learners.build()
        _, shares = learners.shares(groups)
        calls = [
            rank.gradients_and_update.remote(share)
            for rank, share in zip(learners.ranks, shares, strict=True)
        ]
        return ray.get(calls)[0]
    finally:
        ray.shutdown()


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of `b`."""
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
    return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5


def test_two_processes_equal_one(recipe_file: Path, nano: str, timelines: Path) -> None:
    groups = replayed_groups(nano, timelines, 4)
    one = run_once(recipe_file, groups)
    for stage in (2, 3):
        compare(recipe_file, groups, one, stage)


def compare(recipe_file: Path, groups: list[ScoredGroup], one: tuple, stage: int) -> None:
    one_grad, before, one_after = one
    two_grad, _, two_after = run_once(
        recipe_file, groups, "learner.num_processes=2", f"learner.zero_stage={stage}"
    )
    gradient_difference = relative(two_grad, one_grad)
    update = {n: one_after[n] - before[n] for n in before}
    other = {n: two_after[n] - before[n] for n in before}
    update_difference = relative(other, update)
    print(f"zero-{stage}: gradients {gradient_difference:.2e}, update {update_difference:.2e}")
    assert len(one_grad) > 40
    assert gradient_difference <= 1e-5
    assert update_difference <= 0.01


def adapter_of(learners: LearnerGroup) -> dict[str, torch.Tensor]:
    return load(learners.call_first("adapter")["adapter_model.safetensors"])


def test_an_adapter_resumes_where_it_stopped(
    recipe_file: Path, nano: str, timelines: Path, tmp_path: Path
) -> None:
    """Two updates equal one, save, load in a fresh process, one: adapter, moments and dropout."""
    groups = replayed_groups(nano, timelines, 4)
    recipe = load_recipe(
        recipe_file,
        ["lora.enabled=true", "lora.r=4", "lora.dropout=0.1", "training.learning_rate=0.01",
         "algorithm.vllm_importance_sampling_correction=false"],
    )  # fmt: skip
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    start_ray(recipe)
    try:
        whole = LearnerGroup(recipe, "cpu")
        whole.build()
        start = adapter_of(whole)
        whole.update(groups, 0)
        whole.call_all("save", str(saved))
        whole.update(groups, 1)
        expected = adapter_of(whole)
        whole.stop()
        resumed = LearnerGroup(recipe, "cpu")
        resumed.build(str(saved))
        resumed.update(groups, 1)
        weights = adapter_of(resumed)
        resumed.stop()
    finally:
        ray.shutdown()
    assert (saved / "adapter" / "adapter_config.json").exists()
    assert relative(start, expected) > 1e-4
    assert relative(weights, expected) <= 1e-6

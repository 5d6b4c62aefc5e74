"""However a step is cut, it is the same: processes, ZeRO stages, parts, shares of a sequence."""

from __future__ import annotations

import random
from dataclasses import replace
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


VARIANTS = {
    "zero-2": ("learner.num_processes=2",),
    "zero-3, groups in parts": (
        "learner.num_processes=2", "learner.zero_stage=3", "training.micro_batch_tokens=260",
    ),
    "groups packed together": ("training.micro_batch_tokens=600",),
    "dense": ("shared_prefix.enabled=false",),
    "one sequence on two ranks": (
        "learner.num_processes=2", "learner.sequence_parallel_size=2",
        "training.micro_batch_tokens=600",
    ),
}  # fmt: skip


def test_a_step_is_the_same_however_it_is_cut(
    recipe_file: Path, nano: str, timelines: Path
) -> None:
    groups = replayed_groups(nano, timelines, 4)
    one_gradients, before, one_after = run_once(recipe_file, groups)
    assert len(one_gradients) > 40
    update = {n: one_after[n] - before[n] for n in before}
    for name, overrides in VARIANTS.items():
        gradients, _, after = run_once(recipe_file, groups, *overrides)
        gradient_difference = relative(gradients, one_gradients)
        update_difference = relative({n: after[n] - before[n] for n in before}, update)
        print(f"{name}: gradients {gradient_difference:.2e}, update {update_difference:.2e}")
        assert gradient_difference <= 1e-5, name
        assert update_difference <= 0.01, name


LORA = ("lora.enabled=true", "lora.r=4", "model.gradient_checkpointing=true",
        "training.micro_batch_tokens=600")  # fmt: skip


def test_ulysses_with_lora_and_zero_3_equals_one_rank(
    recipe_file: Path, nano: str, timelines: Path
) -> None:
    """Log-probabilities, gradients, and that completions do not see each other."""
    groups = replayed_groups(nano, timelines, 2)
    two = ("learner.num_processes=2", "learner.sequence_parallel_size=2", "learner.zero_stage=3")
    results = [with_logprobs(recipe_file, groups, *LORA, *more) for more in ((), two)]
    (logprobs, _, gradients), (shared_logprobs, changed, shared_gradients) = results
    largest = max(
        float((a - b).abs().max()) for a, b in zip(logprobs, shared_logprobs, strict=True)
    )
    difference = relative(shared_gradients, gradients)
    print(f"ulysses, zero-3, lora: logprobs {largest:.2e}, gradients {difference:.2e}")
    assert any("lora_A" in n and float(g.norm()) > 0 for n, g in gradients.items())
    assert largest <= 1e-5
    assert difference <= 1e-4
    leaks = [float((a - b).abs().max()) for a, b in zip(shared_logprobs, changed, strict=True)]
    assert sum(leak > 1e-3 for leak in leaks) == 1, "only the completion that was changed moves"
    assert sorted(leaks)[-2] <= 1e-6


def with_logprobs(recipe_file: Path, groups: list[ScoredGroup], *overrides: str) -> tuple:
    """Log-probabilities, those after one completion was changed, and gradients."""
    recipe = load_recipe(recipe_file, ["training.max_grad_norm=1000000", *overrides])
    first = groups[0].group
    other = replace(first.completions[1], token_ids=(7,) * 9)
    completions = (first.completions[0], other, *first.completions[2:])
    changed = [replace(groups[0], group=replace(first, completions=completions)), *groups[1:]]
    start_ray(recipe)
    try:
        learners = LearnerGroup(recipe, "cpu", ProbeRank)
        learners.build()
        _, shares = learners.shares(groups)
        _, changed_shares = learners.shares(changed)

        def ask(method: str, shares: list) -> object:
            pairs = zip(learners.ranks, shares, strict=True)
            return ray.get([getattr(rank, method).remote(share) for rank, share in pairs])[0]

        plain, moved = ask("logprobs", shares), ask("logprobs", changed_shares)
        return plain, moved, ask("gradients_and_update", shares)[0]
    finally:
        ray.shutdown()


def test_the_self_check_stops_a_run_that_differs(
    recipe_file: Path, nano: str, timelines: Path
) -> None:
    """With tolerances of 0 even rounding ends it; with the default ones it is logged, once."""
    groups = replayed_groups(nano, timelines, 4)
    recipe = load_recipe(recipe_file, ["algorithm.vllm_importance_sampling_correction=false"])
    start_ray(recipe)
    try:
        learners = LearnerGroup(recipe, "cpu")
        learners.build()
        first, second = learners.update(groups, 0), learners.update(groups, 1)
        learners.stop()
        recipe.shared_prefix.logprob_tolerance = 0.0
        strict = LearnerGroup(recipe, "cpu")
        strict.build()
        with pytest.raises(RuntimeError, match="shared_prefix.verify: packed and dense"):
            strict.update(groups, 0)
    finally:
        ray.shutdown()
    assert 0 < first["shared_prefix/logprob_diff"] <= 1e-4  # random tokens: 20 nats each
    assert 0 < first["shared_prefix/gradient_diff"] <= 1e-4
    assert "shared_prefix/logprob_diff" not in second
    assert first["train/micro_batches"] == 4


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

"""Every shipped recipe loads; the full-size model is built on the meta device."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import MusicFlamingoConfig, MusicFlamingoForConditionalGeneration

from posttrain.config import load_recipe
from posttrain.model.checkpoint_keys import canonical_key, module_key
from posttrain.model.lora import add_lora
from posttrain.model.policy import choose_trainable
from posttrain.train.deepspeed_config import deepspeed_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
FULL = ROOT / "recipes" / "grpo_long_audio.yaml"
CONFIG = ROOT / "benchmarks" / "af_next_config.json"

SHRUNK = (
    "run_name", "model.path", "model.dtype", "model.gradient_checkpointing", "lora.enabled",
    "model.train_encoder", "model.train_projector", "model.train_embeddings", "chains.teacher",
    "chains.max_tokens", "chains.chunk_rows", "teacher.path",
    "data.", "algorithm.beta", "sampling.max_completion_length", "training.", "learner.",
    "rollout.", "evaluation.num_rows", "reward_model.width", "reward_model.absent_phrases",
    "reward_model.feature_cache_gib", "rewards.audio_text_grounding.options.",
)  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    load_recipe(path)
    header = path.read_text().split("\n\n")[0]
    assert "observed" in header and "posttrain run" in header


@pytest.mark.parametrize(
    "name",
    [p.name for p in RECIPES if p.parent.name == "nano" and "\nbase:" in p.read_text()],
)
def test_nano_only_shrinks(name: str) -> None:
    """nano differs in model, data, sizes, counts, learning rate, KL, lengths and devices alone."""

    def flat(tree: dict, prefix: str = "") -> dict:
        out = {}
        for key, value in tree.items():
            out |= (
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return out

    path = ROOT / "recipes" / "nano" / name
    nano = flat(asdict(load_recipe(path)))
    of_same_name = ROOT / "recipes" / name
    base = path.parent / OmegaConf.load(path).base
    full = flat(asdict(load_recipe(of_same_name if of_same_name.exists() else base)))
    differing = [k for k in nano if nano[k] != full.get(k)]
    assert all(key.startswith(SHRUNK) for key in differing), differing


@pytest.fixture(scope="module")
def full_size() -> MusicFlamingoForConditionalGeneration:
    config = MusicFlamingoConfig(**json.loads(CONFIG.read_text()))
    with torch.device("meta"):
        return MusicFlamingoForConditionalGeneration(config)


def test_full_size_keys_are_canonical_and_invertible(full_size: torch.nn.Module) -> None:
    names = list(full_size.state_dict())
    canonical = [canonical_key(name) for name in names]
    assert len(set(canonical)) == len(names)
    assert [module_key(name) for name in canonical] == names
    assert {n.split(".")[0] for n in canonical} == {
        "audio_tower", "language_model", "multi_modal_projector",
    }  # fmt: skip
    assert "language_model.model.layers.27.mlp.down_proj.weight" in canonical
    assert "language_model.lm_head.weight" in canonical
    assert 8.0e9 < sum(p.numel() for p in full_size.parameters()) < 8.5e9


def test_full_size_lora_reaches_the_language_model_alone(full_size: torch.nn.Module) -> None:
    lora = load_recipe(FULL).lora
    choose_trainable(full_size, train_encoder=False, train_projector=False)
    wrapped = add_lora(
        full_size, r=lora.r, alpha=lora.alpha, dropout=lora.dropout,
        target_modules=lora.target_modules,
    )  # fmt: skip
    trainable = {n: p.numel() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(re.search(r"language_model\.layers\.\d+\.", name) for name in trainable)
    # r * (in + out) of q, k, v, o, gate, up, down in 28 layers
    per_layer = 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert sum(trainable.values()) == 28 * per_layer == 20_185_088
    assert len(trainable) == 28 * 7 * 2


def test_full_size_deepspeed_configuration() -> None:
    recipe = load_recipe(FULL)
    config = deepspeed_config(recipe, "cuda")
    assert config["zero_optimization"]["stage"] == 3
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["gradient_accumulation_steps"] == 1, "the learner itself marks the last backward"
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer"]["params"]["lr"] == 5e-6
    assert recipe.training.prompts_per_step == 8 * recipe.learner.num_processes
    assert recipe.rollout.max_model_len >= 45_026 + recipe.sampling.max_completion_length

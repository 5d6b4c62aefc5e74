"""Shared fixtures: the committed nano checkpoint, small timelines, a recipe to vary."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
NANO = ROOT / "checkpoints" / "af-next-nano"


@pytest.fixture(scope="session")
def nano() -> str:
    assert (NANO / "model.safetensors").exists(), "checkpoints/af-next-nano is part of the project"
    return str(NANO)


@pytest.fixture(scope="session")
def noise_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2.5 s of quiet noise at 16 kHz."""
    from posttrain.data.audio import write_audio

    path = tmp_path_factory.mktemp("clips") / "noise.wav"
    samples = 0.1 * np.random.default_rng(0).standard_normal(40_000)
    write_audio(path, samples.astype(np.float32))
    return str(path)


@pytest.fixture(scope="session")
def timelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train.jsonl (32 rows) and test.jsonl (8 rows) of 8 to 12 s."""
    from data_recipes.nano_clips import CLIP_NAMES
    from data_recipes.recorded_prompts import load_recordings
    from data_recipes.timelines import TimelineSpec, write_timelines

    out = tmp_path_factory.mktemp("timelines")
    tasks = {"grounding": 0.7, "dense": 0.2, "absent": 0.1}
    spec = TimelineSpec(duration_s=(8.0, 12.0), num_events=(3, 5), tasks=tasks)
    recordings = load_recordings("en")
    names = CLIP_NAMES if recordings.provenance == "recorded" else None
    write_timelines(
        recordings, spec, {"train": 32, "test": 8}, seed=5, out_dir=out, clip_names=names
    )
    return out


@pytest.fixture(scope="session")
def grpo_run(tmp_path_factory: pytest.TempPathFactory, timelines: Path) -> Path:
    """A finished run: two steps of GRPO on nano, with the transformers engine."""
    from posttrain.config import load_recipe
    from posttrain.train.kinds import run_recipe

    recipe = load_recipe(
        ROOT / "recipes" / "nano" / "grpo_long_audio.yaml",
        [
            f"output_dir={tmp_path_factory.mktemp('runs')}", "report_to=[]",
            "training.max_steps=2", "training.save_steps=2", "training.eval_steps=2",
            "training.prompts_per_step=2", "evaluation.num_rows=4", "learner.num_processes=1",
            "rollout.engine=transformers", f"model.path={NANO}",
            f"data.train.main.path={timelines / 'train.jsonl'}",
            f"data.held_out.main.path={timelines / 'test.jsonl'}",
            f"data.reported.unheard.path={timelines / 'test.jsonl'}",
        ],
    )  # fmt: skip
    return run_recipe(recipe)


@pytest.fixture
def recipe_file(tmp_path: Path, nano: str, timelines: Path) -> Path:
    """A GRPO recipe on nano with one learner and one vLLM worker; tests override the rest."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
kind: grpo
output_dir: {tmp_path / "runs"}
report_to: []
model: {{path: {nano}, dtype: float32, gradient_checkpointing: false}}
data:
  train: {{main: {{path: {timelines / "train.jsonl"}}}}}
rewards: {{timestamp_grounding: {{weight: 1.0}}, format: {{weight: 0.1}}}}
sampling: {{num_generations: 4, max_completion_length: 96}}
algorithm: {{beta: 0.0}}
training: {{max_steps: 2, prompts_per_step: 4, learning_rate: 1.0e-4, save_steps: 100,
           eval_steps: null, warmup_ratio: 0.0}}
learner: {{num_processes: 1, zero_stage: 2, device: cpu, threads_per_process: 1}}
rollout: {{device: cpu, max_model_len: 1024, threads_per_worker: 2, timeout_s: 240}}
"""
    )
    return path

"""What goes wrong on the way: lost workers, NaN, nothing but truncated completions, bad data."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from probes import run
from safetensors.torch import load_file

from posttrain.config import load_recipe
from posttrain.rollout.weight_sync import WeightSync
from posttrain.train import grpo

pytestmark = pytest.mark.slow


def test_lost_workers_are_replaced_and_every_group_trains_once(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 0 is killed while it generates for the second step, and frozen in the third.

    Worker 1 is killed in the middle of the third sync: after it answered, before weights flow.
    """
    plain_sample = grpo.GrpoLoop.sample
    faults = {1: signal.SIGKILL, 2: signal.SIGSTOP}

    def sample(self: grpo.GrpoLoop, rows: object, step: int) -> object:
        pool = self.cluster.pool
        pool.timeout_s = 20.0 if step in faults else 240.0
        if step in faults:
            threading.Timer(0.1, os.kill, (pool.pids()[0], faults[step])).start()
        return plain_sample(self, rows, step)

    plain_send = WeightSync._send

    def send(self: WeightSync) -> int:
        if self.policy_version == 3 and self.pool.restarts == 2:
            os.kill(self.pool.pids()[1], signal.SIGKILL)
        return plain_send(self)

    monkeypatch.setattr(grpo.GrpoLoop, "sample", sample)
    monkeypatch.setattr(WeightSync, "_send", send)
    folder = run(
        recipe_file,
        "training.max_steps=4",
        "rollout.num_workers=2",
        "rollout.max_restarts=3",
        "rollout.threads_per_worker=1",
        "training.prompts_per_step=8",
        "sampling.max_completion_length=160",
        "training.learning_rate=1e-3",
    )
    metrics = folder.read_jsonl("metrics.jsonl")
    assert [m["rollout/reissued_groups"] >= 1 for m in metrics] == [False, True, True, False]
    assert metrics[3]["engine/logprob_diff_max"] <= 1e-4, "new workers serve the new policy"
    rollouts = folder.read_jsonl("rollouts.jsonl")
    trained = [(r["group_id"], r["index"]) for r in rollouts]
    assert len(trained) == len(set(trained)) == 4 * 8 * 4
    assert folder.load_json("summary.json")["worker_restarts"] == 4


def test_a_nan_loss_leaves_the_weights_alone(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, nano: str
) -> None:
    """An advantage of NaN makes loss and gradients NaN; steps are skipped, then the run stops."""
    monkeypatch.setattr(
        grpo, "advantages_of",
        lambda results, reward, algorithm: (
            torch.full((len(results), len(results[0])), float("nan")), {"reward/mean": 0.0},
        ),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        run(
            recipe_file, "training.max_steps=3", "training.max_skipped_steps=2",
            "training.save_steps=1", "rollout.engine=transformers", "run_name=nan",
        )  # fmt: skip
    folder = load_recipe(recipe_file).output_dir
    saved = load_file(Path(folder) / "nan/checkpoints/step-000001/model/model.safetensors")
    start = load_file(Path(nano) / "model.safetensors")
    assert all(torch.equal(saved[name], start[name]) for name in start)


def test_every_completion_truncated_is_an_error_that_says_what_to_do(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="raise sampling.max_completion_length"):
        run(recipe_file, "sampling.max_completion_length=2", "rollout.engine=transformers")


def test_more_gpus_than_there_are(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="learner.device=cuda: no GPU here"):
        run(recipe_file, "learner.device=cuda")


def test_missing_audio_names_the_file(recipe_file: Path, tmp_path: Path, timelines: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = (timelines / "train.jsonl").read_text().replace("audio/train-", "audio/gone-")
    rows.write_text(text.replace('"audio": "', f'"audio": "{timelines}/'))
    with pytest.raises(FileNotFoundError, match="gone-"):
        run(recipe_file, f"data.train.main.path={rows}", "rollout.engine=transformers")

"""The whole loop on the real engines: sync, resume, faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.config import load_recipe
from posttrain.rollout.weight_sync import WeightSync
from posttrain.train import grpo
from posttrain.train.run_folder import RunFolder

pytestmark = pytest.mark.slow


def run(recipe_file: Path, *overrides: str) -> RunFolder:
    recipe = load_recipe(recipe_file, list(overrides))
    folder = grpo.train(recipe)
    finished = object.__new__(RunFolder)
    finished.path = folder
    return finished


@pytest.mark.parametrize("lora", ["false", "true"])
def test_engines_agree_after_three_steps_with_sync(recipe_file: Path, lora: str) -> None:
    """Step 4 samples from weights that were synced three times; the learner scores those tokens."""
    folder = run(
        recipe_file,
        f"lora.enabled={lora}",
        "lora.r=4",
        "training.max_steps=4",
        "training.prompts_per_step=2",
        "training.learning_rate=1e-3",
    )
    metrics = folder.read_jsonl("metrics.jsonl")
    last = metrics[-1]
    print(
        f"lora={lora}: max diff {last['engine/logprob_diff_max']:.2e}, "
        f"sync {last['sync/seconds']:.3f} s, {last['sync/bytes']:.0f} bytes"
    )
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert any(m["train/grad_norm"] > 0 for m in metrics[:3]), "the synced weights are new ones"
    assert all(m["train/skipped"] == 0 for m in metrics)
    assert last["engine/logprob_diff_max"] <= 1e-5
    versions = {r["policy_version"] for r in folder.read_jsonl("rollouts.jsonl") if r["step"] == 4}
    assert versions == {3}
    checkpoint = folder.path / "checkpoints" / "step-000004"
    if lora == "true":
        assert (checkpoint / "adapter" / "adapter_config.json").exists()
    else:
        names = load_file(checkpoint / "model" / "model.safetensors").keys()
        assert all(n.startswith(("audio_", "language_model.", "multi_")) for n in names)


def test_six_steps_equal_three_resumed_for_three(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano: str
) -> None:
    """When step 5 begins the run folder is copied, as a killed run would have left it, and resumed.

    The copy holds the checkpoint of step 3 and the logs of step 4, which has to be done again.
    """
    common = ("training.max_steps=6", "training.save_steps=3", "training.learning_rate=3e-4",
              "learner.num_processes=2", "run_name=six")  # fmt: skip
    killed = tmp_path / "killed"
    plain_step = grpo.GrpoLoop.step

    def step_after_copy(self: grpo.GrpoLoop, step: int) -> None:
        if step == 4:
            shutil.copytree(self.run.path, killed / "six")
        plain_step(self, step)

    monkeypatch.setattr(grpo.GrpoLoop, "step", step_after_copy)
    whole = run(recipe_file, *common)
    monkeypatch.setattr(grpo.GrpoLoop, "step", plain_step)
    logged = (killed / "six" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2, 3, 4]
    parts = run(recipe_file, *common, f"output_dir={killed}")
    assert parts.path == killed / "six"

    def rollouts(folder: RunFolder) -> list[tuple]:
        keys = ("step", "group_id", "index", "completion", "reward")
        return [tuple(r[k] for k in keys) for r in folder.read_jsonl("rollouts.jsonl")]

    assert rollouts(parts) == rollouts(whole)
    start = load_file(Path(nano) / "model.safetensors")
    ends = [
        load_file(f.path / "checkpoints" / "step-000006" / "model" / "model.safetensors")
        for f in (whole, parts)
    ]
    update = sum(float((ends[0][n] - start[n]).square().sum()) for n in start) ** 0.5
    difference = sum(float((ends[0][n] - ends[1][n]).square().sum()) for n in start) ** 0.5
    print(f"update norm {update:.3e}, difference {difference:.3e}")
    assert update > 0 and difference <= 0.01 * update


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
        "rollout.max_restarts=4",
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
        lambda results, scale: (
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

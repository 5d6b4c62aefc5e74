"""The encoder runs once a clip, whatever runs; what crosses Ray does not grow with the clip."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from probes import BytesThroughRay, run

from posttrain.data.audio import write_audio
from posttrain.data.rows import read_rows

pytestmark = pytest.mark.slow
COUNTER = Path(__file__).parent.parent / "encoder_counter"


def encoder_calls(path: Path) -> Counter[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.split()[1] for line in lines)


def test_three_epochs_encode_every_clip_once(
    recipe_file: Path, timelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted inside the encoder, in all processes: 4 training clips, 2 held out, 6 calls.

    Clips are shorter than the encoder's batch of windows, so a clip is one call. Two learner
    ranks, a reference policy and evaluation before and after all want the same clips.
    """
    calls = tmp_path / "calls"
    monkeypatch.setenv("ENCODER_CALLS", str(calls))
    path = os.pathsep.join([str(COUNTER), os.environ["PYTHONPATH"]])
    monkeypatch.setenv("PYTHONPATH", path)
    folder = run(
        recipe_file, f"audio_embeddings.dir={tmp_path / 'store'}", "data.train.main.max_rows=4",
        f"data.held_out.test.path={timelines / 'test.jsonl'}", "evaluation.num_rows=2",
        "training.max_steps=3", "algorithm.beta=0.01", "learner.num_processes=2",
    )  # fmt: skip
    rows = [*read_rows(timelines / "train.jsonl")[:4], *read_rows(timelines / "test.jsonl")[:2]]
    assert len({row.audio for row in rows}) == 6
    trained = Counter(r["prompt_id"] for r in folder.read_jsonl("rollouts.jsonl"))
    assert set(trained.values()) == {3 * 4}, "three epochs, four completions each"
    assert sum(encoder_calls(calls).values()) == 6, encoder_calls(calls)
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 6


def test_a_training_encoder_bypasses_the_store(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns, its new weights reach the engine, nothing is stored, and the counter counts."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("ENCODER_CALLS", str(calls))
    path = os.pathsep.join([str(COUNTER), os.environ["PYTHONPATH"]])
    monkeypatch.setenv("PYTHONPATH", path)
    folder = run(
        recipe_file, f"audio_embeddings.dir={tmp_path / 'store'}", "model.train_encoder=true",
        "model.train_projector=true", "training.max_steps=2", "training.prompts_per_step=2",
        "training.learning_rate=1e-3",
    )  # fmt: skip
    metrics = folder.read_jsonl("metrics.jsonl")
    assert metrics[-1]["engine/logprob_diff_max"] <= 1e-4
    assert not (tmp_path / "store").exists()
    counted = encoder_calls(calls)
    assert sum(counted.values()) >= 4, counted


def test_a_training_projector_keeps_encoder_outputs(recipe_file: Path, tmp_path: Path) -> None:
    """The engine projects them with the weights it was sent: both sides agree after a sync."""
    folder = run(
        recipe_file, f"audio_embeddings.dir={tmp_path / 'store'}", "model.train_projector=true",
        "training.max_steps=3", "training.prompts_per_step=2", "training.learning_rate=1e-3",
    )  # fmt: skip
    metrics = folder.read_jsonl("metrics.jsonl")
    assert any(m["train/grad_norm"] > 0 for m in metrics[:2])
    assert metrics[-1]["engine/logprob_diff_max"] <= 1e-4
    assert list((tmp_path / "store").glob("*.safetensors"))


def bytes_of_a_step(recipe_file: Path, folder: Path, minutes: int) -> tuple[float, float]:
    """(bytes that crossed Ray in a step, prompt tokens) with clips of that length."""
    rows = folder / f"{minutes}.jsonl"
    lines = []
    for i in range(2):
        audio = folder / f"{minutes}-{i}.wav"
        samples = 0.1 * np.random.default_rng(i).standard_normal(minutes * 60 * 16_000)
        write_audio(audio, samples.astype(np.float32))
        lines.append({
            "id": f"clip-{i}", "audio": str(audio), "duration_s": minutes * 60.0,
            "task": "grounding", "source": "noise", "query": "seven",
            "prompt": [{"role": "user", "content": "When is seven heard?"}],
            "events": [{"start_s": 1.0, "end_s": 2.0, "label": "seven"}],
        })  # fmt: skip
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with BytesThroughRay() as counter:
        run_folder = run(
            recipe_file, f"data.train.main.path={rows}", "run_name=" + f"m{minutes}",
            f"audio_embeddings.dir={folder / 'store'}", "training.prompts_per_step=1",
            "rollout.max_model_len=16384", "sampling.max_completion_length=8",
            "sampling.num_generations=2", "scoring.truncated=score", "training.max_steps=1",
            "learner.threads_per_process=2",
        )  # fmt: skip
    tokens = run_folder.read_jsonl("metrics.jsonl")[-1]["rollout/prompt_tokens"]
    return counter.steps[0], tokens


def test_bytes_through_ray_do_not_grow_with_the_clip(recipe_file: Path, tmp_path: Path) -> None:
    (short, short_tokens), (long, long_tokens) = (
        bytes_of_a_step(recipe_file, tmp_path, minutes) for minutes in (1, 10)
    )
    print(f"1 min: {short:.0f} bytes ({short_tokens:.0f} tokens), 10 min: {long:.0f} bytes "
          f"({long_tokens:.0f} tokens)")  # fmt: skip
    assert long_tokens > 9 * short_tokens
    assert abs(long - short) <= 0.05 * short

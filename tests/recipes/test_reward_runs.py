"""Learned rewards end to end: one is trained, and a GRPO run asks all kinds of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from probes import run

from posttrain.cli import main
from posttrain.config import load_recipe
from posttrain.data.rows import read_rows
from posttrain.model.audio_text_model import AudioTextModel
from posttrain.train.rewards import check_rewards

pytestmark = pytest.mark.slow
HEAD = Path(__file__).parents[2] / "checkpoints" / "af-next-nano-grounding"


def test_a_reward_is_trained_reported_and_loaded_again(
    tmp_path: Path, nano: str, timelines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "reward.yaml"
    recipe.write_text(
        f"""
kind: reward
output_dir: {tmp_path / "runs"}
report_to: []
model: {{path: {nano}}}
data:
  train: {{main: {{path: {timelines / "train.jsonl"}}}}}
  held_out: {{main: {{path: {timelines / "test.jsonl"}}}}}
reward_model: {{width: 32, batch_size: 8, absent_phrases: 4}}
training: {{max_steps: 60, learning_rate: 5.0e-3, warmup_ratio: 0.2}}
learner: {{device: cpu}}
"""
    )
    assert main(["run", str(recipe)]) == 0
    folder = tmp_path / "runs" / "reward"
    losses = [json.loads(x)["train/loss"] for x in (folder / "metrics.jsonl").open()]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    scores = json.loads((folder / "summary.json").read_text())["scores"]["main"]
    assert scores["clips"] == 8 and scores["true_above_shifted"]["value"] > 0.6
    for name in ("auc", "ece", "true_above_shifted"):
        low, high = scores[name]["ci95"]
        assert 0 <= low <= high <= 1
    assert "| main | 8 |" in (folder / "reward_model" / "README.md").read_text()
    assert "true above" in capsys.readouterr().out
    model = AudioTextModel(str(folder / "reward_model"))
    row = read_rows(timelines / "test.jsonl")[0]
    relevance, frame_s = model.relevance(str(row.audio), "seven")
    assert len(relevance) == pytest.approx((row.duration_s or 0) / frame_s, abs=1)
    assert all(0 <= p <= 1 for p in relevance)


def test_the_committed_reward_tells_true_claims_from_false(nano: str, timelines: Path) -> None:
    model = AudioTextModel(str(HEAD), nano)
    claims, truth = [], []
    for row in read_rows(timelines / "test.jsonl"):
        for event in row.events:
            length_s = event.end_s - event.start_s
            claims += [
                (str(row.audio), event.label, event.start_s, event.end_s),
                (str(row.audio), event.label, event.start_s + length_s, event.end_s + length_s),
                (str(row.audio), "not a sound of this clip", event.start_s, event.end_s),
            ]
            truth += [True, False, False]
    probabilities = model.claims_batch(claims)
    right = [(p > 0.5) == t for p, t in zip(probabilities, truth, strict=True)]
    assert sum(right) / len(right) > 0.9


def unlabelled(timelines: Path, out: Path) -> Path:
    """The training rows without events and answers; audio paths made absolute."""
    with out.open("w") as lines:
        for row in read_rows(timelines / "train.jsonl"):
            if row.task.value == "grounding":
                record = {
                    "id": row.id, "prompt": list(row.prompt), "audio": row.audio,
                    "duration_s": row.duration_s, "task": "grounding", "query": row.query,
                }  # fmt: skip
                lines.write(json.dumps(record) + "\n")
    return out


def test_grpo_asks_learned_and_own_rewards_without_labels(
    recipe_file: Path, timelines: Path, tmp_path: Path
) -> None:
    rows = unlabelled(timelines, tmp_path / "unlabelled.jsonl")
    folder = run(
        recipe_file,
        f"data.train.main.path={rows}",
        "rollout.engine=transformers",
        "training.max_steps=1",
        "training.prompts_per_step=2",
        "sampling.max_completion_length=64",
        "algorithm.multi_objective_aggregation=normalize_then_sum",
        "rewards.timestamp_grounding.weight=0",
        f"rewards.audio_text_grounding.options.head={HEAD}",
        "rewards.evidence_ablation.weight=0.1",
        "rewards.evidence_ablation.gate=audio_text_grounding",
        "rewards.moody.path=probes:moody",
        "rewards.moody.options.every=4",
        "scoring.truncated=score",
    )
    (metrics,) = folder.read_jsonl("metrics.jsonl")
    rollouts = folder.read_jsonl("rollouts.jsonl")
    errored = [r for r in rollouts if r["status"] == "errored"]
    assert len(rollouts) == 8 and metrics["reward/errored"] == len(errored)
    assert all("unlucky length" in r["reason"] and r["reward"] is None for r in errored)
    scored = [r for r in rollouts if r["status"] == "scored"]
    assert scored and all("moody" in r["breakdown"] for r in scored)
    assert all(0 <= r["breakdown"]["audio_text_grounding"] <= 1 for r in scored)
    assert all("evidence_ablation" in r["breakdown"] for r in scored)
    assert not any("timestamp_grounding" in r["breakdown"] for r in scored)  # no labels
    assert json.loads((folder.path / "prior.json").read_text())["grounding"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards.audio_text_grounding.weight=1", "options.head: give the folder"),
        ("rewards.audio_text_grounding.options.head=nowhere", "no audio_text_grounding.safe"),
        ("rewards.timestamp_grounding.options.pakced=accept", "pakced: unknown option"),
        ("scoring.prior=nowhere.json", "prior nowhere.json"),
        ("rewards.mine.path=nowhere:fn", r"rewards.mine.path=nowhere:fn"),
    ],
)
def test_rewards_are_checked_before_anything_starts(
    recipe_file: Path, timelines: Path, override: str, message: str
) -> None:
    rows = [r for r in read_rows(timelines / "train.jsonl") if r.task.value == "grounding"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_rewards(load_recipe(recipe_file, [override]), rows)


def test_rows_without_labels_need_a_learned_reward(
    recipe_file: Path, timelines: Path, tmp_path: Path
) -> None:
    rows = read_rows(unlabelled(timelines, tmp_path / "unlabelled.jsonl"))
    with pytest.raises(ValueError, match="row has no labelled events"):
        check_rewards(load_recipe(recipe_file), rows)

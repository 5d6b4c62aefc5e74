"""Every nano recipe of supervised training and distillation, for two steps.

Where vLLM is not what is tested, answers come from the transformers engine, which starts faster.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from data_recipes import refusals
from data_recipes.timestamp_pairs import make_pairs
from posttrain.cli import main
from posttrain.config import load_recipe
from posttrain.data.pairs import read_pairs, write_pairs
from posttrain.data.rows import read_rows, write_rows
from posttrain.model.load import load_model
from posttrain.train.batches import question_rows
from posttrain.train.distill import gather_chains
from posttrain.train.kinds import run_recipe
from posttrain.train.resources import ray_session
from posttrain.types import GateFailed, Task

pytestmark = pytest.mark.slow
NANO = Path(__file__).parents[2] / "recipes" / "nano"


@pytest.fixture
def small(timelines: Path, tmp_path: Path, nano: str) -> list[str]:
    """Overrides that keep a nano recipe as it is, but for two steps on a few rows."""
    for split in ("train", "test"):
        rows = [r for r in read_rows(timelines / f"{split}.jsonl") if r.task.value == "grounding"]
        write_rows(tmp_path / f"{split}.jsonl", rows)
        write_pairs(tmp_path / f"{split}_pairs.jsonl", make_pairs(rows)[:32])
    return [
        f"output_dir={tmp_path / 'runs'}", "report_to=[]", "training.max_steps=2",
        "training.save_steps=2", "training.eval_steps=2", "training.prompts_per_step=4",
        f"model.path={nano}", f"data.held_out.main.path={tmp_path / 'test.jsonl'}",
    ]  # fmt: skip


def run(name: str, small: list[str], *more: str) -> tuple[Path, dict]:
    folder = run_recipe(load_recipe(NANO / name, [*small, *more]))
    return folder, json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("name", ["sft.yaml", "sft_full_zero3.yaml"])
def test_sft(name: str, small: list[str], tmp_path: Path) -> None:
    folder, summary = run(
        name, small, f"data.train.main.path={tmp_path / 'train.jsonl'}",
        "training.per_device_train_batch_size=2", "rollout.engine=transformers",
    )  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics if "train/loss" in m] == [1, 2]
    held_out = [m["held_out/main_loss"] for m in metrics if "held_out/main_loss" in m]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    assert summary["held_out"]["n"] > 0 and "paired_diff" in summary["held_out"]
    assert (folder / "checkpoints" / "step-000002" / "model" / "model.safetensors").exists()
    assert summary["tokenizer"]["en"]["tokens_a_word"] > 0


def test_dpo(small: list[str], tmp_path: Path) -> None:
    _, summary = run(
        "dpo_timestamps.yaml", small, f"data.train.main.path={tmp_path / 'train_pairs.jsonl'}",
        f"data.held_out_pairs.main.path={tmp_path / 'test_pairs.jsonl'}",
        "training.per_device_train_batch_size=2", "rollout.engine=transformers",
    )  # fmt: skip
    before, after = (summary["held_out_metrics"][when] for when in ("before", "after"))
    assert before["held_out/main_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert after["held_out/main_loss"] < before["held_out/main_loss"]
    assert 0 <= after["held_out/main_ranked_wrong"] <= 1
    held_out = Counter(pair.kind for pair in read_pairs(tmp_path / "test_pairs.jsonl"))
    wrong = sum(n * after[f"held_out/main_ranked_wrong_{kind}"] for kind, n in held_out.items())
    assert wrong == pytest.approx(after["held_out/main_ranked_wrong"] * held_out.total())
    assert sum(summary["pair_kinds"].values()) == summary["pairs"] == 32


def test_temporal_cot_distillation(small: list[str], tmp_path: Path, nano: str) -> None:
    """nano as its own teacher: most of its chains are rejected, each for a reason."""
    options = [
        f"data.train.main.path={tmp_path / 'train.jsonl'}", f"chains.teacher={nano}",
        "chains.min_true=0.3", "chains.min_answer=0.2", "chains.num_chains=16",
        "chains.blind_samples=2", "chains.chunk_rows=8", "training.prompts_per_step=2",
        "training.per_device_train_batch_size=1",
    ]  # fmt: skip
    recipe = load_recipe(NANO / "temporal_cot_distill.yaml", [*small, *options])
    recipe.data.held_out = {}  # evaluation is every other recipe's
    folder = run_recipe(recipe)
    report = json.loads((folder / "summary.json").read_text())["chains"]
    assert report["kept"] >= 2 and report["chains"] == 16 * report["rows"]
    counted = sum(report["rejected_chains"].values())
    assert 0 < counted < report["chains"] and report["cited_times_a_chain"] >= 1
    kept = read_rows(folder / "chains" / "rows.jsonl")
    assert all("</think>" in row.answer for row in kept)
    assert "chains" in json.loads((folder / "chains" / "report.json").read_text())

    left = tmp_path / "left by a kill"
    shutil.copytree(folder / "chains", left)
    _, second, *others = sorted((left / "chunks").glob("*.json"))
    for path in (left / "rows.jsonl", left / "report.json", second, *others):
        path.unlink()
    (left / "chunks" / f".{second.name}.partial").write_text('[{"id": "cut')
    with ray_session(recipe):
        gather_chains(recipe, question_rows(recipe), left)
    for name in ("rows.jsonl", "report.json", f"chunks/{second.name}"):
        assert (left / name).read_bytes() == (folder / "chains" / name).read_bytes()


def test_on_policy_distillation(small: list[str], tmp_path: Path, nano: str) -> None:
    """With itself as teacher there is nothing to learn: reverse KL and gradients are 0."""
    folder, _ = run(
        "temporal_cot_on_policy.yaml", small, f"data.train.main.path={tmp_path / 'train.jsonl'}",
        f"teacher.path={nano}", "evaluation.num_rows=4",
    )  # fmt: skip
    first, *_ = (json.loads(line) for line in (folder / "metrics.jsonl").open())
    assert abs(first["train/teacher_kl"]) <= 1e-5
    assert first["train/grad_norm"] <= 1e-3


def test_a_ladder_climbs_from_stage_to_stage(small: list[str], tmp_path: Path, nano: str) -> None:
    file = tmp_path / "ladder.yaml"
    rows, pairs = tmp_path / "train.jsonl", tmp_path / "train_pairs.jsonl"
    step = (
        "training.max_steps=1, training.save_steps=1, training.prompts_per_step=4, "
        "training.per_device_train_batch_size=2, rollout.engine=transformers"
    )
    file.write_text(
        f"""
kind: ladder
output_dir: {tmp_path / "runs"}
model: {{path: {nano}}}
data: {{held_out: {{main: {{path: {tmp_path / "test.jsonl"}}}}}}}
stages:
  adapter:
    recipe: {NANO / "sft.yaml"}
    overrides: [{step}, lora.enabled=true, data.train.main.path={rows}]
  preferred:
    recipe: {NANO / "dpo_timestamps.yaml"}
    overrides: [{step}, data.train.main.path={pairs}, rollout.timeout_s=299,
                "data.held_out_pairs.main.path={tmp_path / "test_pairs.jsonl"}"]
  polished:
    recipe: {NANO / "sft.yaml"}
    overrides: [{step}, rollout.timeout_s=299, data.train.main.path={rows}]
"""
    )
    assert main(["run", str(file)]) == 0
    summary = json.loads((tmp_path / "runs" / "ladder" / "summary.json").read_text())
    base, adapter, preferred, _ = summary["stages"]
    assert [s["name"] for s in summary["stages"]] == ["base", "adapter", "preferred", "polished"]
    assert base["model"] == nano and adapter["model"].endswith("merged/step-000001")
    assert adapter["score"] == pytest.approx(preferred["before"]["miou"]), "the merged model is it"
    assert {"mean", "ci95"} <= preferred["paired_diff"].keys()
    stages = tmp_path / "runs" / "ladder" / "stages"
    assert not _known_before(stages / "preferred"), "another engine setting: asked again"
    assert _known_before(stages / "polished") == str(stages / "preferred/held_out/after.json")
    start = json.loads((stages / "polished/held_out/before.json").read_text())
    end = json.loads((stages / "preferred/held_out/after.json").read_text())
    assert start == end | {"step": 0}


def _known_before(run: Path) -> str | None:
    recipe: str | None = OmegaConf.load(run / "recipe.yaml").evaluation.before
    return recipe


def test_a_new_language_is_learned_by_adapter_ear_and_spelling(
    small: list[str], tmp_path: Path, nano: str
) -> None:
    for split, name in (("train", "target"), ("train", "old"), ("test", "target_test")):
        rows = read_rows(tmp_path / f"{split}.jsonl")
        spoken = [
            replace(row, id=f"{name}/{row.id}", task=Task.TRANSCRIPT,
                    answer=" ".join(event.label for event in row.events))
            for row in rows
        ]  # fmt: skip
        write_rows(tmp_path / f"{name}.jsonl", spoken)
    write_rows(tmp_path / "refusals.jsonl", refusals.rows(tmp_path / "refusals")[:2])
    sources = {
        "train.main": "target", "replay.old": "old", "replay.times": "train",
        "held_out.main": "target_test", "reported.old_language": "target_test",
        "reported.times": "test", "reported.unheard": "test", "reported.harmful": "refusals",
        "reported.harmless": "refusals",
    }  # fmt: skip
    options = [f"data.{name}.path={tmp_path / file}.jsonl" for name, file in sources.items()]
    options += ["training.per_device_train_batch_size=2", "rollout.engine=transformers"]
    with pytest.raises(GateFailed, match="learned: cer of main"):
        run("lora_new_language.yaml", small, *options, "gates.learned.worst=-1")
    folder = tmp_path / "runs" / "lora_new_language"
    summary = json.loads((folder / "summary.json").read_text())
    assert [gate["name"] for gate in summary["gates"]] == [
        "learned", "old_language", "times", "refusal", "over_refusal"
    ]  # fmt: skip
    saved = folder / "checkpoints" / "step-000002"
    before, after = (load_model(path).state_dict() for path in (nano, saved / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    beside = {"audio_tower", "multi_modal_projector", "embed_tokens", "lm_head"}
    assert {part for part in beside if any(part in name for name in changed)} == beside
    assert all(any(part in name for part in beside) for name in changed), changed
    adapter = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert all("language_model" in name for name in adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_gate_that_fails_marks_the_checkpoint_and_exits_with_3(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *small, f"data.train.main.path={tmp_path / 'train.jsonl'}",
        "training.per_device_train_batch_size=2", "training.max_steps=1", "training.save_steps=1",
        "rollout.engine=transformers",
        "gates.times.source=main", "gates.times.metric=miou", "gates.times.worst=1.0",
    ]  # fmt: skip
    assert main(["run", str(NANO / "sft.yaml"), *options]) == 3
    assert "gate: times: miou of main" in capsys.readouterr().err
    (gate,) = json.loads(
        (tmp_path / "runs" / "sft" / "checkpoints" / "step-000001" / "gates.json").read_text()
    )
    assert gate["passed"] is False and "at least 1 demanded" in gate["broken"][0]
    summary = json.loads((tmp_path / "runs" / "sft" / "summary.json").read_text())
    assert summary["gates"] == [gate], "the run is finished, and says so"


def test_rows_are_selected_by_how_often_they_are_answered(
    small: list[str], tmp_path: Path, nano: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.jsonl"
    command = [
        "data", "select", str(tmp_path / "train.jsonl"), "--model", nano, "--out", str(out),
        "--pass-rate", "0.25..0.75", "--set", "model.dtype=float32", "rollout.max_model_len=1024",
        "sampling.max_completion_length=96",
    ]  # fmt: skip
    assert main(command) == 0
    kept, asked = read_rows(out), read_rows(tmp_path / "train.jsonl")
    assert 0 < len(kept) < len(asked)
    shares = [row.metadata["selection"]["pass_rate"] for row in kept]
    assert all(0.25 <= share <= 0.75 for share in shares)
    assert f"{len(kept)} of {len(asked)} rows" in capsys.readouterr().out
    before = out.read_bytes()
    assert main(command) == 0 and out.read_bytes() == before, "nothing is asked twice"
    assert main([*command, "sampling.temperature=0.5"]) == 2, "samples of another temperature"

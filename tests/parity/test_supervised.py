"""SFT and DPO under SFTTrainer and DeepSpeed: a step is the same however it is cut; resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from probes import plain_sum
from safetensors.torch import load_file

from data_recipes.timestamp_pairs import make_pairs
from posttrain.config import load_recipe
from posttrain.data.pairs import write_pairs
from posttrain.data.rows import read_rows
from posttrain.model.load import load_model
from posttrain.train.supervised import train

pytestmark = pytest.mark.slow
SFT = ("kind=sft", "rewards={}", "training.max_steps=2", "training.warmup_ratio=0",
       "training.lr_scheduler_type=linear", "training.learning_rate=1e-3",
       "training.prompts_per_step=4", "training.max_grad_norm=1000000")  # fmt: skip


def finish(recipe_file: Path, *overrides: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Runs to the end: logged steps, and the last checkpoint's weights, an adapter's among them."""
    folder = train(load_recipe(recipe_file, list(overrides)))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    last = max((folder / "checkpoints").glob("step-*"))
    files = [*last.glob("adapter/*.safetensors"), *last.glob("model/*.safetensors")]
    return metrics, {name: tensor for file in files for name, tensor in load_file(file).items()}


def relative(a: dict, b: dict, start: dict) -> float:
    """Difference of two ends over the way from the start."""
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in b)
    return (difference / sum(float((b[n] - start[n]).double().square().sum()) for n in b)) ** 0.5


def steps(metrics: list[dict], name: str) -> list[float]:
    return [m[name] for m in metrics if name in m]


@pytest.fixture
def pairs_file(timelines: Path, tmp_path: Path) -> Path:
    rows = [r for r in read_rows(timelines / "train.jsonl") if r.task.value != "absent"]
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(rows)[:24])
    return tmp_path / "pairs.jsonl"


CUTS = {
    "two processes, ZeRO-2": ("learner.num_processes=2", "training.per_device_train_batch_size=2"),
    "two processes, ZeRO-3, accumulated": ("learner.num_processes=2", "learner.zero_stage=3"),
}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_supervised_step_is_the_same_however_it_is_cut(
    recipe_file: Path, nano: str, pairs_file: Path, tmp_path: Path, kind: str
) -> None:
    """Against one process that forwards the whole batch at once: losses and weights."""
    more: tuple[str, ...] = (f"kind={kind}",)
    if kind == "dpo":
        more += (f"data.train.main.path={pairs_file}", "dpo.beta=0.2", "dpo.sft_weight=0.1")
    start = load_file(Path(nano) / "model.safetensors")
    whole = ("training.per_device_train_batch_size=4", "run_name=whole")
    expected, weights = finish(recipe_file, *SFT, *more, *whole)
    losses = steps(expected, "train/loss")
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    # DPO differs in its loss and its reference: one cut that holds both is enough
    cuts = CUTS if kind == "sft" else {k: v for k, v in CUTS.items() if "ZeRO-3" in k}
    for name, cut in cuts.items():
        run_name = f"run_name={len(list(tmp_path.glob('runs/*')))}"
        metrics, end = finish(recipe_file, *SFT, *more, *cut, run_name)
        difference = relative(end, weights, start)
        print(f"{kind}, {name}: losses {steps(metrics, 'train/loss')}, weights {difference:.2e}")
        assert steps(metrics, "train/loss") == pytest.approx(losses, rel=1e-4), name
        norms = steps(metrics, "train/grad_norm")
        assert norms == pytest.approx(steps(expected, "train/grad_norm"), rel=1e-3), name
        assert difference <= 0.02, name


def test_the_reference_of_an_adapter_is_the_starting_model(
    recipe_file: Path, nano: str, timelines: Path, tmp_path: Path
) -> None:
    """Held-out margins after two steps, against transformers with and without the adapter."""
    rows = [r for r in read_rows(timelines / "test.jsonl") if r.task.value != "absent"]
    held_out = make_pairs(rows)[:6]
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(read_rows(timelines / "train.jsonl"))[:24])
    write_pairs(tmp_path / "held_out.jsonl", held_out)
    metrics, _ = finish(
        recipe_file, *SFT, "kind=dpo", f"data.train.main.path={tmp_path / 'pairs.jsonl'}",
        f"data.held_out_pairs.main.path={tmp_path / 'held_out.jsonl'}", "training.eval_steps=2",
        "dpo.beta=0.2", "lora.enabled=true", "lora.r=4", "lora.dropout=0.2", "run_name=adapter",
    )  # fmt: skip
    (adapter,) = (tmp_path / "runs" / "adapter" / "checkpoints").glob("step-*/adapter")
    start = load_model(nano).eval()
    end = PeftModel.from_pretrained(load_model(nano), adapter).eval()
    margins = []
    for pair in held_out:
        other = pair.rejected_audio or pair.row.audio
        chosen, rejected = (
            plain_sum(end, nano, audio, pair.row.prompt, text)[0]
            - plain_sum(start, nano, audio, pair.row.prompt, text)[0]
            for audio, text in ((pair.row.audio, pair.row.answer), (other, pair.rejected))
        )
        margins.append(0.2 * (chosen - rejected))
    before, after = steps(metrics, "held_out/main_rewards/margins")
    print(f"margins {before:.4f} -> {after:.4f}, by transformers {sum(margins) / len(margins):.4f}")
    assert before == pytest.approx(0.0, abs=1e-6) and abs(after) > 1e-2
    assert after == pytest.approx(sum(margins) / len(margins), abs=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        ("learner.zero_stage=2",),
        ("learner.zero_stage=3", "model.train_projector=true", "model.train_embeddings=true"),
    ],
    ids=["adapter, ZeRO-2", "adapter and full weights beside it, ZeRO-3"],
)
def test_four_steps_equal_two_resumed_for_two(
    recipe_file: Path, timelines: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """With a LoRA adapter, dropout, held-out losses and two ranks; killed right after step 2."""
    options = (
        *SFT, *more, "training.max_steps=4", "training.save_steps=2", "training.eval_steps=2",
        "lora.enabled=true", "lora.r=4", "lora.dropout=0.2", "learner.num_processes=2",
        "run_name=four", "training.save_total_limit=null",
    )  # fmt: skip
    whole, expected = finish(recipe_file, *options)
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "runs" / "four", killed / "four")
    shutil.rmtree(killed / "four" / "checkpoints" / "step-000004")
    (killed / "four" / "summary.json").unlink()
    resumed, weights = finish(recipe_file, *options, f"output_dir={killed}")
    assert steps(resumed, "train/loss") == pytest.approx(steps(whole, "train/loss"), rel=1e-5)
    assert steps(resumed, "train/learning_rate") == steps(whole, "train/learning_rate")
    assert len(steps(whole, "train/loss")) == 4
    assert any(".lora_A." in name for name in expected)
    beside = "multi_modal_projector.linear_1.weight" in expected
    assert beside == ("model.train_projector=true" in more)
    start = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    difference = relative(weights, expected, start)
    print(f"resumed: {difference:.2e}")
    assert difference <= 1e-6

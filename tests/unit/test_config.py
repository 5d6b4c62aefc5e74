from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.config import json_schema, known_keys, load_recipe, to_yaml

ROOT = Path(__file__).parents[2]
FULL = ROOT / "recipes" / "grpo_long_audio.yaml"
NANO = ROOT / "recipes" / "nano" / "grpo_long_audio.yaml"


def test_unknown_override_exits_2_and_names_the_right_key(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(FULL), "lerning_rate=1"]) == 2
    error = capsys.readouterr().err
    assert "training.learning_rate" in error and "lerning_rate" in error
    assert len(error.strip().splitlines()) == 1


def test_check_does_not_import_torch() -> None:
    code = (
        "import sys; from posttrain.cli import main; "
        f"assert main(['check', {str(FULL)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "audio-flamingo-next-think-hf" in done.stdout


def test_base_is_inherited_and_overrides_win() -> None:
    recipe = load_recipe(NANO, ["training.learning_rate=3e-5", "rewards.format.weight=0.1"])
    assert recipe.sampling.num_generations == load_recipe(FULL).sampling.num_generations
    assert recipe.training.learning_rate == 3e-5
    assert recipe.rewards["format"].weight == 0.1
    assert recipe.run_name == "grpo_long_audio"


def test_resolved_yaml_gives_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(NANO)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(recipe))
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("sampling.num_generations=1", "at least 2"),
        ("sampling.top_p=0.9", "must be 1.0"),
        ("sampling.repetition_penalty=1.2", "must be 1.0"),
        ("sampling.temperature=0", "above 0"),
        ("training.prompts_per_step=7", "multiple"),
        ("rewards.timestamps.weight=1", "unknown reward"),
        ("rewards.format.weight=0.5", "at most 0.2"),
        ("algorithm.loss_type=ppo", "must be one of"),
        ("training.max_steps=many", "training.max_steps"),
        ("learner=4", "is a section"),
        ("learner.zero_stage=1", "must be one of"),
        ("kind=sfft", "must be one of grpo, sft"),
        ("model.path=hf_abcdefghijklmnop", "environment variable"),
        ("rollout.weight_sync=full", "use auto"),
        ("noequals", "key=value"),
        ("training.micro_batch_tokens=0", "from 1 to"),
        ("learner.sequence_parallel_size=3", "ranks share a sequence"),
        ("shared_prefix.verify=always", "must be one of"),
        ("training.warmup_ratio=2", "from 0 to 1"),
        ("training.save_steps=0", "from 1 to"),
        ("algorithm.loss_type=cispo", "1 or more"),
    ],
)
def test_bad_values_are_refused(override: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        load_recipe(FULL, [override])


def test_sources_of_no_rows_are_refused() -> None:
    recipe = ROOT / "recipes/nano/sft.yaml"
    with pytest.raises(ValueError, match=r"data.held_out.main.max_rows=0: at least 1"):
        load_recipe(recipe, ["data.held_out.main.max_rows=0"])
    with pytest.raises(ValueError, match=r"evaluation.num_rows=0: must be from 1"):
        load_recipe(recipe, ["evaluation.num_rows=0"])


def test_circular_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="leads back"):
        load_recipe(tmp_path / "a.yaml")


def test_missing_recipe_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_json_schema_knows_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    training = schema["properties"]["training"]
    assert training["properties"]["learning_rate"] == {"type": "number", "default": 1e-6}
    assert training["additionalProperties"] is False
    assert "data.train.NAME.path" in known_keys()


def test_dense_supervised_runs_are_refused_under_zero_3() -> None:
    """Ranks would wait for each other's forward passes for ever."""
    with pytest.raises(ValueError, match="set learner.zero_stage=2"):
        load_recipe(NANO.with_name("sft_full_zero3.yaml"), ["shared_prefix.enabled=false"])

"""Run folder, batches, schedule, held-out comparison, seeds: the parts around the loop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import load_recipe
from posttrain.data.pairs import Pair, write_pairs
from posttrain.data.rows import Row, read_rows
from posttrain.evaluate.held_out import RowScore, check_rows, compare, from_records, to_records
from posttrain.evaluate.row_metrics import row_metrics
from posttrain.evaluate.row_statistics import interval
from posttrain.model.checkpoint_keys import canonical_key, split_ignored
from posttrain.quickstart import move_aside
from posttrain.train.batches import PromptBatches, rows_with_loss, training_pairs
from posttrain.train.grpo import GrpoLoop, sampling_seed
from posttrain.train.progress import Progress
from posttrain.train.rewards import errors_of
from posttrain.train.run_folder import RunFolder
from posttrain.train.schedule import lr_factor
from posttrain.types import Completion, RewardResult, RewardStatus


def test_batches_cover_an_epoch_once_and_resume_by_number(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.prompts_per_step=8"])
    data = PromptBatches.from_recipe(recipe)
    odd = PromptBatches.from_recipe(load_recipe(recipe_file, ["training.prompts_per_step=12"]))
    for step in range(20):
        assert len({row.id for row in odd.batch(step)}) == 12
    assert {r.id for step in range(8) for r in odd.batch(step)} == {r.id for r in odd.rows}
    counts = [r.id for step in range(8) for r in odd.batch(step)]
    assert all(counts.count(row.id) == 3 for row in odd.rows), "96 draws are 3 epochs of 32"
    epoch = [row.id for step in range(4) for row in data.batch(step)]
    assert len(epoch) == len(set(epoch)) == 32
    assert [r.id for r in data.batch(4)] != [r.id for r in data.batch(0)]
    again = PromptBatches.from_recipe(recipe)
    assert [r.id for r in again.batch(3)] == [r.id for r in data.batch(3)]
    assert data.provenance in ("recorded", "synthesised")


def test_data_mistakes_are_named(recipe_file: Path, timelines: Path) -> None:
    leak = load_recipe(recipe_file, [f"data.held_out.x.path={timelines / 'train.jsonl'}"])
    with pytest.raises(ValueError, match=r"data.held_out.x: row .* is in data.train too"):
        PromptBatches.from_recipe(leak)
    tasks = load_recipe(recipe_file, ["data.train.main.tasks=[choice]"])
    with pytest.raises(ValueError, match="none of tasks"):
        PromptBatches.from_recipe(tasks)
    many = load_recipe(recipe_file, ["training.prompts_per_step=64"])
    with pytest.raises(ValueError, match="more than the 32 rows"):
        PromptBatches.from_recipe(many)
    for override, key in (
        ("model.max_audio_len_s=5", "model.max_audio_len_s=5"),
        ("rollout.max_model_len=300", "rollout.max_model_len=300"),
    ):
        with pytest.raises(ValueError, match=f"row .* s.*{key}"):
            PromptBatches.from_recipe(load_recipe(recipe_file, [override]))
    source = timelines / "test.jsonl"
    twice = [f"data.{part}.x.path={source}" for part in ("held_out", "reported")]
    with pytest.raises(ValueError, match=r"data.reported.x: data.held_out has this name too"):
        load_recipe(recipe_file, twice)
    chat = timelines / "chat.jsonl"
    chat.write_text('{"id": "c", "prompt": "Hello?"}\n')
    text_only = load_recipe(recipe_file, [f"data.train.main.path={chat}"])
    with pytest.raises(ValueError, match="needs a clip"):
        PromptBatches.from_recipe(text_only)


def test_unfinished_runs_continue_and_finished_ones_are_kept(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    first = RunFolder(recipe)
    assert first.path.name == "tiny" and not first.resumed
    for step in (1, 2, 3):
        first.log({"x": 1.0}, step)
    first.checkpoints.begin(2)
    assert RunFolder(recipe).steps_done == 0, "a partial checkpoint does not count"
    first.log({"x": 1.0}, 1)
    first.checkpoints.finish(2, policy_version=2)
    with (first.path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "x"')
    again = RunFolder(recipe)
    assert again.resumed and again.steps_done == 2
    assert [m["step"] for m in again.read_jsonl("metrics.jsonl")] == [1]
    other = load_recipe(recipe_file, ["algorithm.epsilon=0.3"])
    with pytest.raises(ValueError, match=r"algorithm.epsilon=0.2, now 0.3"):
        RunFolder(other)
    written = (first.path / "recipe.yaml").read_text()
    (first.path / "recipe.yaml").write_text(written.replace("  epsilon: 0.2\n", ""))
    assert RunFolder(recipe).resumed, "as a version without that key wrote it"
    RunFolder(load_recipe(recipe_file, ["training.learning_rate=1", "training.max_steps=9"]))
    again = RunFolder(recipe)
    again.finish({"done": True})
    assert RunFolder(recipe).path.name == "tiny-2"
    assert json.loads((again.path / "summary.json").read_text()) == {"done": True}


def test_an_unfinished_run_goes_on_with_the_rows_it_was_started_with(
    recipe_file: Path, timelines: Path, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = (timelines / "train.jsonl").read_text()
    source.write_text(rows)
    recipe = load_recipe(recipe_file, [f"data.train.main.path={source}"])
    run = RunFolder(recipe)
    recorded = run.load_json("data.json")["data.train.main"]
    assert recorded["sha256"] == hashlib.sha256(rows.encode()).hexdigest()
    source.write_text(rows + rows)
    assert RunFolder(recipe).resumed, "nothing was trained on the other rows"
    run.checkpoints.begin(1)
    run.checkpoints.finish(1, policy_version=1)
    source.write_text(rows)
    with pytest.raises(ValueError, match=r"data.train.main .*rows.jsonl\) has changed"):
        RunFolder(recipe)
    source.write_text(rows + rows)
    assert RunFolder(recipe).steps_done == 1


def test_the_time_left_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes of scoring before the first step, then 2 s a step: 18 s are left after one."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    progress = Progress("run")
    with progress.bar(0, 10) as advance:
        for clock[0] in (30.0, 60.0, 120.0):
            progress.scoring("scoring main 3/7")
        assert progress._bar.postfix == "scoring main 3/7"
        advance(0, {"held_out/main_loss": 0.6, "held_out/main_nll": 0.6})
        assert not progress._bar.postfix
        clock[0] = 122.0
        progress.scoring("")
        advance(1, {"train/loss": 0.5})
        assert progress._bar.format_dict["elapsed"] == 2.0 and "00:18" in str(progress._bar)


def test_old_checkpoints_are_removed_and_runs_moved_aside(recipe_file: Path) -> None:
    run = RunFolder(load_recipe(recipe_file))
    for step in (1, 2, 3):
        run.checkpoints.begin(step)
        run.checkpoints.finish(step, step)
    kept = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    assert move_aside(run.path) == run.path.with_name("tiny-old-1")
    assert move_aside(run.path) is None


def test_a_failing_sink_does_not_stop_the_run(recipe_file: Path) -> None:
    class Failing:
        def log(self, metrics: dict, step: int) -> None:
            raise OSError("disk full")

        def close(self) -> None: ...

    run = RunFolder(load_recipe(recipe_file))
    run.sinks = [Failing()]
    run.log({"x": 1.0}, 1)
    assert run.read_jsonl("metrics.jsonl")[0]["x"] == 1.0


def test_learning_rate_schedule_by_hand(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.max_steps=10", "training.warmup_ratio=0.2"])
    assert [lr_factor(recipe, s) for s in (0, 1)] == [0.5, 1.0]
    assert lr_factor(recipe, 2) == 1.0
    assert lr_factor(recipe, 6) == pytest.approx(0.5)
    recipe.training.lr_scheduler_type = "linear"
    assert lr_factor(recipe, 6) == pytest.approx(0.5)
    recipe.training.lr_scheduler_type = "constant"
    assert lr_factor(recipe, 9) == 1.0


def test_held_out_comparison_is_paired() -> None:
    def scores(values: list[float]) -> list[RowScore]:
        return [
            RowScore(str(i), "miou", {"miou": (v, 1.0)}, v, "", False) for i, v in enumerate(values)
        ]

    result = compare(scores([0.1, 0.5, 0.3]), scores([0.3, 0.7, 0.5]), 500)
    assert result["n"] == 3 and result["metric"] == "miou"
    assert result["paired_diff"]["mean"] == pytest.approx(0.2)
    assert result["paired_diff"]["ci95"] == pytest.approx([0.2, 0.2])
    with pytest.raises(ValueError, match="same rows"):
        compare(scores([0.1]), scores([0.1, 0.2]), 10)
    low, high = interval("success", np.array([[0.0, 1.0], [1.0, 1.0]] * 200), 2_000)
    # normal approximation: 0.5 +- 1.96 * 0.5 / sqrt(400)
    assert low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)


def test_known_answers_belong_to_the_rows_that_are_evaluated(timelines: Path) -> None:
    rows = read_rows(timelines / "test.jsonl")
    scores = [RowScore(row.id, "miou", {"miou": (0.5, 1.0)}, 0.5, "", False) for row in rows]
    record = {"step": 4, "main": to_records(scores)}
    check_rows(record, {"main": rows})
    for other in (rows[:-1], rows[::-1]):
        with pytest.raises(ValueError, match=r"step 4 are not to the rows of data: main"):
            check_rows(record, {"main": other})
    with pytest.raises(ValueError, match="not to the rows of data: reported"):
        check_rows(record, {"main": rows, "reported": rows})


class Length:
    name = "length"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        return RewardResult(None if completion.truncated else float(len(completion.text)))


def test_known_answers_get_the_rewards_of_the_run_that_takes_them_over(
    recipe_file: Path, timelines: Path, tmp_path: Path
) -> None:
    rows = read_rows(timelines / "test.jsonl")
    texts = ["<t>1.0-2.0</t>", "<t>1.0-2.0"] + [""] * (len(rows) - 2)
    earlier = [
        RowScore(row.id, "miou", {"miou": (0.5, 1.0)}, -1.0, text, text.endswith("2.0"))
        for row, text in zip(rows, texts, strict=True)
    ]
    known = tmp_path / "after.json"
    known.write_text(json.dumps({"step": 7, "main": to_records(earlier)}))
    run = RunFolder(load_recipe(recipe_file, [f"evaluation.before={known}"]))
    assert not run.has_answers("after", 9, {"main": rows}, Length())
    with pytest.raises(ValueError, match=r"data: main; with evaluation.before"):
        run.has_answers("before", 0, {"main": rows[1:]}, Length())
    assert run.has_answers("before", 0, {"main": rows}, Length())
    record = run.load_json("held_out/before.json")
    scores = from_records(record["main"])
    assert record["step"] == 0 and [s.text for s in scores] == texts
    assert [s.reward for s in scores[:3]] == [14.0, None, 0.0]
    own = row_metrics(rows[0], Completion((), (), texts[0], "stop", 0))
    assert scores[0].metrics == own and scores[1].truncated and not scores[0].truncated
    with pytest.raises(ValueError, match=r"evaluation.before=none.json: no such file"):
        RunFolder(load_recipe(recipe_file, ["evaluation.before=none.json"]))


def test_the_loss_is_taken_on_the_first_rows_with_an_answer(
    recipe_file: Path, timelines: Path
) -> None:
    first, second, third, *_ = read_rows(timelines / "test.jsonl")
    held_out = {"main": [replace(first, answer=" "), second, third], "chat": []}
    assert rows_with_loss(load_recipe(recipe_file), held_out)["main"] == [second, third]
    recipe = load_recipe(recipe_file, ["evaluation.loss_rows=1"])
    assert rows_with_loss(recipe, held_out) == {"main": [second], "chat": []}


def test_a_question_that_pairs_train_is_not_held_out(
    recipe_file: Path, timelines: Path, tmp_path: Path
) -> None:
    row = read_rows(timelines / "train.jsonl")[0]
    write_pairs(tmp_path / "pairs.jsonl", [Pair(replace(row, id="p/shifted"), " nothing")])
    recipe = load_recipe(
        recipe_file,
        [
            "kind=dpo", f"data.train.main.path={tmp_path / 'pairs.jsonl'}",
            f"data.held_out.main.path={timelines / 'train.jsonl'}",
        ],
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"data.held_out.main: row {row.id!r} asks what a pair"):
        training_pairs(recipe)


def test_nothing_of_a_run_without_a_checkpoint_is_kept(recipe_file: Path) -> None:
    """Another model may have been asked before it was stopped."""
    first = RunFolder(load_recipe(recipe_file))
    first.log({"held_out/main_loss": 9.0}, 0)
    again = RunFolder(load_recipe(recipe_file, ["algorithm.epsilon=0.3"]))
    assert again.resumed and again.read_jsonl("metrics.jsonl") == []


@pytest.mark.parametrize("which", ["its own clip", "the rejected answer's clip"])
def test_clips_of_pairs_must_fit_the_encoder(
    recipe_file: Path, timelines: Path, tmp_path: Path, which: str
) -> None:
    rows = sorted(read_rows(timelines / "train.jsonl"), key=lambda row: row.duration_s)
    short, long = rows[0], rows[-1]
    own = which == "its own clip"
    pair = (
        Pair(long, " nothing", None, "shifted", 1.0) if own
        else Pair(short, short.answer, long.audio, "audio", 1.0)
    )  # fmt: skip
    write_pairs(tmp_path / "pairs.jsonl", [pair])
    limit = (short.duration_s + long.duration_s) / 2
    data = f"data.train.main.path={tmp_path / 'pairs.jsonl'}"
    fits = load_recipe(recipe_file, ["kind=dpo", data])
    assert len(training_pairs(fits)[0]) == 1
    recipe = load_recipe(recipe_file, ["kind=dpo", data, f"model.max_audio_len_s={limit}"])
    with pytest.raises(ValueError, match=rf"row {pair.row.id!r}.*model.max_audio_len_s"):
        training_pairs(recipe)
    assert len(training_pairs(recipe, check=False)[0]) == 1, "ranks do not check again"


def test_seeds_depend_on_run_step_and_prompt() -> None:
    seeds = {sampling_seed(r, s, p) for r in (0, 1) for s in (0, 1) for p in ("a", "b")}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(0, 0, "a") == sampling_seed(0, 0, "a")


def test_errors_are_counted_and_end_the_run_only_where_told() -> None:
    error = RewardResult(None, {}, RewardStatus.ERRORED, "my_reward on row 'x': KeyError")
    some = [[error, RewardResult(1.0)]]
    assert errors_of(some, "drop") == {"reward/errored": 1.0}
    with pytest.raises(RuntimeError, match="1 completions could not be scored; first: my_reward"):
        errors_of(some, "stop")
    with pytest.raises(RuntimeError, match="my_reward on row 'x'"):
        errors_of([[error, error]], "drop")


def test_nan_steps_are_counted_and_end_the_run(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["training.max_skipped_steps=2"])
    loop = object.__new__(GrpoLoop)
    loop.recipe, loop.skipped_in_a_row = recipe, 0
    for skipped in (True, False, True):
        loop.check_skipped(skipped, 0)
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        loop.check_skipped(True, 4)


def test_strange_weights_are_refused_and_the_known_extra_is_ignored() -> None:
    keep, ignored = split_ignored(["audio_tower.x", "model.avg_embed_norm"])
    assert keep == ["audio_tower.x"] and ignored == ["model.avg_embed_norm"]
    with pytest.raises(ValueError, match="vision_tower"):
        canonical_key("vision_tower.weight")


def test_more_gpus_than_there_are_names_the_keys() -> None:
    from posttrain.train.resources import check_gpus

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "grpo_long_audio.yaml")
    check_gpus(recipe, "cuda", "cuda", available=8)
    check_gpus(recipe, "cpu", "cpu", available=0)
    with pytest.raises(ValueError, match=r"learner.num_processes=4, .* need 8 GPUs, .* has 7"):
        check_gpus(recipe, "cuda", "cuda", available=7)

"""Scoring side by side, on a clock; offline scoring of files."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.data.rows import Event, Row
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.scoring import score_all


def item(text: str) -> tuple[Row, Completion]:
    row = Row(text, (), "a.wav", 10.0, Task.GROUNDING, (Event(2, 4, "x"),), "x")
    return row, Completion((), (), text, "stop", 0)


class Moody:
    """Waits, raises or answers, as the text says."""

    name = "moody"

    def __init__(self) -> None:
        self.release = threading.Event()
        self.together = threading.Barrier(4, timeout=5)

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if completion.text == "hang":
            self.release.wait(30)
        if completion.text == "raise":
            raise KeyError("oops")
        if completion.text == "meet":
            self.together.wait()
        return RewardResult(float(len(completion.text)))


def test_a_reward_that_hangs_or_raises_costs_its_own_sample_alone() -> None:
    reward = Moody()
    items = [item(t) for t in ("a", "hang", "bb", "raise", "hang", "ccc")]
    started = time.monotonic()
    results = score_all(reward, items, timeout_s=0.3, num_threads=2)
    assert time.monotonic() - started < 5
    assert [r.value for r in results] == [1.0, None, 2.0, None, None, 3.0]
    reasons = [r.reason for r in results if r.status is RewardStatus.ERRORED]
    assert "no result for 0.3 s" in reasons[0] and "row 'hang'" in reasons[0]
    assert "KeyError" in reasons[1] and "row 'raise'" in reasons[1]
    reward.release.set()


def test_a_queue_in_front_of_a_busy_model_is_not_hanging() -> None:
    lock = threading.Lock()

    class OneAtATime:
        name = "model"

        def __call__(self, row: Row, completion: Completion) -> RewardResult:
            with lock:
                time.sleep(0.02)
            return RewardResult(1.0)

    results = score_all(OneAtATime(), [item("x")] * 40, timeout_s=0.25, num_threads=16)
    assert [r.value for r in results] == [1.0] * 40


def test_completions_are_scored_side_by_side() -> None:
    results = score_all(Moody(), [item("meet")] * 4, num_threads=4)  # a barrier of four
    assert [r.value for r in results] == [4.0] * 4
    assert score_all(Moody(), []) == []


ROW = {
    "id": "a", "completion": "<think>x</think> <t>2-4</t>", "duration_s": 10.0, "question": "q",
    "events": [{"start_s": 2, "end_s": 4, "label": "bell"}], "answer": "", "task": "grounding",
}  # fmt: skip


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_score_command_adds_rewards_and_lists_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        ROW,
        "{broken\n",
        "\n",
        ROW | {"id": "b", "completion": "<t>3-5</t>", "extra": [1]},
        ROW | {"id": "c", "events": [{"start_s": 2, "end_s": 14, "label": "bell"}]},
        ROW | {"id": "d", "completion": 7.5},
        ROW | {"id": "e", "task": "grunding"},
        ROW | {"id": "g", "query": 5},
        ROW | {"id": "h", "events": [{"start_s": -4, "end_s": 4, "label": "bell"}]},
        ROW | {"id": "f", "completion": "not heard", "events": [], "task": "absent"},
    ]
    source, out = write(tmp_path / "rows.jsonl", lines), tmp_path / "scored.jsonl"
    arguments = ["score", "--reward", "timestamp_grounding,format", "--in", str(source)]
    assert main([*arguments, "--out", str(out), "--json"]) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["rows"] == 3
    assert [bad["line"] for bad in report["bad_rows"]] == [2, 5, 6, 7, 8, 9]
    assert "rows.jsonl:7: `task` is 'grunding'" in printed.err
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["id"] for r in scored] == ["a", "b", "f"]
    assert scored[1]["extra"] == [1]
    first = scored[0]["rewards"]
    assert first["timestamp_grounding"]["reward"] == 1.0
    assert first["timestamp_grounding"]["status"] == "scored"
    assert first["timestamp_grounding"]["breakdown"]["iou"] == 1.0
    assert first["format"]["reward"] == 1.0
    summary = report["summary"]
    assert summary["miou"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert summary["r1@0.5"]["mean"] == 0.5 and summary["r1@0.5"]["n"] == 2
    assert summary["event_f1"]["mean"] == 0.5
    assert summary["onset_error_s"]["mean"] == summary["onset_error_s"]["median"] == 0.5
    assert summary["absent_accuracy"]["mean"] == 1.0
    assert summary["blind_adjusted"]["n"] == 2
    low, high = summary["miou"]["ci95"]
    assert low == pytest.approx(1 / 3) and high == 1.0


def test_score_command_reads_a_prior_and_refuses_unknown_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = (
        write(tmp_path / "rows.jsonl", [ROW | {"completion": "<t>3-5</t>"}]),
        tmp_path / "o",
    )
    prior = tmp_path / "prior.json"
    prior.write_text(json.dumps({"grounding": 0.5}))
    arguments = ["score", "--in", str(source), "--out", str(out)]
    assert main([*arguments, "--reward", "timestamp_grounding", "--prior", str(prior)]) == 0
    raw = 0.8 / 3
    value = json.loads(out.read_text())["rewards"]["timestamp_grounding"]["reward"]
    assert value == pytest.approx((raw - 0.5) / 0.5)
    assert main([*arguments, "--reward", "nope"]) == 2
    assert "--reward nope: unknown" in capsys.readouterr().err
    assert main([*arguments, "--reward", "audio_text_grounding"]) == 2
    assert main(["score", "--in", "none", "--out", str(out), "--reward", "format"]) == 2


def raises(row: Row, completion: Completion) -> float:
    raise RuntimeError("no")


def test_a_reward_that_raises_makes_the_command_fail_and_shows_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "rows.jsonl", [ROW]), tmp_path / "out.jsonl"
    code = main(["score", "--reward", f"{__name__}:raises", "--in", str(source), "--out", str(out)])
    assert code == 1
    entry = json.loads(out.read_text())["rewards"]["raises"]
    assert entry["status"] == "errored" and entry["reward"] is None
    assert "RuntimeError: no" in entry["reason"]
    assert "1 errored" in capsys.readouterr().out

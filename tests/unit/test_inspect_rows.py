"""`posttrain data check` and `data stats` on rows with every kind of mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.cli import main
from posttrain.data.audio import write_audio
from posttrain.inspect_rows import bar, check_rows, histogram, row_statistics
from posttrain.select_rows import pass_rate_range


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).standard_normal(48_000).astype(np.float32)
    write_audio(tmp_path / "good.flac", 0.1 * noise)
    write_audio(tmp_path / "silent.flac", 0 * noise)

    def row(name: str, **changes: object) -> str:
        record = {
            "id": name, "prompt": f"When is {name} heard?", "audio": "good.flac", "duration_s": 3.0,
            "task": "grounding", "query": "a", "answer": "<t>1.0-2.0</t>",
            "events": [{"start_s": 1.0, "end_s": 2.0, "label": "a"}],
        }  # fmt: skip
        return json.dumps(record | changes)

    packed = "<t>0.066-0.231</t> <t>0.574-1.034</t>"
    lines = [
        row("fine"),
        "{broken",
        row("late", events=[{"start_s": 1.0, "end_s": 9.0, "label": "a"}]),
        row("fine"),
        row("gone", audio="gone.flac"),
        row("quiet", audio="silent.flac"),
        row("long", duration_s=7.0),
        row("packed", duration_s=151.0, answer=packed),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_mistake_is_found_with_its_line(rows: Path) -> None:
    findings = check_rows(rows)
    lines = {kind: [line for line, _ in found] for kind, found in findings.problems.items()}
    assert lines == {
        "not JSON": [2], "invalid row": [3], "duplicate id": [4], "duplicate question": [4],
        "unusable audio": [5, 6], "wrong duration": [7, 8], "packed minutes suspected": [8],
    }  # fmt: skip
    assert findings.rows == 6
    (_, late), *_ = findings.problems["invalid row"]
    assert "lies outside the clip" in late and "rows.jsonl" not in late


def test_the_command_counts_and_exits_with_1(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(rows)]) == 1
    shown = capsys.readouterr().out
    assert "unusable audio: 2" in shown and "line 5: audio" in shown and "6 rows" in shown
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    assert main(["data", "check", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 1, "problems": {}}


def test_statistics_count_a_clip_once(timelines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from posttrain.data.rows import read_rows

    rows = read_rows(timelines / "train.jsonl")
    facts = row_statistics([*rows, *rows])
    assert facts["rows"] == 64 and facts["clips"] == 32
    assert facts["hours"] == pytest.approx(sum(r.duration_s or 0 for r in rows) / 3600)
    assert sum(facts["by_task"].values()) == 64
    assert sum(n for _, _, n in facts["span_histogram"]) > 64
    assert main(["data", "stats", str(timelines / "train.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "32 rows, 32 clips" in shown and "spans, seconds: shortest" in shown and "█" in shown


def test_bars_and_histograms() -> None:
    assert (bar(1.0, 4), bar(0.5, 4), bar(0.0, 4)) == ("████", "██", "")
    assert bar(5 / 32, 4) == "▋"
    edges = histogram([1.0, 10.0, 100.0], bins=2)
    assert [count for _, _, count in edges] in ([2, 1], [1, 2]) and histogram([]) == []


@pytest.mark.parametrize("text", ["0.5", "0.9..0.1", "0.1..1.5", "a..b"])
def test_pass_rates_are_ranges(text: str) -> None:
    assert pass_rate_range("0.375..0.75") == (0.375, 0.75)
    with pytest.raises(ValueError, match=r"give a range such as 0.375..0.75"):
        pass_rate_range(text)

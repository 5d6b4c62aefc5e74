from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.data.rows import Event, Row, parse_row, read_rows, write_rows
from posttrain.types import Task

GOOD = {
    "id": "r1",
    "prompt": [{"role": "user", "content": "When is seven heard?"}],
    "audio": "a.wav",
    "duration_s": 10.0,
    "events": [
        {"start_s": 4.0, "end_s": 4.5, "label": "two"},
        {"start_s": 2.1, "end_s": 2.6, "label": "seven"},
    ],
    "query": "seven",
    "answer": "<t>2.1-2.6</t>",
    "task": "grounding",
}


def test_good_row_and_target_spans() -> None:
    row = parse_row(GOOD, base_dir=Path("/clips"))
    assert row.audio == "/clips/a.wav"
    assert row.task is Task.GROUNDING
    assert [e.label for e in row.events] == ["seven", "two"]
    assert row.target_spans == ((2.1, 2.6),)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"task": "singing"}, "unknown task 'singing'"),
        ({"audio": None}, "needs `audio`"),
        ({"audio": ["a.wav", "b.wav"]}, "one audio a prompt"),
        ({"duration_s": None}, "duration_s"),
        ({"duration_s": float("nan")}, "finite"),
        ({"duration_s": "10"}, "finite number"),
        ({"events": [{"start_s": 5, "end_s": 4, "label": "seven"}]}, "reversed"),
        ({"events": [{"start_s": 9, "end_s": 11, "label": "seven"}]}, "outside the clip of 10.0"),
        ({"events": [{"start_s": -1, "end_s": 1, "label": "seven"}]}, "outside"),
        ({"events": [{"start_s": 1, "label": "seven"}]}, "both needed"),
        ({"query": "nine"}, "absent"),
        ({"id": ""}, "`id` is missing"),
        ({"prompt": []}, "`prompt` is missing"),
        ({"prompt": [{"content": "When?"}]}, "is no message; give `role`"),
        ({"prompt": [{"role": "user", "content": None}]}, "is no message"),
        ({"prompt": {"role": "user"}}, "a list of messages is needed"),
        ({"messages": ["When?"], "prompt": None}, "`prompt` is missing"),
        ({"conversations": ["When?"]}, "conversations.from 'When\\?'"),
        ({"conversations": [{"from": "human", "value": None}]}, "is no message"),
        ({"answer": {"text": "x"}}, "answer is .*; give text"),
        ({"answer": "<sound> at 2 s"}, "<sound> in the answer"),
    ],
)
def test_bad_rows_name_the_place_and_the_fix(change: dict, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        parse_row(GOOD | change, where="rows.jsonl:7")
    assert "rows.jsonl:7" in str(caught.value)


def test_nvidia_rows_are_accepted() -> None:
    row = parse_row(
        {
            "id": "x", "sound": ["clip.wav"], "duration": 12.5, "task": "transcript",
            "choices": ["yes"], "speaker": "a",
            "conversations": [
                {"from": "human", "value": "<sound>\nTranscribe the input speech."},
                {"from": "gpt", "value": "hello"},
            ],
        }
    )  # fmt: skip
    assert row.prompt == ({"role": "user", "content": "Transcribe the input speech."},)
    assert (row.answer, row.audio, row.duration_s) == ("hello", "clip.wav", 12.5)
    assert (row.choices, row.metadata) == (("yes",), {"speaker": "a"}), "nothing is lost"


def test_trl_conversational_rows_are_accepted() -> None:
    row = parse_row(
        {
            "id": "x", "audio": {"path": "clip.wav"}, "duration_s": 3.0, "task": "chat",
            "messages": [
                {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Hi?"}]},
                {"role": "assistant", "content": "Yes."},
            ],
        }
    )  # fmt: skip
    assert row.prompt[0]["content"] == "Hi?" and row.answer == "Yes."


def test_trl_rows_need_neither_id_nor_duration(noise_clip: str, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": talk, "audio": noise_clip}) + "\n")
    (row,) = read_rows(path)
    assert (row.id, row.duration_s, row.answer) == ("rows.jsonl:1", 2.5, "Yes.")


def test_clips_below_the_file_are_relative_wherever_it_is_written_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = str(tmp_path / "audio/c.wav")
    row = Row("a", ({"role": "user", "content": "q"},), clip, 2.0, Task.CHAT)
    monkeypatch.chdir(tmp_path)
    for path in (Path("rows.jsonl"), tmp_path / "rows.jsonl"):
        write_rows(path, [row])
        assert json.loads(path.read_text())["audio"] == "audio/c.wav"
        assert read_rows(path)[0].audio == row.audio
    write_rows(tmp_path / "deeper" / "rows.jsonl", [replace(row, audio="audio/c.wav")])
    assert read_rows(tmp_path / "deeper" / "rows.jsonl")[0].audio == row.audio


def test_text_only_rows_are_fine_for_chat() -> None:
    assert parse_row({"id": "t", "prompt": "Hello?"}).audio is None


def test_files_round_trip_and_duplicates_are_refused(tmp_path: Path) -> None:
    row = Row(
        id="a", prompt=({"role": "user", "content": "q"},), audio=str(tmp_path / "c.wav"),
        duration_s=2.0, task=Task.GROUNDING, events=(Event(0.5, 1.0, "x"),), query="x",
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row])
    assert json.loads(path.read_text())["audio"] == "c.wav"
    assert read_rows(path) == [row]
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: id 'a' stands on line 1"):
        read_rows(path)


def test_broken_json_and_empty_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "q"}\n{oops\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not JSON"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")

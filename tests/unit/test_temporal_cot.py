"""Distilled chains: what is kept, why the rest is not, and that interruptions leave no trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from data_recipes.temporal_cot import (
    ChainSettings,
    as_nvidia,
    choose,
    collect,
    judge,
    judge_all,
)
from posttrain.data.rows import Event, Row, parse_row, read_rows
from posttrain.types import Completion, Task

EVENTS = (Event(1.0, 1.6, "may"), Event(4.0, 4.5, "six"), Event(8.0, 8.6, "may"))
GOOD = "<think> may <t>1.0-1.6</t> six <t>4.0-4.5</t> may <t>8.0-8.6</t></think> may " \
       "<t>1.0-1.6</t> <t>8.0-8.6</t>"  # fmt: skip
SETTINGS = ChainSettings(num_chains=2, chunk_rows=3, blind_samples=0)


def row(name: str = "a", audio: str = "clip.flac") -> Row:
    prompt = ({"role": "user", "content": "When is may heard?"},)
    return Row(name, prompt, audio, 70.0, Task.GROUNDING, EVENTS, "may")


def said(text: str, finish: str = "stop") -> Completion:
    return Completion((), (), text, finish, 0)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "stop", ""),
        (GOOD, "length", "truncated"),
        ("may <t>1.0-1.6</t> <t>8.0-8.6</t>", "stop", "no thought"),
        ("<think> may, may</think> may <t>1.0-1.6</t> <t>8.0-8.6</t>", "stop", "no times"),
        (GOOD.replace("</think> may <t>1.0-1.6</t>", "</think> may <t>2.0-2.6</t>"), "stop",
         "wrong answer"),
        (GOOD.replace("six <t>4.0-4.5", "six <t>6.0-6.5"), "stop", "untrue times"),
        (GOOD.replace("<think>", "<think>" + " well" * 1_200), "stop", "too long"),
    ],
)  # fmt: skip
def test_the_first_broken_rule_is_named(text: str, finish: str, reason: str) -> None:
    assert judge(row(), said(text, finish), SETTINGS).rejected == reason


def test_times_that_nothing_can_check_are_not_called_true() -> None:
    question = ({"role": "user", "content": "Which? (A) may (B) six"},)
    choice = Row("c", question, "clip.flac", 70.0, Task.CHOICE, (), None, "A", ("may", "six"))
    chain = said("<think> may <t>1.0-1.6</t></think> (A) may")
    assert judge(choice, chain, SETTINGS).rejected == "no labels"
    kept = judge(choice, chain, replace(SETTINGS, require_labels=False))
    assert (kept.rejected, kept.scores) == ("", {"answer": 1.0, "cited": 1.0})
    assert kept.value == (1.0, 0.0)
    assert judge(row(), said(GOOD), SETTINGS).scores["true"] == 1.0


def test_packed_minutes_are_repaired_before_judgement() -> None:
    packed = (
        "<think> may <t>0.010-0.016</t> six <t>0.040-0.045</t> may <t>0.080-0.086</t> "
        "</think> may <t>0.010-0.016</t> <t>0.080-0.086</t>"
    )
    one = judge(row(), said(packed), SETTINGS)
    assert (one.rejected, one.repaired) == ("", True)
    assert "<t>8" in one.text and "<t>0.080" not in one.text


def test_a_text_said_twice_counts_once() -> None:
    judged = judge_all(row(), [said(GOOD), said(f" {GOOD} ")], SETTINGS)
    assert [one.rejected for one in judged] == ["", "duplicate"]


class Teacher:
    """A stand-in that says what depends on row and seed alone, and counts what it was asked."""

    name = "stand-in"

    def __init__(self, fail_after: int | None = None, blind: str = "") -> None:
        self.asked: list[str] = []
        self.fail_after, self.blind = fail_after, blind

    def chains(self, rows: Sequence[Row], num_chains: int, seed: int) -> list[list[Completion]]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        out = []
        for one in rows:
            heard = bool(one.events)
            if heard:
                self.asked.append(one.id)
            text = (
                GOOD.replace("<think>", f"<think> chain {one.id} {seed}") if heard else self.blind
            )
            out.append([said(text.replace("chain", f"chain {i}")) for i in range(num_chains)])
        return out


def test_interrupted_anywhere_the_rows_are_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(f"r{i}") for i in range(10)]
    collect(rows, Teacher(), SETTINGS, tmp_path / "whole")
    choose(rows, SETTINGS, tmp_path / "whole")
    expected = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    for stop in (0, 3, 6, 9):
        out = tmp_path / f"stop-{stop}"
        first = Teacher(fail_after=stop)
        with pytest.raises(KeyboardInterrupt):
            collect(rows, first, SETTINGS, out)
        (out / "chunks" / ".00009.json.partial").write_text("[{")  # as a kill leaves it
        second = Teacher()
        collect(rows, second, SETTINGS, out)
        assert sorted(first.asked + second.asked) == sorted(r.id for r in rows), "asked once each"
        choose(rows, SETTINGS, out)
        assert (out / "rows.jsonl").read_bytes() == expected
    assert len(read_rows(tmp_path / "whole" / "rows.jsonl")) == 10


def test_rows_answerable_without_audio_are_dropped_and_counted(tmp_path: Path) -> None:
    settings = ChainSettings(num_chains=2, chunk_rows=4, blind_samples=2)
    rows = [row(f"r{i}") for i in range(3)]
    collect(rows, Teacher(blind=GOOD), settings, tmp_path)
    report = choose(rows, settings, tmp_path)
    assert report["kept"] == 0
    assert report["dropped_rows"] == {"answerable without audio": 3}
    assert "answerable without audio | 3" in (tmp_path / "report.md").read_text()


def test_chunks_of_another_teacher_are_not_mixed_in(tmp_path: Path) -> None:
    rows = [row("r0")]
    collect(rows, Teacher(), SETTINGS, tmp_path)
    other = Teacher()
    other.name = "another"
    with pytest.raises(ValueError, match="begun with teacher=stand-in, now another"):
        collect(rows, other, SETTINGS, tmp_path)


def test_nvidia_form_reads_back(tmp_path: Path) -> None:
    collect([row("r0")], Teacher(), SETTINGS, tmp_path)
    choose([row("r0")], SETTINGS, tmp_path)
    kept = read_rows(tmp_path / "rows.jsonl")
    (record,) = as_nvidia(kept)
    assert record["conversations"][0]["value"] == "<sound>\nWhen is may heard?"
    back = parse_row(json.loads(json.dumps(record)))
    assert (back.prompt, back.answer) == (kept[0].prompt, kept[0].answer.strip())
    assert kept[0].metadata["chain"]["kept_of"] == "2/2"

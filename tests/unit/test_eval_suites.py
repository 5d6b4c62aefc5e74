"""Suites on folders in their owners' layouts, statistics by hand, resuming, judging, comparing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sacrebleu.metrics import BLEU, CHRF

from data_recipes import robustness
from posttrain.compare_evals import compare_evaluations, verdict
from posttrain.data.audio import load_audio, write_audio
from posttrain.data.rows import Event, Row, read_rows
from posttrain.evaluate import row_statistics as rs
from posttrain.evaluate.answers import Answer, collect_answers, read_answers
from posttrain.evaluate.judge import collect_verdicts, prompt_of, read_verdict
from posttrain.evaluate.suites import SUITES, Source, group_values, read_source
from posttrain.types import Completion, Group, PromptRequest, SamplingSettings, Task


def clip(path: Path, duration_s: float = 1.0, seed: int = 0) -> Path:
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(16_000 * duration_s))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, samples.astype(np.float32))
    return path


def source(folder: Path, **given: str) -> Source:
    values = {name: given.get(name) for name in ("layout", "language", "target", "split")}
    return Source(folder, **values, audio_dir=folder / "written")


def says(text: str) -> Completion:
    return Completion((), (), text, "stop", 0)


def row(task: Task, answer: str = "", language: str = "en", **more: object) -> Row:
    prompt = ({"role": "user", "content": "?"},)
    return Row("r", prompt, "x.flac", 10.0, task, answer=answer, language=language, **more)  # type: ignore[arg-type]


# --- layouts ----------------------------------------------------------------------------------


def test_mmau_answers_are_the_options_own_words(tmp_path: Path) -> None:
    clip(tmp_path / "test-mini-audios" / "a.wav")
    record = {
        "id": "a", "audio_id": "./test-mini-audios/a.wav", "question": "What is heard?",
        "choices": ["(A) cat", "(B) rain"], "answer": "(B) rain", "task": "sound",
        "difficulty": "easy",
    }  # fmt: skip
    lost = {**record, "id": "b", "audio_id": "./test-mini-audios/gone.wav"}
    (tmp_path / "mmau-test-mini.json").write_text(json.dumps([record, lost]))
    (found,), (skipped,) = read_source("choice", source(tmp_path))
    assert found.id == "mmau/a" and found.choices == ("cat", "rain") and found.answer == "rain"
    assert found.prompt[0]["content"].endswith("options:\n(A) cat\n(B) rain")
    assert skipped.reason == "audio not in the folder"
    groups = group_values(found, SUITES["choice"].groups)
    assert groups == {
        "source": "mmau", "domain": "sound", "difficulty": "easy", "language": "en"
    }  # fmt: skip
    assert rs.of_choice(found, says("(B)"))["accuracy"] == (1.0, 1.0)


def test_mmau_pro_mmar_and_mmsu(tmp_path: Path) -> None:
    clip(tmp_path / "data" / "a.wav")
    pro = {"id": ["1", "2", "3"], "audio_path": [["data/a.wav"], ["data/a.wav", "b.wav"],
           ["data/a.wav"]], "question": ["Q"] * 3, "choices": [["x", "y"], ["x", "y"], []],
           "answer": ["y", "x", "open"], "category": ["sound"] * 3}  # fmt: skip
    Dataset.from_dict(pro).to_parquet(tmp_path / "pro" / "test-00000-of-00001.parquet")
    clip(tmp_path / "pro" / "data" / "a.wav")
    (one,), skipped = read_source("choice", source(tmp_path / "pro"))
    assert one.answer == "y" and one.metadata["category"] == "sound"
    assert [s.reason for s in skipped] == [
        "2 clips in one question; the engine takes one", "no options: an open question"
    ]  # fmt: skip
    mmar = [{"id": "m", "audio_path": "./audio/m.wav", "question": "Q", "choices": ["u", "v"],
             "answer": "u", "modality": "mix", "language": "en"}]  # fmt: skip
    clip(tmp_path / "mmar" / "audio" / "m.wav")
    (tmp_path / "mmar" / "MMAR-meta.json").write_text(json.dumps(mmar))
    assert read_source("choice", source(tmp_path / "mmar"))[0][0].metadata["domain"] == "mix"
    mmsu = {"id": "s", "audio_path": "audio/s.wav", "question": "Q", "choice_a": "p",
            "choice_b": "q", "choice_c": "r", "choice_d": "s", "answer_gt": "r"}  # fmt: skip
    clip(tmp_path / "mmsu" / "audio" / "s.wav")
    (tmp_path / "mmsu" / "question").mkdir()
    (tmp_path / "mmsu" / "question" / "mmsu.jsonl").write_text(json.dumps(mmsu) + "\n")
    (last,), _ = read_source("choice", source(tmp_path / "mmsu"))
    assert last.choices == ("p", "q", "r", "s") and last.answer == "r"
    del mmsu["choice_d"]
    (tmp_path / "mmsu" / "question" / "mmsu.jsonl").write_text(json.dumps(mmsu) + "\n")
    with pytest.raises(ValueError, match="mmsu.jsonl:1: no 'choice_d'"):
        read_source("choice", source(tmp_path / "mmsu"))


def test_options_that_look_alike_are_told_apart() -> None:
    notes = row(Task.CHOICE, "C# minor", choices=("C minor", "C# minor", "D minor"))
    assert rs.of_choice(notes, says("It is in C# minor."))["accuracy"] == (1.0, 1.0)
    letters = row(Task.CHOICE, "A", choices=("C", "A", "G"))
    assert rs.of_choice(letters, says("(B)"))["accuracy"] == (1.0, 1.0)
    levels = row(Task.CHOICE, "-5 dB", choices=("5 dB", "-5 dB"))
    assert rs.of_choice(levels, says("about -5 dB"))["accuracy"] == (1.0, 1.0)
    dogs = row(Task.CHOICE, "A dog barking", choices=("Cat meowing", "A dog barking"))
    assert rs.of_choice(dogs, says("Answer: A dog barking"))["accuracy"] == (1.0, 1.0)


def test_a_file_of_rows_is_filtered_and_doubles_are_refused(tmp_path: Path) -> None:
    lines = [{"id": str(i), "prompt": "?", "task": "chat", "split": split, "answer": "x"}
             for i, split in enumerate(("train", "test"))]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (found,), _ = read_source("refusal", source(tmp_path / "rows.jsonl", split="test"))
    assert found.id == "1"
    with pytest.raises(ValueError, match="no row of language None and split dev"):
        read_source("refusal", source(tmp_path / "rows.jsonl", split="dev"))
    clip(tmp_path / "mmar" / "a.wav")
    record = {"id": "m", "audio_path": "a.wav", "question": "Q", "choices": ["0", "1"],
              "answer": "1"}  # fmt: skip
    (tmp_path / "mmar" / "MMAR-meta.json").write_text(json.dumps([record, record]))
    with pytest.raises(ValueError, match="id 'mmar/m' stands there 2 times"):
        read_source("choice", source(tmp_path / "mmar"))


def test_librispeech_is_found_by_its_transcripts(tmp_path: Path) -> None:
    chapter = tmp_path / "test-clean" / "61" / "70968"
    clip(chapter / "61-70968-0000.flac", 2.0)
    lines = "61-70968-0000 HE BEGAN\n61-70968-0001 GONE\n"
    (chapter / "61-70968.trans.txt").write_text(lines)
    (found,), (skipped,) = read_source("speech", source(tmp_path))
    assert (found.id, found.answer) == ("librispeech/test-clean/61-70968-0000", "HE BEGAN")
    assert found.duration_s == 2.0 and skipped.reason == "audio not in the folder"
    assert rs.of_speech(found, says("he began"))["wer"] == (0.0, 2.0)
    with pytest.raises(FileNotFoundError, match="neither LibriSpeech"):
        (tmp_path / "empty").mkdir()
        read_source("speech", source(tmp_path / "empty"))
    with pytest.raises(ValueError, match="--language is missing"):
        (tmp_path / "cv" / "clips").mkdir(parents=True)
        read_source("speech", source(tmp_path / "cv"))


def test_long_audio_needs_a_judge_and_reads_nvidias_json(tmp_path: Path) -> None:
    clip(tmp_path / "talk.wav", 3.0)
    turns = [{"from": "human", "value": "<sound>\nWhat is it about?"},
             {"from": "gpt", "value": "Rivers."}]  # fmt: skip
    record = {"id": "1", "sound": "talk.wav", "conversations": turns}
    (tmp_path / "LongAudioBench.json").write_text(json.dumps([record]))
    (found,), _ = read_source("long_audio", source(tmp_path))
    assert found.answer == "Rivers." and SUITES["long_audio"].needs_judge
    shown = prompt_of(found, Answer("<think>hm</think>About rivers", "stop", 4))
    assert "Reference answer: Rivers." in shown and "Answer to grade: About rivers" in shown
    assert "hm" not in shown.split("Answer to grade")[1]


# --- statistics -------------------------------------------------------------------------------


def test_translation_equals_sacrebleu_on_the_corpus() -> None:
    references = ["the cat sat on the mat today", "it rains a lot in spring", "yes"]
    answers = ["the cat sat on a mat", "it rains in spring a lot", "no"]
    rows = [rs.of_translation(row(Task.TRANSLATION, r), says(a))
            for r, a in zip(references, answers, strict=True)]  # fmt: skip
    scores = rs.summarise(rows, 200)
    bleu, chrf = BLEU(), CHRF(word_order=2)
    assert scores["bleu_13a"]["value"] == pytest.approx(
        bleu.corpus_score(answers, [references]).score
    )
    assert scores["chrf++"]["value"] == pytest.approx(
        chrf.corpus_score(answers, [references]).score
    )
    assert rs.signature("bleu_13a") == str(bleu.get_signature())
    low, high = scores["chrf++"]["ci95"]
    assert low <= scores["chrf++"]["value"] <= high
    assert rs.bleu_name("zh-CN") == "bleu_zh" and rs.bleu_name("ja") == "bleu_ja-mecab"
    assert rs.bleu_name("ar_eg") == "bleu_13a" and rs.bleu_name("cmn_hans_cn") == "bleu_zh"


def test_chinese_bleu_counts_characters() -> None:
    (score,) = (
        rs.summarise([rs.of_translation(row(Task.TRANSLATION, "我喜欢喝热茶", "zh"),
                                        says("我喜欢喝热茶"))], 10)["bleu_zh"],
    )  # fmt: skip
    assert score["value"] == pytest.approx(100.0)


def test_ratios_medians_and_intervals_by_hand() -> None:
    errors = np.array([[2.0, 4.0], [0.0, 6.0]])
    assert rs.aggregate("wer", errors) == 0.2, "errors over words, not a mean of rates"
    assert rs.aggregate("onset_error_median_s", np.array([[1.0], [9.0], [2.0]])) == 2.0
    before, after = np.array([[0.0, 1.0]] * 4), np.array([[1.0, 1.0], *[[0.0, 1.0]] * 3])
    mean, low, high = rs.paired("miou", before, after, 500)
    assert mean == 0.25 and low == 0.0 and 0.5 <= high <= 1.0
    assert verdict(0.01, 0.1, "higher") == "better" and verdict(0.01, 0.1, "lower") == "worse"
    assert verdict(-0.1, 0.1, "lower") == "not told apart"


def test_grounding_statistics_by_hand() -> None:
    question = row(Task.GROUNDING, events=(Event(2.0, 4.0, "bell"),), query="bell")
    found = rs.of_grounding(question, says("<t>3.0-5.0</t>"))
    assert found["miou"][0] == pytest.approx(1 / 3)
    assert found["r1@0.3"] == (1.0, 1.0) and found["r1@0.5"] == (0.0, 1.0)
    assert found["onset_error_s"] == (1.0, 1.0) and found["onset_error_median_s"] == (1.0,)
    unlabelled = row(Task.GROUNDING)
    with pytest.raises(rs.Unscorable, match="no labelled events"):
        rs.of_grounding(unlabelled, says("<t>1-2</t>"))


MULTILINGUAL = json.loads(
    (Path(__file__).parents[1] / "data" / "transcript_cases.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", MULTILINGUAL, ids=lambda c: f"{c['language']}: {c['why']}")
def test_errors_of_hand_worked_transcripts(case: dict) -> None:
    """[errors, length] in words and in characters without spaces; null: nothing to compare."""
    question = row(Task.TRANSCRIPT, case["reference"], case["language"])
    if case["wer"] is None:
        with pytest.raises(rs.Unscorable, match="empty"):
            rs.of_speech(question, says(case["answer"]))
        return
    found = rs.of_speech(question, says(case["answer"]))
    assert found["wer"] == tuple(case["wer"]) and found["cer"] == tuple(case["cer"])


# --- answers, judge, comparison ---------------------------------------------------------------


class CountingModel:
    """Answers with the row's id; fails when its budget of rows is spent."""

    def __init__(self, budget: int = 10**9) -> None:
        self.asked: list[str] = []
        self.budget = budget

    def __call__(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> list[Group]:
        if len(self.asked) + len(requests) > self.budget:
            raise KeyboardInterrupt
        self.asked += [r.prompt_id for r in requests]
        return [
            Group(r.group_id, r.prompt_id, (), (Completion((1, 2), (), f"of {r.prompt_id}",
                                                           "stop", 0),))
            for r in requests
        ]  # fmt: skip


def named_rows(count: int) -> list[Row]:
    prompt = ({"role": "user", "content": "?"},)
    return [Row(f"r{i}", prompt, None, None, Task.CHAT) for i in range(count)]


def test_interrupted_answers_go_on_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    rows, settings = named_rows(10), SamplingSettings(0.0, 8)
    whole = tmp_path / "whole.jsonl"
    collect_answers(rows, CountingModel(), settings, whole, chunk_rows=4, seed=0)
    path = tmp_path / "answers.jsonl"
    first, second = CountingModel(budget=8), CountingModel()
    with pytest.raises(KeyboardInterrupt):
        collect_answers(rows, first, settings, path, chunk_rows=4, seed=0)
    with path.open("a") as torn:
        torn.write('{"id": "r8", "text": "cut o')
    answers = collect_answers(rows, second, settings, path, chunk_rows=4, seed=0)
    assert second.asked == ["r8", "r9"] and first.asked == [f"r{i}" for i in range(8)]
    assert path.read_bytes() == whole.read_bytes()
    assert answers == read_answers(path, rows, 4) and answers[3] == Answer("of r3", "stop", 2)
    with pytest.raises(ValueError, match="answers 'r0' where 'r1' is asked"):
        read_answers(path, rows[1:], 4)


def test_what_an_engine_refuses_is_one_rows_error(tmp_path: Path) -> None:
    class Refusing(CountingModel):
        def __call__(self, requests: Sequence[PromptRequest], settings: SamplingSettings):  # type: ignore[no-untyped-def]
            if any(r.prompt_id == "r1" for r in requests):
                raise ValueError("prompt of 9 tokens\nlonger than 8")
            return super().__call__(requests, settings)

    path, rows = tmp_path / "answers.jsonl", named_rows(3)
    found = collect_answers(rows, Refusing(), SamplingSettings(0.0, 8), path, chunk_rows=3, seed=0)
    assert [a.error for a in found] == ["", "longer than 8", ""]
    assert read_answers(path, rows, 3) == found


def test_a_line_separator_inside_an_answer_is_text(tmp_path: Path) -> None:
    path, rows = tmp_path / "answers.jsonl", named_rows(2)
    lines = [{"id": r.id, "text": "a\u2028b\u0085c", "finish_reason": "stop", "num_tokens": 3}
             for r in rows]  # fmt: skip
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert [a.text for a in read_answers(path, rows, 1)] == ["a\u2028b\u0085c"] * 2


def test_a_judge_that_says_neither_word_gives_no_verdict(tmp_path: Path) -> None:
    assert read_verdict("CORRECT") is True and read_verdict("Incorrect.") is False
    assert read_verdict("<think>not correct?</think>**CORRECT**") is True
    for text in ("Maybe", "NOT CORRECT", "Partially correct", "neither correct nor incorrect"):
        assert read_verdict(text) is None

    class StandInJudge:
        asked = 0
        name = "stand-in"

        def verdict(self, row: Row, answer: Answer) -> bool | None:
            type(self).asked += 1
            return {"r0": True, "r1": None}.get(row.id, False)

    rows = [replace(row, answer="y") for row in named_rows(3)] + [named_rows(4)[3]]
    answers = [Answer("x", "stop", 1)] * 4
    path = tmp_path / "verdicts.jsonl"
    kept = {"id": "r2", "judge": "stand-in", "correct": True}
    other = {"id": "r0", "judge": "another", "correct": False}
    path.write_text(f'{json.dumps(kept)}\n{json.dumps(other)}\n{{"id": "r1", "jud')
    found = collect_verdicts(StandInJudge(), rows, answers, path)  # type: ignore[arg-type]
    assert found == {"r2": True, "r0": True, "r1": None} and StandInJudge.asked == 2


def evaluation(folder: Path, values: dict[str, float], suite: str = "grounding") -> Path:
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"suite": suite, "model": folder.name}))
    lines = [{"id": i, "statistics": {"miou": [v, 1.0]}} for i, v in values.items()]
    lines.append({"id": "failed", "statistics": {}})
    (folder / "scored.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_evaluations_are_compared_over_the_rows_that_both_have(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", {"1": 0.2, "2": 0.4, "3": 0.9})
    b = evaluation(tmp_path / "b", {"2": 0.8, "1": 0.4, "4": 0.0})
    result = compare_evaluations(a, b)
    miou = result["metrics"]["miou"]
    assert result["n"] == 2 and (result["only_in_a"], result["only_in_b"]) == (1, 1)
    assert miou["a"] == pytest.approx(0.3) and miou["b"] == pytest.approx(0.6)
    assert miou["paired_diff"]["mean"] == pytest.approx(0.3)
    other = evaluation(tmp_path / "c", {"1": 0.0}, suite="speech")
    with pytest.raises(ValueError, match="compare two of one suite"):
        compare_evaluations(a, other)
    with pytest.raises(ValueError, match="not one scored row in common"):
        compare_evaluations(a, evaluation(tmp_path / "d", {"9": 0.0}))


# --- the robustness grid ----------------------------------------------------------------------


def test_the_grid_keeps_the_clip_and_moves_its_times(tmp_path: Path) -> None:
    path = clip(tmp_path / "c.flac", 2.0)
    question = Row("q", ({"role": "user", "content": "When?"},), str(path), 2.0, Task.GROUNDING,
                   events=(Event(0.5, 1.0, "bell"),), query="bell")  # fmt: skip
    beds = {kind: robustness.load_bed(kind, root=tmp_path) for kind in ("noise", "music")}
    assert {bed.provenance for bed in beds.values()} == {"simulated"}
    rows = list(robustness.rows([question], [5.0], [1], beds, tmp_path / "out"))
    cells = {(r.metadata["noise"], r.metadata["music"]): r for r in rows if isinstance(r, Row)}
    assert len(cells) == 8 and len({r.events for r in cells.values()}) == 1
    clean, loud = cells["clean", "no music"], cells["0 dB", "no music"]
    offset_s = clean.events[0].start_s - 0.5
    assert 0 <= offset_s <= 3 and clean.duration_s == 5.0
    start = round(offset_s * 16_000)
    original, mixed = load_audio(path), load_audio(clean.audio)
    assert np.abs(mixed[start : start + len(original)] - original).max() < 0.01
    noise = load_audio(loud.audio) - mixed
    snr = 20 * np.log10(np.sqrt(np.mean(original**2)) / np.sqrt(np.mean(noise**2)))
    assert snr == pytest.approx(0.0, abs=0.5)
    music = load_audio(cells["clean", "music"].audio) - mixed
    below = 20 * np.log10(np.sqrt(np.mean(original**2)) / np.sqrt(np.mean(music**2)))
    assert below == pytest.approx(10.0, abs=0.5), "the bed lies 10 dB below the clip"
    (too_long,) = robustness.rows([question], [1.0], [1], beds, tmp_path / "out")
    assert "no labelled clip that fits" in too_long.reason  # type: ignore[union-attr]


def test_rows_of_a_grid_are_valid(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.jsonl"
    path = clip(tmp_path / "c.flac", 2.0)
    record = {"id": "q", "prompt": "When?", "audio": str(path), "duration_s": 2.0,
              "task": "grounding", "events": [{"start_s": 0.5, "end_s": 1.0, "label": "bell"}],
              "query": "bell"}  # fmt: skip
    rows_file.write_text(json.dumps(record) + "\n")
    out = tmp_path / "grid.jsonl"
    robustness.main(["--in", str(rows_file), "--out", str(out), "--lengths-s", "3", "4",
                     "--rows", "1"])  # fmt: skip
    assert {r.metadata["length"] for r in read_rows(out)} == {"3 s", "4 s"}

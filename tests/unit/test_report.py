"""The report's parts without a browser: what is taken, what is embedded, what cannot break out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from posttrain.data.audio import load_audio, write_audio
from posttrain.data.rows import Event, Row, write_rows
from posttrain.report import figures, items
from posttrain.report.clips import Clips, as_mp3, peaks
from posttrain.report.report import Page, render, write_report
from posttrain.types import Task


def clip(path: Path, duration_s: float, loud: float = 0.5) -> str:
    samples = np.zeros(round(16_000 * duration_s), np.float32)
    samples[len(samples) // 2 :] = loud * np.sin(np.arange(len(samples) - len(samples) // 2) / 3)
    write_audio(path, samples)
    return str(path)


def test_clips_are_embedded_up_to_the_cap_and_linked_beyond(tmp_path: Path) -> None:
    first, second = (clip(tmp_path / "audio" / f"{n}.flac", 4.0) for n in "ab")
    size = len(base64.b64encode(as_mp3(load_audio(first))))
    clips = Clips(round(1.5 * size), tmp_path)
    assert [clips.number(p) for p in (first, second, first, None)] == [0, 1, 0, None]
    assert clips.number(str(tmp_path / "gone.flac")) is None
    embedded, linked = clips.records
    assert linked["href"] == "audio/b.flac" and clips.linked == 1
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(embedded["mp3"])))
    assert rate == 16_000 and len(samples) / rate == pytest.approx(4.0, abs=0.1)
    original = load_audio(first)
    later = slice(40_000, 60_000)
    assert np.corrcoef(samples[later], original[later])[0, 1] > 0.98, "in time with the original"


def test_peaks_show_where_it_is_loud() -> None:
    quiet, loud = np.full(3_000, 0.01, np.float32), np.full(3_000, -0.5, np.float32)
    shape = np.frombuffer(base64.b64decode(peaks(np.concatenate([quiet, loud]))), np.uint8)
    assert len(shape) == 600 and set(shape[:300]) == {5} and set(shape[300:]) == {255}


def test_whole_groups_of_evenly_chosen_steps() -> None:
    sizes = {(step, str(group)): 8 for step in range(1, 11) for group in range(2)}
    chosen = items.evenly(sizes, 40)
    assert len(chosen) == 5 and chosen[0] == (1, "0") and chosen[-1] == (10, "1")
    assert items.evenly(sizes, 160) == list(sizes)


def test_cited_times_know_their_place_and_whether_they_are_thought() -> None:
    row = Row("r", ({"role": "user", "content": "When?"},), "a.flac", 10.0, Task.GROUNDING,
              events=(Event(1.0, 2.0, "bell"), Event(3.0, 4.0, "dog")), query="bell")  # fmt: skip
    text = "<think>é <t>3.0-4.0</t></think> bell <t>1.0-2.0</t> <t>8.0-90.0</t>"
    made = items.item("n", row.prompt, text, row, None, score=1.0, terms={}, truncated=False)
    places = [text[start:end] for _, _, _, start, end, _ in made["cited"]]
    assert places == ["<t>3.0-4.0</t>", "<t>1.0-2.0</t>", "<t>8.0-90.0</t>"]
    assert [c[5] for c in made["cited"]] == [True, False, False]
    assert [c[2] for c in made["cited"]] == [True, True, False], "90 s lie outside the clip"
    assert made["labels"] == [[1.0, 2.0, "bell", True], [3.0, 4.0, "dog", False]]


def metric(value: float, n: int = 4) -> dict[str, Any]:
    return {"value": value, "ci95": [value - 0.1, value + 0.1], "n": n, "better": "higher"}


def test_the_heat_map_has_a_cell_for_every_length_and_noise() -> None:
    cells = {f"{length} / {noise} / {music}": {"miou": metric(value)}
             for length, noise, music, value in (
                 ("30 s", "clean", "music", 0.6), ("30 s", "0 dB", "music", 0.2),
                 ("600 s", "clean", "music", 0.1), ("30 s", "clean", "no music", 0.7))}  # fmt: skip
    with_music, without = figures.heat_map(cells, "miou")
    (trace,) = with_music["data"]
    assert (trace["y"], trace["x"]) == (["30 s", "600 s"], ["clean", "0 dB"])
    assert trace["z"] == [[0.6, 0.2], [0.1, None]] and trace["text"][1][1] == ""
    assert without["data"][0]["z"] == [[0.7]] and "no music" in without["title"]


def test_figures_hold_what_was_logged_and_nothing_else() -> None:
    lines = [{"step": s, "reward/mean": 0.1 * s, "reward/std": 0.1, "reward/format": 0.5,
              "rollout/seconds": 2.0, "train/kl": None} for s in (1, 2)]  # fmt: skip
    drawn = {f["title"]: f for f in figures.training_figures(lines)}
    assert list(drawn) == ["Reward", "Reward terms", "Where the time went"]
    assert drawn["Reward"]["data"][1]["y"] == [0.1, 0.2]
    assert drawn["Reward terms"]["data"][0]["name"] == "format"


def evaluation(folder: Path) -> Path:
    """A finished evaluation of two rows, as `posttrain eval` leaves it."""
    folder.mkdir()
    row = Row("<b>one</b>", ({"role": "user", "content": "When?"},),
              clip(folder / "a.flac", 3.0), 3.0, Task.GROUNDING,
              events=(Event(1.5, 3.0, "tone"),), query="tone")  # fmt: skip
    write_rows(folder / "rows.jsonl", [row])
    scored = {"id": row.id, "text": "</script><script>alert(1)</script>\u2028<t>1.5-3.0</t>",
              "finish_reason": "stop", "num_tokens": 9, "groups": {"task": "grounding"},
              "statistics": {"miou": [1.0, 1.0]}}  # fmt: skip
    (folder / "scored.jsonl").write_text(json.dumps(scored, ensure_ascii=False) + "\n")
    (folder / "failed.jsonl").write_text(json.dumps({"id": "x", "reason": "gone <i>"}) + "\n")
    asked = {
        "sampling": {"temperature": 0.0, "max_tokens": 9, "seed": 0}, "engine": "vllm",
        "dtype": "float32", "example_prompt": [{"role": "user", "content": "When?"}],
    }  # fmt: skip
    scores = {
        "suite": "grounding", "model": "m", "main": "miou", "n": 1, "failed": 1, "judge": None,
        "metrics": {"packed_rate": metric(0.0), "miou": metric(0.9)}, "groups": {},
        "signatures": {}, "published": [], "asked": asked,
    }  # fmt: skip
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def test_an_evaluations_page_is_whole_and_harmless(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "eval")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "miou 0.900, 95 % 0.800 to 1.000, n = 4." in page, "the suite's metric leads"
    assert "gone &lt;i&gt;" in page and "<script>alert" not in page and "\u2028" not in page
    assert page.count("<script") == 3 and page.count("</script>") == 3
    held = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    (answer,) = json.loads(held)["collections"]["Answers"]
    assert answer["text"].startswith("</script>") and answer["cited"][0][:3] == [1.5, 3.0, True]


def test_texts_that_look_like_placeholders_are_text(tmp_path: Path) -> None:
    page = render(Page("@@DATA@@", "lead @@SCRIPT@@"), Clips(0, tmp_path))
    assert "<h1>@@DATA@@</h1>" in page and "lead @@SCRIPT@@" in page


def test_what_is_neither_run_nor_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a run"):
        write_report(tmp_path)

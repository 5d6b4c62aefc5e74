from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from data_recipes.recorded_prompts import clip_is_unheard, label_of, load_recordings, trim_to_energy
from data_recipes.timelines import (
    QUESTIONS,
    Sound,
    TimelineSpec,
    ask,
    compose,
    composition_indices,
    format_span,
    split_of,
)
from posttrain.data.audio import load_audio
from posttrain.data.rows import Event, read_rows
from posttrain.types import Task

SOUNDS = [
    Sound(name, (0.2 * np.sin(np.arange(n) * f)).astype(np.float32))
    for name, n, f in (("one", 8_000, 0.3), ("two", 6_400, 0.5), ("beep", 4_800, 0.9))
]


def test_sounds_lie_exactly_where_the_events_say() -> None:
    spec = TimelineSpec(num_events=(4, 4), gain_db=(0, 0), snr_db=(float("inf"),) * 2)
    timeline = compose(random.Random(3), SOUNDS, spec)
    by_label = {s.label: s.waveform for s in SOUNDS}
    rebuilt = np.zeros_like(timeline.waveform)
    for event in timeline.events:
        start = round(event.start_s * 16_000)
        rebuilt[start : start + len(by_label[event.label])] += by_label[event.label]
    assert len(timeline.events) == 4
    np.testing.assert_allclose(timeline.waveform, rebuilt, atol=1e-6)


def test_same_seed_same_timeline_and_overlaps_occur() -> None:
    spec = TimelineSpec(num_events=(5, 5), overlap_probability=1.0)
    a, b = (compose(random.Random(1), SOUNDS, spec) for _ in range(2))
    np.testing.assert_array_equal(a.waveform, b.waveform)
    pairs = zip(a.events, a.events[1:], strict=False)
    assert any(later.start_s < earlier.end_s for earlier, later in pairs)


def test_questions_have_exact_answers() -> None:
    events = (Event(1.0, 1.5, "one"), Event(3.0, 3.4, "two"), Event(6.0, 6.5, "one"))
    labels = ["one", "two", "beep"]
    rng = random.Random(0)
    seen = {}
    for name in QUESTIONS:
        question = ask(rng, events, labels, {name: 1.0})
        seen[name] = question
    assert seen["absent"].query == "beep" and seen["absent"].task is Task.ABSENT
    assert seen["order"].answer == "one"
    count = seen["count"]
    assert count.answer == f"{count.query} {2 if count.query == 'one' else 1} times"
    spans = {"one": "<t>1.0-1.5</t> <t>6.0-6.5</t>", "two": "<t>3.0-3.4</t>"}
    grounding = seen["grounding"]
    assert grounding.answer == f"{grounding.query} {spans[grounding.query]}"
    assert format_span(1.04, 2.06) == "<t>1.0-2.1</t>"


def test_splits_are_stable_and_disjoint() -> None:
    train, test = (set(composition_indices(0, split, 200)) for split in ("train", "test"))
    assert not train & test
    assert split_of(0, 0) == split_of(0, 0)
    assert 0.2 < sum(split_of(0, i) == "test" for i in range(2_000)) / 2_000 < 0.4


def test_bad_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="duration_s"):
        TimelineSpec(duration_s=(10.0, 2_000.0))
    with pytest.raises(ValueError, match="unknown tasks"):
        TimelineSpec(tasks={"sing": 1.0})


def test_written_rows_hold_no_unheard_clip(timelines: Path) -> None:
    rows = read_rows(timelines / "train.jsonl")
    recordings = load_recordings("en")
    unheard = {label_of(c) for c in recordings.clips if c.unheard}
    heard = {label_of(c) for c in recordings.clips if not c.unheard}
    labels = {e.label for row in rows for e in row.events}
    assert labels and not labels & (unheard - heard)
    row = rows[0]
    assert len(load_audio(row.audio)) == round(row.duration_s * 16_000)
    assert all("recorded" in r.source or "synthesised" in r.source for r in rows)


def test_unheard_is_decided_by_the_file_name_in_every_language() -> None:
    assert clip_is_unheard("digits/0") == clip_is_unheard("digits/0")
    share = sum(clip_is_unheard(f"name-{i}") for i in range(3_000)) / 3_000
    assert 0.09 < share < 0.15


def test_trim_keeps_the_loud_part() -> None:
    waveform = np.concatenate([np.zeros(3_200), np.ones(1_600), np.zeros(800)]).astype(np.float32)
    assert len(trim_to_energy(waveform)) == 1_600


def test_without_recordings_speech_is_synthesised_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from data_recipes import recorded_prompts

    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(recorded_prompts, "find_recordings", lambda language: ())
    monkeypatch.setattr(recorded_prompts, "_unpack_without_root", lambda language: False)
    recordings = recorded_prompts.load_recordings("en")
    assert recordings.provenance == "synthesised"
    seven = next(c for c in recordings.clips if c.text == "seven")
    assert 0.2 < len(load_audio(seven.path)) / 16_000 < 1.5
    with pytest.raises(FileNotFoundError, match="asterisk-core-sounds-fr"):
        recorded_prompts.load_recordings("fr", allow_synthesis=False)
    with pytest.raises(ValueError, match="language 'xx'"):
        recorded_prompts.load_recordings("xx")

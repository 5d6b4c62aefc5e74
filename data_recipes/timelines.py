"""Timelines: known clips placed at known times, with questions whose answers are exact.

    recorded clips -> compose(rng) -> waveform + events -> ask(rng) -> Row + FLAC on disk

Compositions are numbered; a stable hash of the number decides train or test, and clips whose
file name falls into the unheard set appear in no train or test composition at all.

    python -m data_recipes.timelines --out data/timelines --train 512 --test 256 \
        --duration 10 30 --events 3 6
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_recipes.recorded_prompts import (
    LICENCE,
    Clip,
    Recordings,
    label_of,
    load_recordings,
    trim_to_energy,
)
from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio, write_audio
from posttrain.data.rows import Event, Row, write_rows
from posttrain.types import Task

TEST_PERCENT = 30
THINK_PROMPT = "Reason step by step with timestamps, then give the final answer."
TRANSCRIBE_PROMPT = "Transcribe the input speech."
DENSE_PROMPT = "Describe all events in the audio with start and end times."


@dataclass(frozen=True)
class TimelineSpec:
    """How timelines are composed.

    Attributes:
        duration_s: shortest and longest timeline, seconds (10 to 1800).
        num_events: fewest and most events.
        gain_db: range of each event's gain.
        snr_db: range of the signal-to-noise ratio; infinite entries mean no noise.
        overlap_probability: chance that an event starts inside the one before it.
        repeat_probability: chance that an event repeats an earlier label.
        tasks: relative weights of the questions.
    """

    duration_s: tuple[float, float] = (10.0, 10.0)
    num_events: tuple[int, int] = (3, 5)
    gain_db: tuple[float, float] = (-6.0, 0.0)
    snr_db: tuple[float, float] = (15.0, 40.0)
    overlap_probability: float = 0.0
    repeat_probability: float = 0.15
    tasks: Mapping[str, float] = field(default_factory=lambda: {"grounding": 1.0})

    def __post_init__(self) -> None:
        low, high = self.duration_s
        if not 1.0 <= low <= high <= 1800.0:
            raise ValueError(f"timelines: duration_s {self.duration_s}; 1 <= low <= high <= 1800")
        unknown = set(self.tasks) - set(QUESTIONS)
        if unknown:
            raise ValueError(f"timelines: unknown tasks {unknown}; known: {sorted(QUESTIONS)}")


@dataclass(frozen=True)
class Sound:
    """A trimmed clip in memory: waveform float32 (num_samples,) at 16 kHz, and its label."""

    label: str
    waveform: np.ndarray

    @property
    def duration_s(self) -> float:
        return len(self.waveform) / SAMPLE_RATE_HZ


@dataclass(frozen=True)
class Timeline:
    """A composed clip: waveform float32 (num_samples,) at 16 kHz, events in order of start."""

    waveform: np.ndarray
    events: tuple[Event, ...]
    duration_s: float


def load_sounds(clips: Sequence[Clip]) -> list[Sound]:
    """Trims every clip to its energy and scales it to RMS 0.1; two clips never share a label."""
    sounds: dict[str, Sound] = {}
    for clip in clips:
        waveform = trim_to_energy(load_audio(clip.path))
        waveform = waveform * (0.1 / max(float(np.sqrt(np.mean(waveform**2))), 1e-6))
        label = label_of(clip)
        sounds.setdefault(label, Sound(label, waveform.astype(np.float32)))
    return list(sounds.values())


def compose(rng: random.Random, sounds: Sequence[Sound], spec: TimelineSpec) -> Timeline:
    """Places sounds on a timeline with random gaps, gains and noise.

    Events that do not fit into the drawn duration are left out, never squeezed.
    """
    duration_s = round(rng.uniform(*spec.duration_s), 2)
    chosen: list[Sound] = []
    for _ in range(rng.randint(*spec.num_events)):
        repeat = chosen and rng.random() < spec.repeat_probability
        sound = rng.choice(chosen if repeat else sounds)
        if sum(s.duration_s for s in chosen) + sound.duration_s < 0.85 * duration_s:
            chosen.append(sound)
    free_s = duration_s - sum(s.duration_s for s in chosen)
    cuts = sorted(rng.uniform(0, free_s) for _ in chosen)
    waveform = np.zeros(round(duration_s * SAMPLE_RATE_HZ), dtype=np.float32)
    events: list[Event] = []
    used_s = 0.0
    for sound, cut_s in zip(chosen, cuts, strict=True):
        start = round((cut_s + used_s) * SAMPLE_RATE_HZ)
        if events and rng.random() < spec.overlap_probability:
            before = events[-1]
            start = round(
                rng.uniform(before.start_s + before.end_s, 2 * before.end_s) / 2 * SAMPLE_RATE_HZ
            )
        end = min(start + len(sound.waveform), len(waveform))
        gain = 10 ** (rng.uniform(*spec.gain_db) / 20)
        waveform[start:end] += gain * sound.waveform[: end - start]
        events.append(Event(start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ, sound.label))
        used_s += sound.duration_s
    waveform += _noise(rng, len(waveform), _draw(rng, spec.snr_db))
    peak = float(np.abs(waveform).max())
    if peak > 0.99:
        waveform *= 0.99 / peak
    events.sort(key=lambda e: (e.start_s, e.end_s))
    return Timeline(waveform, tuple(events), duration_s)


def _draw(rng: random.Random, limits: tuple[float, float]) -> float:
    """Uniform between the limits; equal limits, infinite ones too, give themselves."""
    return limits[0] if limits[0] == limits[1] else rng.uniform(*limits)


def _noise(rng: random.Random, num_samples: int, snr_db: float) -> np.ndarray:
    """White noise `snr_db` below the sounds' RMS of 0.1."""
    if snr_db == float("inf"):
        return np.zeros(num_samples, dtype=np.float32)
    generator = np.random.default_rng(rng.getrandbits(32))
    scale = np.float32(0.1 * 10 ** (-snr_db / 20))
    return generator.standard_normal(num_samples, dtype=np.float32) * scale


@dataclass(frozen=True)
class Question:
    """A question about a timeline: user text, short reference answer, and the label asked for."""

    task: Task
    text: str
    answer: str
    query: str | None = None


def format_span(start_s: float, end_s: float) -> str:
    """A span in the model's native dialect, to a tenth of a second."""
    return f"<t>{start_s:.1f}-{end_s:.1f}</t>"


def describe(events: Sequence[Event]) -> str:
    """The chain that cites every event: `seven <t>2.1-2.6</t> beep <t>...`."""
    return " ".join(f"{e.label} {format_span(e.start_s, e.end_s)}" for e in events)


def spans_of(label: str, events: Sequence[Event]) -> str:
    return " ".join(format_span(e.start_s, e.end_s) for e in events if e.label == label)


def when(label: str, events: Sequence[Event]) -> Question:
    """Asks for the spans of one label that occurs."""
    answer = f"{label} {spans_of(label, events)}"
    return Question(Task.GROUNDING, f"When is {label} heard?", answer, label)


def ask_grounding(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    return when(rng.choice(sorted({e.label for e in events})), events)


def ask_count(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    label = rng.choice(sorted({e.label for e in events}))
    count = sum(e.label == label for e in events)
    return Question(Task.COUNT, f"How often is {label} heard?", f"{label} {count} times", label)


def ask_order(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    present = sorted({e.label for e in events})
    if len(present) < 2:
        return ask_grounding(rng, events, labels)
    pair = rng.sample(present, 2)
    first = next(e.label for e in events if e.label in pair)
    text = f"What is heard first, {pair[0]} or {pair[1]} ?"
    return Question(Task.ORDER, text, first)


def ask_absent(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    present = {e.label for e in events}
    label = rng.choice(sorted(set(labels) - present))
    return Question(Task.ABSENT, f"When is {label} heard?", f"{label} is not heard", label)


def ask_dense(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    return Question(Task.DENSE, DENSE_PROMPT, describe(events))


def ask_transcript(rng: random.Random, events: Sequence[Event], labels: Sequence[str]) -> Question:
    """What is said, in order of onset; for timelines without overlaps and tones."""
    return Question(Task.TRANSCRIPT, TRANSCRIBE_PROMPT, " ".join(e.label for e in events))


QUESTIONS = {
    "transcript": ask_transcript,
    "grounding": ask_grounding,
    "count": ask_count,
    "order": ask_order,
    "absent": ask_absent,
    "dense": ask_dense,
}


def ask(
    rng: random.Random, events: Sequence[Event], labels: Sequence[str], tasks: Mapping[str, float]
) -> Question:
    """One question about the events; `labels` are all that could have been asked for."""
    name = rng.choices(list(tasks), weights=list(tasks.values()))[0]
    return QUESTIONS[name](rng, events, labels)


def full_prompt(question: Question) -> str:
    """The user's text: thinking tasks carry the model family's reasoning instruction."""
    if question.task in (Task.DENSE, Task.TRANSCRIPT):
        return question.text
    return f"{question.text} {THINK_PROMPT}"


def split_of(seed: int, index: int) -> str:
    digest = hashlib.sha256(f"posttrain/timeline/{seed}/{index}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % 100 < TEST_PERCENT else "train"


def composition_indices(seed: int, split: str, count: int) -> Iterator[int]:
    """The first `count` composition numbers that hash into `split`."""
    found, index = 0, 0
    while found < count:
        if split == "unheard" or split_of(seed, index) == split:
            yield index
            found += 1
        index += 1


def make_row(
    sounds: Sequence[Sound], spec: TimelineSpec, *, seed: int, split: str, index: int,
    out_dir: Path, provenance: str, language: str = "en",
) -> Row:  # fmt: skip
    """Composition `index` as a row with its FLAC written below `out_dir`."""
    rng = random.Random(f"posttrain/timeline/{seed}/{split}/{index}")
    timeline = compose(rng, sounds, spec)
    question = ask(rng, timeline.events, [s.label for s in sounds], spec.tasks)
    audio = out_dir / "audio" / f"{split}-{index:06d}.flac"
    write_audio(audio, timeline.waveform)
    return Row(
        id=f"timeline/{seed}/{split}/{index}",
        prompt=({"role": "user", "content": full_prompt(question)},),
        audio=str(audio),
        duration_s=timeline.duration_s,
        events=timeline.events,
        query=question.query,
        answer=question.answer,
        task=question.task,
        language=language,
        source=f"timelines of recorded prompts ({provenance})",
        licence=LICENCE,
        split=split,
    )


def write_timelines(
    recordings: Recordings, spec: TimelineSpec, counts: Mapping[str, int], *, seed: int,
    out_dir: Path, clip_names: Sequence[str] | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Writes `<out_dir>/<split>.jsonl` for every split with a count; returns their paths.

    Args:
        counts: rows a split; keys "train", "test", "unheard".
        clip_names: restricts the clips to these names (None: all).
    """
    known = set(clip_names) if clip_names is not None else None
    clips = [c for c in recordings.clips if known is None or c.name in known]
    paths = {}
    for split, count in counts.items():
        if not count:
            continue
        sounds = load_sounds([c for c in clips if c.unheard == (split == "unheard")])
        indices = tqdm(
            composition_indices(seed, split, count), total=count, desc=f"{split} rows", disable=None
        )
        rows = [
            make_row(sounds, spec, seed=seed, split=split, index=index, out_dir=out_dir,
                     provenance=recordings.provenance, language=recordings.language)
            for index in indices
        ]  # fmt: skip
        paths[split] = out_dir / f"{split}.jsonl"
        write_rows(paths[split], rows)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Composed timelines -> rows with exact times")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--language", default="en")
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--test", type=int, default=0)
    parser.add_argument("--unheard", type=int, default=0)
    parser.add_argument("--duration", type=float, nargs=2, default=(10.0, 30.0), metavar="S")
    parser.add_argument("--events", type=int, nargs=2, default=(3, 6), metavar="N")
    parser.add_argument("--tasks", nargs="+", default=["grounding"], choices=sorted(QUESTIONS))
    parser.add_argument("--overlap", type=float, default=0.0, help="probability, 0 to 1")
    parser.add_argument("--snr", type=float, nargs=2, default=(15.0, 40.0), metavar="DB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    spec = TimelineSpec(
        duration_s=tuple(args.duration), num_events=tuple(args.events), snr_db=tuple(args.snr),
        overlap_probability=args.overlap, tasks=dict.fromkeys(args.tasks, 1.0),
    )  # fmt: skip
    counts = {"train": args.train, "test": args.test, "unheard": args.unheard}
    paths = write_timelines(
        load_recordings(args.language), spec, counts, seed=args.seed, out_dir=args.out
    )
    for split, path in paths.items():
        print(f"{split}: {path}")


if __name__ == "__main__":
    main()

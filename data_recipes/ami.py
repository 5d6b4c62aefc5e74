"""AMI meetings: who speaks when (RTTM) and every word with its times (words XML).

Fetch the annotations and the headset mixes from the AMI corpus (CC BY 4.0), and an RTTM such as
pyannote's. Meetings last an hour, so they are cut into windows at pauses.

    python -m data_recipes.ami --rttm AMI.rttm --words words/ --audio AUDIO_DIR --out rows.jsonl

Each window gives a `dense` row (speakers' turns) and a timestamped transcript.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.streams import Skipped, clip_of, run, seconds
from data_recipes.timelines import format_span
from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio, write_audio
from posttrain.data.rows import Event, Row
from posttrain.types import Task

LICENCE = "CC-BY-4.0"
SPEAKERS_PROMPT = "Who speaks when? Give every turn with start and end times."
TIMED_TRANSCRIPT_PROMPT = (
    "Transcribe the spoken content to written English text. "
    "Provide segment-level timestamps for the transcription."
)
MERGE_PAUSE_S = 0.5


@dataclass(frozen=True)
class Word:
    """One word: seconds from the meeting's start, and its text."""

    start_s: float
    end_s: float
    text: str


def read_rttm(path: Path) -> dict[str, list[Event]]:
    """Meeting -> speakers' turns, in order.

    Raises:
        ValueError: names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the RTTM of the meetings")
    turns: dict[str, list[Event]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        if len(fields) < 8:
            raise ValueError(f"{path}:{number}: {len(fields)} fields; RTTM has at least 8")
        start_s, length_s = (seconds(fields[i], f"{path}:{number}") for i in (3, 4))
        turns.setdefault(fields[1], []).append(Event(start_s, start_s + length_s, fields[7]))
    return {name: sorted(events, key=lambda e: e.start_s) for name, events in turns.items()}


def read_words(folder: Path, meeting: str) -> list[Word]:
    """Words of all speakers of a meeting (`MEETING.A.words.xml`, ...), in order."""
    words: list[Word] = []
    for path in sorted(folder.glob(f"{meeting}.*.words.xml")):
        for element in xml.parse(path).getroot().iter("w"):
            start, end = element.get("starttime"), element.get("endtime")
            text = (element.text or "").strip()
            if element.get("punc") == "true" and words and text:
                last = words[-1]
                words[-1] = Word(last.start_s, last.end_s, last.text + text)
            elif start and end and text:
                words.append(Word(seconds(start, str(path)), seconds(end, str(path)), text))
    return sorted(words, key=lambda w: (w.start_s, w.end_s))


def windows(turns: Sequence[Event], longest_s: float) -> Iterator[tuple[float, float]]:
    """(start, end) of stretches of at most `longest_s` that cut no turn, where that is possible."""
    start_s = end_s = turns[0].start_s
    for turn in turns:
        if turn.end_s - start_s > longest_s and end_s > start_s:
            yield start_s, end_s
            start_s = max(end_s, turn.start_s)
        end_s = max(end_s, turn.end_s)
        while end_s - start_s > longest_s:  # one turn is longer than a window
            yield start_s, start_s + longest_s
            start_s += longest_s
    yield start_s, end_s


def rows(
    rttm: Path, words_dir: Path, audio_dir: Path, out_dir: Path, longest_s: float
) -> Iterator[Row | Skipped]:
    """Rows of every window of every meeting, in the RTTM's order."""
    for meeting, turns in read_rttm(rttm).items():
        clip = clip_of(audio_dir, meeting)
        if isinstance(clip, Skipped):
            yield clip
            continue
        waveform = load_audio(clip[0])
        words = read_words(words_dir, meeting)
        for start_s, end_s in windows(turns, longest_s):
            end_s = min(end_s, clip[1])
            if start_s >= end_s:
                yield Skipped(f"{meeting} {start_s:g} s", "behind the end of the recording")
                continue
            name = f"{meeting}-{round(100 * start_s):07d}-{round(100 * end_s):07d}"
            path = out_dir / f"{name}.flac"
            if not path.exists():
                first, last = round(start_s * SAMPLE_RATE_HZ), round(end_s * SAMPLE_RATE_HZ)
                write_audio(path, waveform[first:last])
            yield from window_rows(name, path, turns, words, start_s, end_s)


def window_rows(
    name: str, path: Path, turns: Sequence[Event], words: Sequence[Word], start_s: float,
    end_s: float,
) -> Iterator[Row | Skipped]:  # fmt: skip
    """Both rows of one window; times count from its start."""
    length_s = end_s - start_s
    inside = [t for t in turns if t.end_s > start_s and t.start_s < end_s]  # cut ones, too
    speakers = {s: f"speaker {i + 1}" for i, s in enumerate(dict.fromkeys(t.label for t in inside))}
    events = tuple(
        Event(max(0.0, t.start_s - start_s), min(t.end_s - start_s, length_s), speakers[t.label])
        for t in inside
    )
    facts: dict[str, Any] = {
        "audio": str(path.resolve()), "duration_s": length_s, "licence": LICENCE, "source": "ami",
    }  # fmt: skip
    if events:
        answer = "\n".join(f"{e.label} {format_span(e.start_s, e.end_s)}" for e in events)
        yield Row(
            id=f"ami/{name}/speakers", prompt=({"role": "user", "content": SPEAKERS_PROMPT},),
            task=Task.DENSE, events=events, answer=answer, **facts,
        )  # fmt: skip
    said = [w for w in words if w.start_s >= start_s and w.end_s <= end_s]
    if not said:
        yield Skipped(name, "no words in the window")
        return
    answer = "\n".join(
        f"{format_span(a - start_s, b - start_s)} {text}" for a, b, text in segments(said)
    )
    yield Row(
        id=f"ami/{name}/transcript", prompt=({"role": "user", "content": TIMED_TRANSCRIPT_PROMPT},),
        task=Task.TRANSCRIPT, answer=answer, **facts,
    )  # fmt: skip


def segments(words: Sequence[Word]) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of words without a pause of more than `MERGE_PAUSE_S` between them."""
    start_s, end_s, texts = words[0].start_s, words[0].end_s, [words[0].text]
    for word in words[1:]:
        if word.start_s - end_s > MERGE_PAUSE_S:
            yield start_s, end_s, _joined(texts)
            start_s, texts = word.start_s, []
        end_s = max(end_s, word.end_s)
        texts.append(word.text)
    yield start_s, end_s, _joined(texts)


def _joined(texts: Sequence[str]) -> str:
    return re.sub(r"\s+([.,?!])", r"\1", " ".join(texts))


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rttm", type=Path, required=True)
        parser.add_argument("--words", type=Path, required=True, help="folder of *.words.xml")
        parser.add_argument("--audio", type=Path, required=True, help="folder of MEETING.wav")
        parser.add_argument("--longest", type=float, default=300.0, help="seconds a window")

    run(
        "AMI -> rows",
        lambda a: rows(a.rttm, a.words, a.audio, a.out.parent / "audio", a.longest), argv,
        arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()

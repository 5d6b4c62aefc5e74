"""What the learned grounding reward learns from: crops with phrases, and claims true and false."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio
from posttrain.data.rows import Event, Row
from posttrain.model.frozen_features import FrozenFeatures
from reward_models.spans import span_iou

CALIBRATION_PERCENT = 15


@dataclass(frozen=True)
class Crop:
    """Part of a clip: frames (N, D), and the events inside it in seconds from its start."""

    frames_NF: Tensor
    events: tuple[Event, ...]


@dataclass(frozen=True)
class FrameBatch:
    """B crops and P phrases, padded.

    Attributes:
        frames_BNF, mask_BN: frames and which of them are real.
        phrases: (P,) texts.
        labels_BPN: 1.0 where the phrase is heard.
        known_BPN: where the label is known at all.
    """

    frames_BNF: Tensor
    mask_BN: Tensor
    phrases: tuple[str, ...]
    labels_BPN: Tensor
    known_BPN: Tensor


def for_calibration(row: Row) -> bool:
    """Whether the row is kept from the frame loss: a stable hash of its id decides."""
    digest = hashlib.sha256(f"posttrain/calibration/{row.id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < CALIBRATION_PERCENT


def timed(rows: Sequence[Row]) -> list[Row]:
    """Rows with labelled events and audio; one per clip."""
    clips = {r.audio: r for r in rows if r.audio and any(e.label for e in r.events)}
    return list(clips.values())


def crop_of(row: Row, features: FrozenFeatures, rng: random.Random, max_windows: int) -> Crop:
    """The whole clip where it is short, else `max_windows` encoder windows of it."""
    assert row.audio is not None and row.duration_s is not None
    longest_s = max_windows * features.window_s
    if row.duration_s <= longest_s:
        return Crop(features.audio(row.audio), row.events)
    first = rng.randrange(int(row.duration_s // features.window_s) - max_windows + 1)
    start_s = float(first * features.window_s)
    samples = load_audio(row.audio)[
        int(start_s * SAMPLE_RATE_HZ) : int((start_s + longest_s) * SAMPLE_RATE_HZ)
    ]
    events = [
        Event(max(e.start_s - start_s, 0.0), min(e.end_s - start_s, longest_s), e.label)
        for e in row.events
        if e.end_s > start_s and e.start_s < start_s + longest_s
    ]
    return Crop(features.encode(samples), tuple(events))


def frame_batches(
    rows: Sequence[Row], features: FrozenFeatures, *, batch_size: int, absent_phrases: int,
    max_windows: int, seed: int,
) -> Iterator[FrameBatch]:  # fmt: skip
    """Endless batches: the phrases of all crops of a batch are asked of each of them, and
    `absent_phrases` further ones of the training set, most of which none of them holds."""
    rng = random.Random(f"posttrain/reward/{seed}")
    labels = sorted({e.label for row in rows for e in row.events if e.label})
    while True:
        order = list(rows)
        rng.shuffle(order)
        for i in range(0, len(order) - batch_size + 1, batch_size):
            crops = [crop_of(row, features, rng, max_windows) for row in order[i : i + batch_size]]
            extra = rng.sample(labels, min(absent_phrases, len(labels)))
            phrases = {e.label for crop in crops for e in crop.events if e.label} | set(extra)
            yield collate(crops, sorted(phrases), features)


def collate(crops: Sequence[Crop], phrases: Sequence[str], features: FrozenFeatures) -> FrameBatch:
    longest = max(len(crop.frames_NF) for crop in crops)
    frames = torch.zeros(len(crops), longest, features.audio_width)
    mask = torch.zeros(len(crops), longest, dtype=torch.bool)
    labels = torch.zeros(len(crops), len(phrases), longest)
    place = {phrase: i for i, phrase in enumerate(phrases)}
    for i, crop in enumerate(crops):
        frames[i, : len(crop.frames_NF)] = crop.frames_NF.cpu()
        mask[i, : len(crop.frames_NF)] = True
        for event in crop.events:
            if event.label in place:
                first = round(event.start_s / features.frame_s)
                last = max(first + 1, round(event.end_s / features.frame_s))
                labels[i, place[event.label], first:last] = 1.0
    known = mask[:, None].expand_as(labels)
    device = features.device
    return FrameBatch(
        frames.to(device), mask.to(device), tuple(phrases), labels.to(device), known.to(device)
    )


KINDS = ("true", "wrong_time", "wrong_words", "absent")


@dataclass(frozen=True)
class ClaimExample:
    """A phrase and a span of a clip, and whether the claim is true ("kind": one of KINDS)."""

    row_index: int
    phrase: str
    start_s: float
    end_s: float
    kind: str

    @property
    def is_true(self) -> bool:
        return self.kind == "true"


def claim_examples(
    rows: Sequence[Row], labels: Sequence[str], rng: random.Random, *, jitter: float = 0.05
) -> list[ClaimExample]:
    """For each event one true claim and one of each false kind that the clip allows.

    true: both ends moved by up to `jitter` of the length. wrong_time: right words, the span
    shifted by 0.5 to 1.5 of its length, away from every event of the label. wrong_words: right
    time, the label of another event of the clip. absent: a label that the clip does not hold.
    """
    out: list[ClaimExample] = []
    for i, row in enumerate(rows):
        present = sorted({e.label for e in row.events if e.label})
        missing = [label for label in labels if label not in present]
        for event in (e for e in row.events if e.label):
            length_s = event.end_s - event.start_s
            ends = (event.start_s, event.end_s)
            moved = [t + rng.uniform(-jitter, jitter) * length_s for t in ends]
            out.append(ClaimExample(i, event.label, moved[0], moved[1], "true"))
            if shifted := shifted_span(event, row, rng):
                out.append(ClaimExample(i, event.label, *shifted, "wrong_time"))
            others = [
                e.label
                for e in row.events
                if e.label not in ("", event.label) and not _heard(row, e.label, ends)
            ]
            if others:
                out.append(ClaimExample(i, rng.choice(sorted(others)), *ends, "wrong_words"))
            if missing:
                out.append(ClaimExample(i, rng.choice(missing), *ends, "absent"))
    return out


def shifted_span(event: Event, row: Row, rng: random.Random) -> tuple[float, float] | None:
    """The event's span shifted by 0.5 to 1.5 of its length, inside the clip and with an IoU of at
    most 0.34 with every event of its label; None when ten tries find none."""
    length_s = event.end_s - event.start_s
    for _ in range(10):
        shift_s = rng.choice((-1, 1)) * rng.uniform(0.5, 1.5) * length_s
        start_s, end_s = event.start_s + shift_s, event.end_s + shift_s
        inside = start_s >= 0 and end_s <= (row.duration_s or 0.0)
        if inside and not _heard(row, event.label, (start_s, end_s), 0.34):
            return start_s, end_s
    return None


def _heard(row: Row, label: str, span: tuple[float, float], at_least: float = 0.1) -> bool:
    return any(
        span_iou((e.start_s, e.end_s), span) > at_least for e in row.events if e.label == label
    )

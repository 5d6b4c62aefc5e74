"""What AF-Next-nano is taught: look-up drills on text, then conversations with and without audio.

    Drills         list of timed items, then every item asked again      text, no chat
    Conversations  question, chain of timed events, answer, follow-ups   text or composed audio

A batch is a dict: `input_ids` and `weights_BT` (B, T), and with audio the features and
`frame_targets_WF5` (windows, frames of 40 ms, 5): which label sounds (0 for none), and the second
and tenth at which its event starts and ends (`NO_EVENT` where none sounds).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_recipes import timelines
from data_recipes.timelines import Sound, TimelineSpec
from posttrain.data.audio import SAMPLE_RATE_HZ
from posttrain.data.chat import assistant_mask, drop_tokenless_tail, render
from posttrain.data.rows import Event
from posttrain.model import nano

OPENING_TASKS = {"grounding": 0.7, "count": 0.1, "order": 0.1, "absent": 0.1}
DENSE_FIRST = 0.5
DIRECT_SHARE = 0.5
FOLLOW_UPS = 3
UNPREDICTABLE_WEIGHT = 0.05
FRAMES_PER_S = 25
NO_EVENT = -100
Pieces = list[tuple[str, float]]  # text and the weight of its tokens in the loss
# (until step, rows of each kind): recite, pairs, spans
CURRICULUM = ((180, (32, 0, 0)), (260, (8, 48, 0)), (math.inf, (4, 12, 24)))


@dataclass
class Drills:
    """Look-up on bare text, in three kinds that build on each other.

        recite  may six beep<|im_end|> may six beep<|im_end|> may six beep
        pairs   may 4 six 1 beep 7<|im_end|> six 1 beep 7 may 4
        spans   may <t>0.8-1.3</t> six <t>2.1-2.5</t><|im_end|> six <t>2.1-2.5</t> may ...

    Started on spans, four layers never tie a time to its name; reciting first, with dozens of
    names a row, forms the heads that the other kinds use. Only what can be looked up has weight.
    `first_step` enters the curriculum later.
    """

    tokenizer: Any
    labels: Sequence[str]
    seed: int
    first_step: int = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = random.Random(f"posttrain/nano/{self.seed}/drills/{self.first_step}")
        step = self.first_step
        while True:
            counts = next(mix for until, mix in CURRICULUM if step < until)
            kinds = (self._recite, self._pairs, self._spans)
            rows = [kind(rng) for kind, n in zip(kinds, counts, strict=True) for _ in range(n)]
            yield _pad([self._encode(row) for row in rows], self.tokenizer.pad_token_id)
            step += 1

    def _recite(self, rng: random.Random) -> Pieces:
        names = rng.sample(self.labels, rng.randint(10, 50))
        first, *others = (f" {name}" for name in names)
        again = [("<|im_end|>", 0.0), (first, 0.0), ("".join(others), 1.0)]
        return [(first + "".join(others), 0.0), *again, *again]

    def _pairs(self, rng: random.Random) -> Pieces:
        digits = {
            name: str(rng.randrange(10)) for name in rng.sample(self.labels, rng.randint(3, 20))
        }
        asked = rng.sample(list(digits), len(digits))
        return [
            ("".join(f" {name}{digit}" for name, digit in digits.items()) + "<|im_end|>", 0.0),
            *(piece for name in asked for piece in ((f" {name}", 0.0), (digits[name], 1.0))),
        ]

    def _spans(self, rng: random.Random) -> Pieces:
        events = imagined_events(rng, self.labels, 10)
        names = list(dict.fromkeys(e.label for e in events))
        pieces: Pieces = [(f" {timelines.describe(events)}<|im_end|>", UNPREDICTABLE_WEIGHT)]
        for name in rng.sample(names, len(names)):
            pieces += [(f" {name}", 0.0), (f" {timelines.spans_of(name, events)}", 1.0)]
        return pieces

    def _encode(self, pieces: Pieces) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            weights += [weight] * len(tokens)
        return ids, weights


@dataclass
class Conversations:
    """Chats about a timeline; without a `spec` they are about imagined events, on text alone.

    Half open with the request to list everything, so that the list is learned without a hint
    from the question; the others open with a question, answered after the chain of timed events
    or, with probability `DIRECT_SHARE`, at once. Which of the two pays is left to reinforcement
    learning. Follow-up questions come once there is a list to look them up in.
    """

    processor: Any
    sounds: Sequence[Sound]
    batch_size: int
    seed: int
    spec: TimelineSpec | None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        stage = "text" if self.spec is None else f"{self.spec.duration_s}"
        rng = random.Random(f"posttrain/nano/{self.seed}/{stage}")
        while True:
            yield self._batch([self._conversation(rng) for _ in range(self.batch_size)])

    def _conversation(self, rng: random.Random) -> dict[str, Any]:
        labels = [s.label for s in self.sounds]
        if self.spec is None:
            waveform, events = None, imagined_events(rng, labels, 6)
        else:
            timeline = timelines.compose(rng, self.sounds, self.spec)
            waveform, events = timeline.waveform, timeline.events
        turns = _opening(rng, events, labels, direct=waveform is not None)
        for _ in range(FOLLOW_UPS):
            question = timelines.ask(rng, events, labels, OPENING_TASKS)
            turns.append((question.text, question.answer))
        messages = [
            {"role": role, "content": content}
            for user, assistant in turns
            for role, content in (("user", user), ("assistant", f" {assistant}"))
        ]
        text = render(self.processor, messages, has_audio=waveform is not None, generate=False)
        return {"text": text, "waveform": waveform, "events": events}

    def _batch(self, lessons: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        if self.spec is None:
            return _pad([self._weighted(lesson) for lesson in lessons], tokenizer.pad_token_id)
        waveforms = [drop_tokenless_tail(x["waveform"], self.processor) for x in lessons]
        batch = self.processor(
            text=[lesson["text"] for lesson in lessons], audio=waveforms, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        ids_BT = batch["input_ids"]
        return {
            "input_ids": ids_BT,
            "weights_BT": torch.stack([assistant_mask(ids, tokenizer) for ids in ids_BT]).float(),
            "input_features": batch["input_features"],
            "input_features_mask": batch["input_features_mask"],
            "frame_targets_WF5": self._frame_targets(lessons, waveforms),
        }

    def _weighted(self, lesson: dict[str, Any]) -> tuple[list[int], list[float]]:
        """Ids and weights of a text conversation: without audio its list is a random draw."""
        tokenizer = self.processor.tokenizer
        text, listing = lesson["text"], timelines.describe(lesson["events"])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        weights = assistant_mask(torch.tensor(encoded["input_ids"]), tokenizer).float().tolist()
        start = text.index(listing) - 1
        for i, (first, last) in enumerate(encoded["offset_mapping"]):
            if start <= first and last <= start + 1 + len(listing):
                weights[i] = UNPREDICTABLE_WEIGHT
        return encoded["input_ids"], weights

    def _frame_targets(self, lessons: Sequence[dict[str, Any]], waveforms: Sequence[Any]) -> Tensor:
        index = {s.label: i + 1 for i, s in enumerate(self.sounds)}
        frames = nano.WINDOW_S * FRAMES_PER_S
        out = []
        for lesson, waveform in zip(lessons, waveforms, strict=True):
            num_windows = math.ceil(len(waveform) / SAMPLE_RATE_HZ / nano.WINDOW_S)
            targets = torch.full((num_windows * frames, 5), NO_EVENT)
            targets[:, 0] = 0
            for event in lesson["events"]:
                first, last = (round(s * FRAMES_PER_S) for s in (event.start_s, event.end_s))
                tenths = (round(10 * s) for s in (event.start_s, event.end_s))
                digits = [digit for tenth in tenths for digit in divmod(tenth, 10)]
                targets[first:last] = torch.tensor([index[event.label], *digits])
            out.append(targets.view(-1, frames, 5))
        return torch.cat(out)


def _opening(
    rng: random.Random, events: Sequence[Event], labels: Sequence[str], *, direct: bool
) -> list[tuple[str, str]]:
    """The first turns, up to and with the list of all events."""
    listing = timelines.describe(events)
    dense = (timelines.DENSE_PROMPT, listing)
    if rng.random() < DENSE_FIRST:
        return [dense]
    question = timelines.ask(rng, events, labels, OPENING_TASKS)
    prompt = timelines.full_prompt(question)
    if direct and rng.random() < DIRECT_SHARE:
        return [(prompt, question.answer), dense]
    return [(prompt, f"<think> {listing}</think> {question.answer}")]


def imagined_events(rng: random.Random, labels: Sequence[str], most: int) -> tuple[Event, ...]:
    """Two to `most` timed items that nobody recorded, in order of start."""
    limit_s = rng.choice((10.0, 30.0))
    starts = sorted(rng.uniform(0, limit_s - 1) for _ in range(rng.randint(2, most)))
    events: list[Event] = []
    for start_s in starts:
        repeat = len(events) > 1 and rng.random() < 0.1
        label = rng.choice(events).label if repeat else rng.choice(labels)
        events.append(Event(start_s, start_s + rng.uniform(0.2, 1.0), label))
    return tuple(events)


def _pad(rows: Sequence[tuple[list[int], list[float]]], pad_id: int) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]),
        "weights_BT": torch.tensor([w + [0.0] * (longest - len(w)) for _, w in rows]),
    }

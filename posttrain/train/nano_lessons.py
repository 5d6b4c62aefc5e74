"""What AF-Next-nano is taught: look-up drills on text, then conversations with and without audio.

    Drills         list of timed items, then every item asked again      text, no chat
    Conversations  question, chain of timed events, answer, follow-ups   composed audio

A batch is a dict: `input_ids` and `weights_BT` (B, T); of conversations also `spelled_N`, the token
that each audio embedding should equal, in the order of the audio tokens, and, unless the audio is
only imagined, the features:

    audio    |......may may may may.............six six six|
    spelled  |......m<t>0.8-1.3</t>.............s<t>2.1-2.5|     m, s: names; . a token for silence
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_recipes import timelines
from data_recipes.timelines import Sound, TimelineSpec
from posttrain.data.audio import AUDIO_TOKENS_PER_S
from posttrain.data.chat import assistant_mask, drop_tokenless_tail, render
from posttrain.data.rows import Event

OPENING_TASKS = {"grounding": 0.7, "count": 0.1, "order": 0.1, "absent": 0.1}
LESSONS = {"list": 0.4, "chain": 0.2, "direct": 0.4}
TEACHER = {"list": 0.2, "chain": 0.6, "direct": 0.2}
HABITS = {"list": 0.5, "chain": 0.15, "hasty": 0.35}
FOLLOW_UPS = 2
UNPREDICTABLE_WEIGHT = 0.05
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
    """Chats about composed timelines; `imagined` leaves the sound out and only spells it.

    How they open is drawn from `openings`:

        list    all events, asked for without a hint of which will matter
        chain   a question, answered after the chain of timed events
        direct  every event asked for in turn, in any order, and answered at once, which nothing
                in the text can help with
        hasty   a question, answered at once and with the first time only; then the list

    In `LESSONS` direct answers teach to look up what was heard. In `HABITS` thinking is the
    exception, and better: that it pays is left to reinforcement learning to find out. `TEACHER`
    thinks before it answers.
    """

    processor: Any
    sounds: Sequence[Sound]
    batch_size: int
    seed: int
    spec: TimelineSpec
    openings: Mapping[str, float] = field(default_factory=lambda: LESSONS)
    imagined: bool = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        kind = "imagined" if self.imagined else "heard"
        rng = random.Random(f"posttrain/nano/{self.seed}/{kind}/{self.spec.duration_s}")
        while True:
            yield self._batch([self._conversation(rng) for _ in range(self.batch_size)])

    def _conversation(self, rng: random.Random) -> dict[str, Any]:
        labels = [s.label for s in self.sounds]
        timeline = timelines.compose(rng, self.sounds, self.spec)
        events = timeline.events
        turns = _opening(rng, events, labels, self.openings)
        for _ in range(FOLLOW_UPS):
            question = timelines.ask(rng, events, labels, OPENING_TASKS)
            turns.append((question.text, question.answer))
        messages = [
            {"role": role, "content": content}
            for user, assistant in turns
            for role, content in (("user", user), ("assistant", f" {assistant}"))
        ]
        text = render(self.processor, messages, has_audio=True, generate=False)
        return {"text": text, "waveform": timeline.waveform, "events": events}

    def _batch(self, lessons: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer = self.processor.tokenizer
        waveforms = [drop_tokenless_tail(x["waveform"], self.processor) for x in lessons]
        batch = self.processor(
            text=[lesson["text"] for lesson in lessons], audio=waveforms, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        ids_BT = batch["input_ids"]
        num_frames_B = (ids_BT == self.processor.audio_token_id).sum(1).tolist()
        out = {
            "input_ids": ids_BT,
            "weights_BT": torch.stack([assistant_mask(ids, tokenizer) for ids in ids_BT]).float(),
            "spelled_N": torch.cat(
                [self._spell(x["events"], n) for x, n in zip(lessons, num_frames_B, strict=True)]
            ),
        }
        if self.imagined:
            return out
        return out | {key: batch[key] for key in ("input_features", "input_features_mask")}

    def _spell(self, events: Sequence[Event], num_frames: int) -> Tensor:
        """Every event's `name <t>a-b</t>` from the frame on at which it starts.

        Silence is the audio token itself: its own embedding is never used otherwise.
        """
        silence = self.processor.audio_token_id
        spelled_F = torch.full((num_frames,), silence)
        for event in events:
            text = f" {timelines.describe([event])}"
            encoded = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            ids = encoded["input_ids"][0]
            rest = spelled_F[round(event.start_s * AUDIO_TOKENS_PER_S) :]
            rest.fill_(silence)  # an overlapping event cuts the one before short
            rest[: len(ids)] = ids[: len(rest)]
        return spelled_F


def _opening(
    rng: random.Random, events: Sequence[Event], labels: Sequence[str],
    openings: Mapping[str, float],
) -> list[tuple[str, str]]:  # fmt: skip
    """The first turns: user, assistant."""
    opening = rng.choices(list(openings), weights=list(openings.values()))[0]
    listing = timelines.describe(events)
    dense = (timelines.DENSE_PROMPT, listing)
    if opening == "list":
        return [dense]
    if opening == "hasty":
        question = timelines.ask_grounding(rng, events, labels)
        earliest = next(e for e in events if e.label == question.query)
        return [(timelines.full_prompt(question), timelines.describe([earliest])), dense]
    if opening == "chain":
        question = timelines.ask(rng, events, labels, OPENING_TASKS)
        return [(timelines.full_prompt(question), f"<think> {listing}</think> {question.answer}")]
    present = sorted({e.label for e in events})
    questions = [timelines.when(label, events) for label in rng.sample(present, len(present))]
    first, *others = questions
    return [(timelines.full_prompt(first), first.answer), *((q.text, q.answer) for q in others)]


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

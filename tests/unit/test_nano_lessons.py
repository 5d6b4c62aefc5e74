"""What nano is taught: what has weight in the loss, and which label sounds at which frame."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor

from data_recipes import timelines
from data_recipes.timelines import Sound, TimelineSpec
from posttrain.data.rows import Event, Row
from posttrain.train.nano_card import succeeds
from posttrain.train.nano_lessons import NO_EVENT, Conversations, Drills, imagined_events
from posttrain.types import Completion, Task

WORDS = (
    "seven eight nine one two three four five six twelve twenty thirty forty fifty sixty seventy "
    "eighty ninety monday tuesday friday sunday saturday january april march may june july august "
    "october hello location today tomorrow star pound thousand beep a e f h k l m o q r s w y z "
    "november december"
)
LABELS = WORDS.split()
NOISE = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
SOUNDS = [Sound(label, NOISE) for label in LABELS]


@pytest.fixture(scope="module")
def processor(nano: str) -> Any:
    return AutoProcessor.from_pretrained(nano)


def weighted_text(processor: Any, batch: dict, row: int, weight: float) -> str:
    ids, weights = batch["input_ids"][row], batch["weights_BT"][row]
    return processor.tokenizer.decode(ids[weights == weight])


@pytest.mark.parametrize(("first_step", "row"), [(0, 0), (180, 8), (300, 16)])
def test_drills_weigh_answers_alone(processor: Any, first_step: int, row: int) -> None:
    """Every token of full weight stands in the list before it, in the same number or fewer."""
    batch = next(iter(Drills(processor.tokenizer, LABELS, seed=0, first_step=first_step)))
    ids, weights = batch["input_ids"][row], batch["weights_BT"][row]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    listing = ids[: (ids == end).nonzero()[0, 0]]
    asked = ids[weights == 1.0]
    assert len(asked) and set(asked.tolist()) <= set(listing.tolist())


def test_later_drills_are_spans(processor: Any) -> None:
    start, spans = (
        next(iter(Drills(processor.tokenizer, LABELS, seed=0, first_step=step)))
        for step in (0, 260)
    )
    tag = processor.tokenizer.convert_tokens_to_ids("<t>")
    assert not (start["input_ids"] == tag).any()
    assert (spans["input_ids"] == tag).any(dim=1).sum() == 24


def test_text_conversations_discount_the_list_that_nobody_can_hear(processor: Any) -> None:
    lessons = Conversations(processor, SOUNDS, 8, 0, None)
    batch = next(iter(lessons))
    for row in range(8):
        text = processor.tokenizer.decode(batch["input_ids"][row])
        low = weighted_text(processor, batch, row, 0.05)
        assert low.strip() in text and low.count("<t>") == low.count("</t>") >= 2
        assert "<t>" not in weighted_text(processor, batch, row, 0.0)
    answers = weighted_text(processor, batch, 0, 1.0)
    assert "<|im_end|>" in answers and "user" not in answers


def test_audio_conversations_answer_with_and_without_a_chain(processor: Any) -> None:
    spec = TimelineSpec(duration_s=(3.0, 4.0), num_events=(2, 3))
    lessons = Conversations(processor, SOUNDS, 64, 0, spec)
    batch = next(iter(lessons))
    texts = [processor.tokenizer.decode(ids) for ids in batch["input_ids"]]
    asked = [t for t in texts if timelines.THINK_PROMPT in t]
    thinking = [t for t in asked if "<think>" in t]
    assert 0.3 <= len(asked) / 64 <= 0.7
    assert 0.25 <= len(thinking) / len(asked) <= 0.75
    assert all(timelines.DENSE_PROMPT in t for t in set(asked) - set(thinking))


def test_frame_labels_lie_where_the_events_are(processor: Any) -> None:
    spec = TimelineSpec(duration_s=(11.0, 12.0), num_events=(2, 2))
    lessons = Conversations(processor, SOUNDS, 1, 0, spec)
    lesson = lessons._conversation(random.Random(3))
    targets = lessons._batch([lesson])["frame_targets_WF5"]
    assert targets.shape == (2, 250, 5), "two windows of 10 s, 40 ms a frame"
    for event in lesson["events"]:
        middle = round((event.start_s + event.end_s) / 2 * 25)
        label, *digits = targets.flatten(0, 1)[middle].tolist()
        assert LABELS[label - 1] == event.label
        assert "{}.{}-{}.{}".format(*digits) == f"{event.start_s:.1f}-{event.end_s:.1f}"
    assert (targets[..., 0] == 0).any() and (targets[..., 1] == NO_EVENT).any()


def test_imagined_events_are_in_order_of_start() -> None:
    for seed in range(20):
        events = imagined_events(random.Random(seed), LABELS, 6)
        assert 2 <= len(events) <= 6
        assert [e.start_s for e in events] == sorted(e.start_s for e in events)


def test_the_same_seed_gives_the_same_lessons(processor: Any) -> None:
    first, second = (
        list(islice(Drills(processor.tokenizer, LABELS, seed=5, first_step=260), 2))
        for _ in range(2)
    )
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("answer", "success"),
    [
        ("<think> may six</think> may <t>1.0-2.0</t> six <t>3.0-4.0</t>", 1.0),
        ("six <t>1.0-2.0</t> may <t>3.0-4.0</t>", 0.0),
        ("may <t>1.0-2.0</t> six <t>8.0-9.0</t>", 1.0),
        ("may <t>1.0-2.0</t> six <t>8.0-9.0</t> two <t>3.0-4.0</t>", 0.0),
        ("may and six", 0.0),
    ],
)
def test_a_list_succeeds_only_with_times_under_the_right_names(answer: str, success: float) -> None:
    """2 * overlap / (stated + true) of at least a half: 1, 0, 2/4, 2/5, 0."""
    events = (Event(1.0, 2.0, "may"), Event(3.0, 4.0, "six"))
    prompt = ({"role": "user", "content": timelines.DENSE_PROMPT},)
    row = Row("r", prompt, "a.wav", 10.0, Task.DENSE, events)
    assert succeeds(row, Completion((), (), answer, "stop", 0)) == success

"""What nano is taught: what has weight in the loss, and which label sounds at which frame."""

from __future__ import annotations

import math
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from data_recipes import timelines
from data_recipes.timelines import Sound, TimelineSpec
from posttrain.data.rows import Event, Row
from posttrain.train.nano_card import succeeds
from posttrain.train.nano_lessons import HABITS, LESSONS, Conversations, Drills, imagined_events
from posttrain.train.nano_pretrain import frame_loss
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


@pytest.mark.parametrize("openings", [LESSONS, HABITS])
def test_conversations_open_in_the_proportions_asked_for(
    processor: Any, openings: dict[str, float]
) -> None:
    spec = TimelineSpec(duration_s=(3.0, 4.0), num_events=(2, 3))
    batch = next(iter(Conversations(processor, SOUNDS, 64, 0, spec, openings)))
    texts = [processor.tokenizer.decode(ids) for ids in batch["input_ids"]]
    chained = [t for t in texts if "<think>" in t]
    at_once = [t for t in texts if timelines.THINK_PROMPT in t and "<think>" not in t]
    listed = [t for t in texts if timelines.DENSE_PROMPT in t and timelines.THINK_PROMPT not in t]
    assert len(listed) + len(chained) + len(at_once) == 64
    for kind, some in zip(openings, (listed, chained, at_once), strict=True):
        assert 0.5 * openings[kind] <= len(some) / 64 <= 1.6 * openings[kind]
    answers = weighted_text(processor, batch, 0, 1.0)
    assert "<|im_end|>" in answers and "user" not in answers


def test_hasty_answers_give_the_first_time_only(processor: Any) -> None:
    spec = TimelineSpec(duration_s=(6.0, 7.0), num_events=(3, 3), repeat_probability=1.0)
    lessons = Conversations(processor, SOUNDS, 1, 0, spec, {"hasty": 1.0})
    lesson = lessons._conversation(random.Random(1))
    first = lesson["text"].partition("assistant\n")[2].partition("<|im_end|>")[0]
    assert first == f" {timelines.describe(lesson['events'][:1])}"
    assert timelines.describe(lesson["events"]) in lesson["text"]


@pytest.mark.parametrize("imagined", [False, True])
def test_audio_spells_its_events_from_where_they_start(processor: Any, imagined: bool) -> None:
    spec = TimelineSpec(duration_s=(11.0, 12.0), num_events=(2, 2))
    lessons = Conversations(processor, SOUNDS, 1, 0, spec, imagined=imagined)
    lesson = lessons._conversation(random.Random(3))
    batch = lessons._batch([lesson])
    tokenizer, spelled_N = processor.tokenizer, batch["spelled_N"]
    assert len(spelled_N) == (batch["input_ids"] == processor.audio_token_id).sum()
    assert ("input_features" in batch) is not imagined
    heard = tokenizer.decode(spelled_N, skip_special_tokens=True)
    assert heard.split() == timelines.describe(lesson["events"]).replace(" <t>", "<t>").split()
    for event in lesson["events"]:
        first = round(event.start_s * 25)
        assert tokenizer.decode(spelled_N[first]).strip() == event.label
        assert spelled_N[first - 1] == processor.audio_token_id, "silence before"


def test_an_overlapping_event_cuts_the_one_before_short(processor: Any) -> None:
    """`may <t>1.0-1.6</t>` is ten tokens from frame 25; `six` starts five frames later."""
    lessons = Conversations(processor, SOUNDS, 1, 0, TimelineSpec())
    events = (Event(1.0, 1.6, "may"), Event(1.2, 1.5, "six"))
    spelled = processor.tokenizer.decode(lessons._spell(events, 60), skip_special_tokens=True)
    assert spelled.replace(" ", "") == "may<t>1.0six<t>1.2-1.5</t>"


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


def test_frame_loss_by_hand() -> None:
    """Two tokens at right angles, of length 1: scores are 6 * (2 f.e - 1)."""
    table = torch.eye(2)
    spelled = torch.tensor([0])
    exact = math.log1p(math.exp(-12.0))
    assert float(frame_loss(table[:1], spelled, table)) == pytest.approx(exact, abs=1e-6)
    silent = float(frame_loss(torch.zeros(1, 2), spelled, table))
    assert silent == pytest.approx(math.log(2) + 1.0)
    too_long = float(frame_loss(3 * table[:1], spelled, table))
    assert too_long == pytest.approx(4.0, abs=1e-4), "twice its length too far"

"""What must hold for every answer: range, order, repetition, wrong spans, overlap."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.rows import Event, Row
from posttrain.types import Completion, RewardResult, Task
from reward_models.audio_text import expected_iou
from reward_models.chain import ChainGrounding
from reward_models.grounding import TimestampGrounding, raw_score
from reward_models.length_band import LengthBand
from reward_models.prior import BlindPrior
from reward_models.repetition import Repetition
from reward_models.spans import merge, span_iou
from reward_models.timestamps import parse_spans

CLIP_S = 60.0
TASKS = (Task.GROUNDING, Task.DENSE, Task.POINTS, Task.ABSENT, Task.COUNT, Task.ORDER)


def span(low: float = 0.0, high: float = CLIP_S) -> st.SearchStrategy[tuple[float, float]]:
    """Spans of 0.5 s and more on a grid of 0.1 s."""
    ticks = st.integers(int(10 * low), int(10 * high) - 5)
    return ticks.flatmap(
        lambda a: st.integers(a + 5, int(10 * high)).map(lambda b: (a / 10, b / 10))
    )


spans = st.lists(span(), min_size=1, max_size=5, unique=True)
priors = st.builds(
    BlindPrior,
    grounding=st.none() | st.floats(0, 0.8),
    absent_share=st.floats(0, 0.9),
    count=st.floats(0, 0.9),
)


def row(targets: list[tuple[float, float]], task: Task = Task.GROUNDING) -> Row:
    events = tuple(Event(s, e, "bell") for s, e in sorted(targets))
    prompt = ({"role": "user", "content": "When is a bell heard?"},)
    return Row("r", prompt, "a.wav", CLIP_S, task, events, "bell", answer="bell")


def says(answer: list[tuple[float, float]], named: bool = True) -> Completion:
    name = "bell " if named else ""
    text = ", ".join(f"{name}<t>{s:.1f}-{e:.1f}</t>" for s, e in answer)
    return Completion((), (), text, "stop", 0)


def value(result: RewardResult) -> float:
    assert result.value is not None
    return result.value


@given(spans, spans, priors, st.sampled_from(TASKS))
def test_range(targets: list, answer: list, prior: BlindPrior, task: Task) -> None:
    result = TimestampGrounding(prior=prior)(row(targets, task), says(answer))
    assert -1.0 <= value(result) <= 1.0 + 1e-9


@given(st.text(max_size=300), spans)
@settings(max_examples=200)
def test_range_of_every_rule_on_any_text(text: str, targets: list) -> None:
    completion = Completion((), (), text, "stop", 0)
    for task in TASKS:
        assert -1.0 <= value(TimestampGrounding()(row(targets, task), completion)) <= 1.0 + 1e-9
    assert 0.0 <= value(ChainGrounding()(row(targets), completion)) <= 1.0
    assert 0.0 <= value(LengthBand()(row(targets), completion)) <= 1.0
    assert -1.0 <= value(Repetition()(row(targets), completion)) <= 0.0


@given(spans, spans, st.randoms(use_true_random=False), st.sampled_from(TASKS[:3]))
def test_the_order_of_spans_does_not_matter(
    targets: list, answer: list, rng: object, task: Task
) -> None:
    shuffled = list(answer)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    reward = TimestampGrounding()
    once = value(reward(row(targets, task), says(answer)))
    assert abs(value(reward(row(targets, task), says(shuffled))) - once) < 1e-9


@given(spans, spans, span())
def test_a_wrong_span_never_raises_the_reward(targets: list, answer: list, wrong: tuple) -> None:
    if any(span_iou(wrong, t) > 0 for t in targets) or wrong in answer:
        return
    reward = TimestampGrounding()
    before = value(reward(row(targets), says(answer)))
    assert value(reward(row(targets), says([*answer, wrong]))) <= before + 1e-9


@given(spans, spans, st.integers(2, 6), st.sampled_from(TASKS[:3]))
def test_repetition_never_raises_the_reward(
    targets: list, answer: list, times: int, task: Task
) -> None:
    reward = TimestampGrounding()
    once = value(reward(row(targets, task), says(answer)))
    assert value(reward(row(targets, task), says(answer * times))) <= once + 1e-9
    chain = ChainGrounding()

    def thought(count: int) -> float:
        text = f"<think>{says(answer * count).text}</think> {says(targets).text}"
        return value(chain(row(targets), Completion((), (), text, "stop", 0)))

    assert thought(times) <= thought(1) + 1e-9


@given(span(10, 50), st.lists(st.integers(0, 30), min_size=2, max_size=6, unique=True))
def test_monotone_in_overlap(target: tuple, shifts: list) -> None:
    """The same span, moved away step by step, earns less with every step, until it earns 0."""
    earned = []
    for shift in sorted(shifts):
        moved = (target[0] + shift / 10, target[1] + shift / 10)
        earned.append((span_iou(moved, target), raw_score([moved], [target], num_stated=1)))
    for (overlap, score), (next_overlap, next_score) in itertools.pairwise(earned):
        assert next_score <= score + 1e-12
        if next_overlap < overlap:
            assert next_score < score


@given(spans, st.floats(0.5, 3.0))
def test_invalid_spans_are_worth_no_more_than_nothing(targets: list, beyond: float) -> None:
    reward = TimestampGrounding()
    nothing = value(reward(row(targets), Completion((), (), "hm", "stop", 0)))
    for text in (
        f"<t>{CLIP_S - 1}-{CLIP_S + beyond:.1f}</t>",
        f"<t>{targets[0][1]}-{targets[0][0]}</t>",
    ):
        assert value(reward(row(targets), Completion((), (), text, "stop", 0))) <= nothing + 1e-9


@given(spans, spans)
def test_expected_iou_of_certain_frames_is_the_iou_of_merged_spans(
    targets: list, answer: list
) -> None:
    frames = [0.0] * int(10 * CLIP_S)
    for start, end in targets:
        frames[round(10 * start) : round(10 * end)] = [1.0] * round(10 * (end - start))
    from reward_models.spans import iou

    stated = merge(answer)
    assert abs(expected_iou(frames, 0.1, stated) - iou(answer, targets)) < 1e-6


@given(spans)
def test_what_is_written_is_read_back(answer: list) -> None:
    assert list(parse_spans(says(answer).text, CLIP_S).valid_spans) == answer


@given(spans, priors)
def test_the_right_answer_is_worth_one(targets: list, prior: BlindPrior) -> None:
    reward = dataclasses.replace(TimestampGrounding(), prior=prior)
    for task in (Task.GROUNDING, Task.DENSE):
        assert abs(value(reward(row(targets, task), says(targets))) - 1.0) < 1e-9

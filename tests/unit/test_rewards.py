from __future__ import annotations

import dataclasses

import pytest

from posttrain.data.rows import Event, Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.choice import Choice, extract_choice
from reward_models.format import Format
from reward_models.grounding import TimestampGrounding
from reward_models.names import REWARD_NAMES
from reward_models.registry import (
    REWARDS,
    Term,
    WeightedSum,
    build_rewards,
    check_scorable,
)
from reward_models.spans import event_f1, iou, match
from reward_models.timestamps import ParseStatus, parse_spans


def says(text: str, finish_reason: str = "stop") -> Completion:
    return Completion((1,), (0.0,), text, finish_reason, 0)


def row(task: Task = Task.GROUNDING, spans: tuple = ((2.0, 4.0),), **more: object) -> Row:
    events = tuple(Event(s, e, "x") for s, e in spans)
    return Row("r", ({"role": "user", "content": "q"},), "a.wav", 10.0, task, events, "x", **more)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<t>308.71-309.97</t> A voice speaks.", ((308.71, 309.97),)),
        ("a splash (<t>36-42</t>), a hiss (<t>42-46</t>).", ((36.0, 42.0), (42.0, 46.0))),
        ("[13.48s – 15.48s] speech", ((13.48, 15.48),)),
        ("(00:01:05 - 00:01:10)", ((65.0, 70.0),)),
        ("At 1:05, the second speaker interrupts.", ((65.0, 65.0),)),
        ("between 0:07 and 0:09 a siren", ((7.0, 9.0),)),
        ("occurs from 0.947 to 2.561 seconds", ((0.947, 2.561),)),
        ("00:01:05,250 --> 00:01:07,000", ((65.25, 67.0),)),
        ("nothing here", ()),
        ("the ratio is 16:9", ()),
        ("it lasts 5 seconds", ()),
    ],
)
def test_parser(text: str, spans: tuple) -> None:
    assert parse_spans(text).valid_spans == spans


def test_parser_statuses_and_validity() -> None:
    assert parse_spans("x is not heard").status is ParseStatus.NONE_STATED
    assert parse_spans("<t>soon</t>").status is ParseStatus.UNPARSEABLE
    assert parse_spans("hello").status is ParseStatus.EMPTY
    reversed_span = parse_spans("<t>5-3</t>").spans[0]
    assert not reversed_span.valid and reversed_span.issue == "reversed"
    late = parse_spans("<t>3-12</t>", 10.0).spans[0]
    assert not late.valid and "10" in late.issue
    assert parse_spans("1.5 - 2.5", form="grounding").valid_spans == ((1.5, 2.5),)
    assert parse_spans("1.5 - 2.5").valid_spans == ()


def test_iou_matching_and_event_f1_by_hand() -> None:
    assert iou([(0, 2)], [(1, 3)]) == pytest.approx(1 / 3)
    assert iou([(0, 1), (0.5, 2)], [(0, 2)]) == 1.0
    assert iou([(1, 1)], [(1, 1)]) == 0.0
    assert match([(0, 2), (5, 6)], [(5, 6), (1, 3)]) == [(0, 1, pytest.approx(1 / 3)), (1, 0, 1.0)]
    assert event_f1([(1.0, 2.0)], [(1.15, 2.4)]) == 1.0
    assert event_f1([(1.0, 2.0)], [(1.3, 2.0)]) == 0.0
    assert event_f1([(1.0, 2.0), (5.0, 6.0)], [(1.0, 2.0)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>x</think> <t>2-4</t>", 1.0),
        ("<t>3-5</t>", 1 / 3),
        ("<t>2-4</t> <t>2-4</t> <t>2-4</t>", 2 * 1 / 4),
        ("<t>2-4</t> <t>5-6</t>", 2 / 3),
        ("<t>4-2</t>", 0.0),
        ("<t>2-40</t>", 0.0),
        ("no idea", 0.0),
        ("<think><t>2-4</t></think> somewhere", 0.0),
    ],
)
def test_grounding_by_hand(text: str, value: float) -> None:
    assert TimestampGrounding()(row(), says(text)).value == pytest.approx(value)


def test_grounding_of_two_spans_and_absent_events() -> None:
    two = row(spans=((2.0, 4.0), (6.0, 7.0)))
    assert TimestampGrounding()(two, says("<t>2-4</t>")).value == pytest.approx(2 / 3)
    absent = row(Task.ABSENT, ())
    assert TimestampGrounding()(absent, says("x is not heard")).value == 1.0
    assert TimestampGrounding()(absent, says("<t>1-2</t>")).value == 0.0
    assert TimestampGrounding()(absent, says("hm")).value == 0.0
    assert TimestampGrounding()(row(Task.COUNT), says("2")).status is RewardStatus.UNSCORABLE


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B) a dog.", "B"),
        ("<think>(A) or (B)?</think> (C)", "C"),
        ("Answer: A", "A"),
        ("B.", "B"),
        ("It is the dog barking.", "B"),
        ("cat or dog barking", None),
        ("It was recorded in the USA", None),
        ("Answer: B, because it barks", "B"),
        ("answer is C", "C"),
        ("A dog", None),
    ],
)
def test_choice_extraction(text: str, letter: str | None) -> None:
    assert extract_choice(text, ["cat", "dog barking", "rain"]) == letter


def test_choice_reward() -> None:
    question = row(Task.CHOICE, choices=("cat", "dog"), answer="dog")
    assert Choice()(question, says("(B)")).value == 1.0
    assert Choice()(question, says("(A)")).value == 0.0
    wrong_row = dataclasses.replace(question, answer="cow")
    assert Choice()(wrong_row, says("(A)")).status is RewardStatus.UNSCORABLE


def test_format_and_thinking() -> None:
    assert Format()(row(), says("<think>a</think> b")).value == 1.0
    assert Format()(row(), says("a</think> b")).value == 1.0
    assert Format()(row(), says("<think>a</think>")).value == 0.0
    assert Format()(row(), says("b")).value == 0.0
    assert split_thinking("<think>a</think> b </think> c") == ("a</think> b", "c")


class Broken:
    name = "broken"

    def __init__(self, value: float | None) -> None:
        self.value = value

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if self.value is None:
            raise KeyError("oops")
        return RewardResult(self.value)


def test_weighted_sum_gates_truncation_and_failures() -> None:
    total = build_rewards({"timestamp_grounding": (1.0, False), "format": (0.1, False)})
    assert total(row(), says("<think>a</think> <t>2-4</t>")).value == pytest.approx(1.1)
    assert total(row(), says("<t>2-4</t>", "length")).status is RewardStatus.TRUNCATED
    gated = build_rewards({"timestamp_grounding": (1.0, True), "format": (0.1, False)})
    assert gated(row(), says("<think>a</think> hm")).value == 0.0
    for value in (None, float("nan")):
        result = WeightedSum((Term(Broken(value)),))(row(), says("x"))
        assert result.status is RewardStatus.ERRORED and result.value is None
        assert "broken on row 'r'" in result.reason
    unscorable = build_rewards({"choice": (1.0, False)})(row(), says("x"))
    assert unscorable.status is RewardStatus.UNSCORABLE
    with pytest.raises(ValueError, match="unknown reward"):
        build_rewards({"nope": (1.0, False)})
    with pytest.raises(ValueError, match="status"):
        RewardResult(None)


def test_rows_that_only_their_form_would_score_are_refused() -> None:
    reward = build_rewards({"timestamp_grounding": (1.0, False), "format": (0.2, False)})
    check_scorable(reward, [row()])
    with pytest.raises(ValueError, match=r"of task 'count': no reward but `format` scores it"):
        check_scorable(reward, [row(), row(Task.COUNT)])
    with pytest.raises(ValueError, match="answer 'C' is none of the choices"):
        check_scorable(
            build_rewards({"choice": (1.0, False)}),
            [row(Task.CHOICE, answer="C", choices=("yes", "no"))],
        )


def test_recipe_names_are_the_registry() -> None:
    assert tuple(REWARDS) == REWARD_NAMES

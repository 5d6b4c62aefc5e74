"""Rewards against hand-worked numbers; sums, gates and statuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from posttrain.data.rows import Event, Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.chain import ChainGrounding
from reward_models.choice import Choice, extract_choice
from reward_models.claims import claims_of, label_named
from reward_models.format import Format
from reward_models.grounding import (
    TimestampGrounding,
    count_stated,
    kendall_tau,
    labels_in_order,
    score_points,
)
from reward_models.length_band import LengthBand
from reward_models.names import FORM_ONLY, REWARD_NAMES
from reward_models.prior import BlindPrior, adjusted, uniform_placement_prior
from reward_models.registry import (
    REWARDS,
    RewardSpec,
    Term,
    WeightedSum,
    build_rewards,
    check_scorable,
    with_prior,
)
from reward_models.repetition import Repetition
from reward_models.spans import event_f1, iou, match
from reward_models.timestamps import parse_spans
from reward_models.transcript import Transcript
from reward_models.translation import Translation

NO_PRIOR = BlindPrior(grounding=0.0, points=0.0, count=0.0)
PLAIN = TimestampGrounding(prior=NO_PRIOR)
BETA2 = 2.37**2


def says(text: str, finish_reason: str = "stop") -> Completion:
    return Completion((1,), (0.0,), text, finish_reason, 0)


def row(task: Task = Task.GROUNDING, spans: tuple = ((2.0, 4.0),), **more: object) -> Row:
    events = tuple(Event(s, e, "x") for s, e in spans)
    arguments = {"events": events, "query": "x"} | more
    return Row("r", ({"role": "user", "content": "q"},), "a.wav", 10.0, task, **arguments)


def test_iou_matching_and_event_f1_by_hand() -> None:
    assert iou([(0, 2)], [(1, 3)]) == pytest.approx(1 / 3)
    assert iou([(0, 1), (0.5, 2)], [(0, 2)]) == 1.0
    assert iou([(1, 1)], [(1, 1)]) == 0.0
    assert match([(0, 2), (5, 6)], [(5, 6), (1, 3)]) == [(0, 1, pytest.approx(1 / 3)), (1, 0, 1.0)]
    assert event_f1([(1.0, 2.0)], [(1.15, 2.4)]) == 1.0
    assert event_f1([(1.0, 2.0)], [(1.3, 2.0)]) == 0.0
    assert event_f1([(1.0, 2.0), (5.0, 6.0)], [(1.0, 2.0)]) == pytest.approx(2 / 3)


# ends of the event 2-4 s may be off by 1 s (half its length) until the boundary term is 0
@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("<think>x</think> <t>2-4</t>", 1.0),
        ("<t>3-5</t>", (1 / 3) * 0.8),  # IoU 1/3, both ends off by 1 s: boundary 0
        ("<t>2.5-4</t>", 0.75 * (0.8 + 0.2 * (0.5 + 1.0) / 2)),
        ("<t>2-4</t> <t>2-4</t> <t>2-4</t>", 1.0),
        ("<t>2-4</t> <t>5-6</t>", (1 + BETA2) / (BETA2 + 2) * math.exp(-1)),
        ("<t>2-4</t> <t>9-8</t>", (1 + BETA2) / (BETA2 + 2) * math.exp(-1)),
        ("<t>4-2</t>", 0.0),
        ("<t>2-40</t>", 0.0),
        ("no idea", 0.0),
        ("<think><t>2-4</t></think> somewhere", 0.0),
        ("from 2 to 4 seconds", 1.0),
    ],
)
def test_one_span_by_hand(text: str, raw: float) -> None:
    result = PLAIN(row(), says(text))
    assert result.value == pytest.approx(raw)
    assert result.breakdown["raw"] == pytest.approx(raw)


def test_several_spans_by_hand() -> None:
    two = row(spans=((2.0, 4.0), (6.0, 7.0)))
    assert PLAIN(two, says("<t>6-7</t> and <t>2-4</t>")).value == pytest.approx(1.0)
    one_of_two = (1 + BETA2) / (2 * BETA2 + 1)
    assert PLAIN(two, says("<t>2-4</t>")).value == pytest.approx(one_of_two)
    assert one_of_two < 0.8
    wrong_beside = (1 + BETA2) / (2 * BETA2 + 2)
    assert PLAIN(two, says("<t>2-4</t> <t>9-10</t>")).value == pytest.approx(wrong_beside)


def test_the_blind_prior_is_subtracted_and_signed() -> None:
    reward = TimestampGrounding(prior=BlindPrior(grounding=0.4))
    assert reward(row(), says("<t>2-4</t>")).value == pytest.approx(1.0)
    assert reward(row(), says("<t>7-9</t>")).value == pytest.approx(-0.4 / 0.6)
    assert adjusted(0.4, 0.4) == 0.0
    assert adjusted(0.0, 0.9) == -1.0


def test_default_prior_is_the_best_constant_span_for_uniform_placement() -> None:
    # a span of the whole clip is always hit; a tiny one never
    assert uniform_placement_prior(1.0) == pytest.approx(0.995)
    assert uniform_placement_prior(0.01) < 0.03
    # length T/2 anywhere: by hand the guess [T/4, 3T/4] averages the mean over a shift d <= T/4 of
    # (T/2 - d) / (T/2 + d) = 2 ln(1.5) * 2 - 1
    assert uniform_placement_prior(0.5) == pytest.approx(4 * math.log(1.5) - 1, abs=0.01)


def test_packed_answers_are_refused_unless_accepted() -> None:
    clip = dataclasses.replace(
        row(spans=((6.6, 23.1), (63.4, 64.4), (64.4, 144.4))), duration_s=151.0
    )
    answer = says("<t>0.066-0.231</t> <t>1.034-1.044</t> <t>1.044-2.244</t>")
    refused = PLAIN(clip, answer)
    assert refused.value == 0.0 and refused.breakdown["packed"] == 1.0
    accepted = dataclasses.replace(PLAIN, packed="accept")(clip, answer)
    assert accepted.value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="packed='maybe'"):
        TimestampGrounding(packed="maybe")


def test_spans_copied_from_the_question_do_not_count() -> None:
    asked = dataclasses.replace(
        row(), prompt=({"role": "user", "content": "After 0:06 - 0:08, when is x heard?"},)
    )
    copied = PLAIN(asked, says("<t>6-8</t>"))
    assert copied.value == 0.0 and copied.breakdown["num_copied"] == 1.0
    assert PLAIN(asked, says("after <t>6-8</t>: <t>2-4</t>")).value == pytest.approx(1.0)


def test_absent_events() -> None:
    absent = row(Task.ABSENT, ())
    reward = TimestampGrounding(prior=BlindPrior(grounding=0.0, absent_share=0.2))
    assert reward(absent, says("x is not heard")).value == 1.0
    assert reward(absent, says("<t>1-2</t>")).value == pytest.approx(-0.25)
    assert reward(absent, says("hm")).value == pytest.approx(-0.25)
    # always "none" earns 0 on average: 0.2 * 1 + 0.8 * (-0.25)
    assert reward(row(), says("x is not heard")).value == pytest.approx(-0.25)


def test_points_by_distance() -> None:
    points = row(Task.POINTS, ((2.0, 2.0), (6.0, 6.0)))
    assert PLAIN(points, says("at 2 s and at 6 s")).value == pytest.approx(1.0)
    assert PLAIN(points, says("at 2.5 s and at 6 s")).value == pytest.approx(1.5 / 2)
    assert PLAIN(points, says("at 2 s")).value == pytest.approx((1 + BETA2) / (2 * BETA2 + 1))
    assert score_points([(0.0, 10.0)], [(2.0, 2.0)], 1, 1.0)[0] == 0.0


def test_dense_timelines_need_the_right_names() -> None:
    events = (Event(1, 2, "dog"), Event(4, 6, "a door closes"))
    dense = row(Task.DENSE, events=events, query=None)
    right = "dog <t>1-2</t>, then a door closes <t>4-6</t>"
    assert PLAIN(dense, says(right)).value == pytest.approx(1.0)
    assert PLAIN(dense, says("<t>1-2</t> dog. <t>4-6</t> a door closes.")).value == pytest.approx(1)
    swapped = "a door closes <t>1-2</t>, then a dog <t>4-6</t>"
    assert PLAIN(dense, says(swapped)).value == 0.0
    everything = "dog and a door closes: <t>1-2</t>, <t>4-6</t>"  # all names beside every span
    assert PLAIN(dense, says(everything)).value < 0.8
    one = (1 + BETA2) / (2 * BETA2 + 2)
    assert PLAIN(dense, says("dog <t>1-2</t>, then a cat <t>4-6</t>")).value == pytest.approx(one)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("seven is heard 2 times", 2), ("Twice.", 2), ("once", 1), ("3", 3), ("three times", 3),
        ("It is heard 2 times: <t>1-2</t> and <t>5-6</t>", 2), ("not heard", 0), ("2 or 3", None),
        ("often", None), ("seven 4 times", 4), ("2 or 3 times", None), ("2-3 times", None),
        ("once or twice", None), ("once every 2 seconds, 5 times in total", 5), ("not once", 0),
        ("a single time", 1), ("It happens 2 times, 2 times in all", 2),
    ],
)  # fmt: skip
def test_counts(text: str, count: int | None) -> None:
    assert count_stated(text, "seven", parse_spans(text).spans) == count


def test_count_and_order_rewards() -> None:
    twice = row(Task.COUNT, ((1, 2), (3, 4)))
    reward = TimestampGrounding(prior=BlindPrior(count=0.5))
    assert reward(twice, says("x 2 times")).value == 1.0
    assert reward(twice, says("x 3 times")).value == -1.0
    events = (Event(1, 2, "dog"), Event(3, 4, "hot dog"), Event(5, 6, "bell"))
    first = dataclasses.replace(
        row(Task.ORDER, events=events, query=None, answer="dog"),
        prompt=({"role": "user", "content": "What is first, dog or bell?"},),
    )
    assert PLAIN(first, says("The dog.")).value == 1.0
    assert PLAIN(first, says("The bell.")).value == -1.0
    assert PLAIN(first, says("dog, bell")).value == -1.0
    assert PLAIN(first, says("The dog is heard before the bell.")).value == 1.0
    order = dataclasses.replace(first, answer="dog, hot dog, bell")
    assert PLAIN(order, says("a dog, a hot dog, a bell")).value == 1.0
    assert PLAIN(order, says("a bell, a hot dog, a dog")).value == -1.0
    assert PLAIN(order, says("a dog, a bell")).value == pytest.approx(-1 / 3)
    assert labels_in_order("a hot dog, then a dog", ["dog", "hot dog"]) == ["hot dog", "dog"]
    assert kendall_tau(["b", "a", "c"], ["a", "b", "c"]) == pytest.approx(1 / 3)


def test_counts_of_zero_enter_the_prior() -> None:
    rows = [row(Task.COUNT, (), events=(Event(1, 2, "y"),))] * 6
    rows += [row(Task.COUNT, ((1.0, 2.0),))] * 4
    assert TimestampGrounding().fit(rows).count == pytest.approx(0.6)


def test_fitted_prior_makes_the_best_constant_answer_worth_nothing(tmp_path: Path) -> None:
    rows = [row(spans=((s, s + 4.0),)) for s in (2.0, 3.0, 4.0, 5.0)] * 3
    total, prior = with_prior(build_rewards({"timestamp_grounding": RewardSpec()}), rows)
    assert prior is not None and prior.grounding is not None
    best = [(10 * s, 10 * e) for s, e in prior.guess["spans"]]  # type: ignore[index]
    assert prior.guess["unit"] == "share" and len(best) == 1
    answer = says(f"<t>{best[0][0]}-{best[0][1]}</t>")
    assert sum(total(r, answer).value or 0 for r in rows) == pytest.approx(0, abs=1e-9)
    for other in ("<t>0-10</t>", "<t>2-6</t>", "<t>5-9</t>"):
        assert sum(total(r, says(other)).value or 0 for r in rows) < 0.01
    prior.save(tmp_path / "prior.json")
    assert BlindPrior.load(tmp_path / "prior.json").grounding == prior.grounding
    (tmp_path / "prior.json").write_text(json.dumps({"grounding": 1.5}))
    with pytest.raises(ValueError, match=r"grounding is 1\.5"):
        BlindPrior.load(tmp_path / "prior.json")


EVENTS = (Event(1, 2, "dog"), Event(4, 6, "door"))


@pytest.mark.parametrize(
    ("thought", "value", "checked"),
    [
        ("dog <t>1-2</t> door <t>4-6</t>", 1.0, 2),
        ("dog <t>4-6</t> door <t>4-6</t>", 0.5, 2),
        ("A dog at 0:01, a door from 4 to 6 s.", 1.0, 2),
        ("dog <t>1-2</t> dog <t>1-2</t> door <t>7-8</t>", 0.5, 2),
        ("something <t>1-2</t> <t>3-4</t>", 0.0, 0),
        ("no times at all", 0.0, 0),
    ],
)
def test_chain_checks_each_cited_step(thought: str, value: float, checked: int) -> None:
    question = row(events=EVENTS, query="door")
    result = ChainGrounding()(question, says(f"<think>{thought}</think> <t>4-6</t>"))
    assert result.value == pytest.approx(value)
    assert result.breakdown["num_checked"] == checked
    wrong = ChainGrounding()(question, says(f"<think>{thought}</think> <t>8-9</t>"))
    assert wrong.value == 0.0


def test_chain_of_a_choice_question_is_gated_by_the_choice() -> None:
    question = row(Task.CHOICE, events=EVENTS, choices=("cat", "dog"), answer="dog")
    thought = "<think>a dog <t>1-2</t></think>"
    assert ChainGrounding()(question, says(f"{thought} (B)")).value == 1.0
    assert ChainGrounding()(question, says(f"{thought} (A)")).value == 0.0


def test_claims_take_the_clause_beside_the_span() -> None:
    text = "It rains. A dog barks at <t>1-2</t>, and <t>3-4</t>; the bell (<t>5-6</t>)."
    claims = claims_of(text, parse_spans(text).spans)
    assert [label_named(c, ["dog", "bell", "rain"]) for c in claims] == ["dog", "dog", "bell"]
    after = "<t>1-2</t> A dog barks. <t>5-6</t> Bells."
    named = [label_named(c, ["dog", "bell"]) for c in claims_of(after, parse_spans(after).spans)]
    assert named == ["dog", "bell"]
    fuzzy = claims_of("hound <t>1-2</t>", parse_spans("hound <t>1-2</t>").spans)[0]
    assert label_named(fuzzy, ["dog"]) is None
    assert label_named(fuzzy, ["dog"], lambda a, b: 0.9) == "dog"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B) a dog.", "B"), ("<think>(A) or (B)?</think> (C)", "C"),
        ("Answer: A", "A"), ("B.", "B"), ("It is the dog barking.", "B"),
        ("cat or dog barking", None), ("It was recorded in the USA", None),
        ("Answer: B, because it barks", "B"), ("answer is C", "C"), ("A dog", None),
        (r"Thus \boxed{B}", "B"), (r"\boxed{\text{dog barking}}", "B"), ("<answer>C</answer>", "C"),
        ("**B**", "B"), ("b)", "B"), ("B: dog barking", "B"), ("The answer is: **C**", "C"),
        ("(b)", "B"), ("[C] rain", "C"), ("(A) is wrong, so (B)", "B"), ("", None),
    ],
)  # fmt: skip
def test_choice_extraction(text: str, letter: str | None) -> None:
    assert extract_choice(text, ["cat", "dog barking", "rain"]) == letter


def test_choice_reward_and_options_inside_options() -> None:
    question = row(Task.CHOICE, choices=("cat", "dog"), answer="dog")
    assert Choice()(question, says("(B)")).value == 1.0
    assert Choice()(question, says("(A)")).value == 0.0
    wrong_row = dataclasses.replace(question, answer="cow")
    assert Choice()(wrong_row, says("(A)")).status is RewardStatus.UNSCORABLE
    assert extract_choice("a hot dog", ["dog", "hot dog"]) == "B"


@pytest.mark.parametrize(
    ("reference", "hypothesis", "language", "value"),
    [
        ("Hello, world!", "hello world", "en", 1.0),
        ("hello world", "hello", "en", 0.5),
        ("hello", "a b c d", "en", -1.0),
        ("hello world", "", "en", 0.0),
        ("你好世界", "你好", "zh-CN", 0.5),
        ("Ещё раз", "еще раз", "ru", 1.0),
        ("أَهْلاً", "اهلا", "ar", 1.0),
        ("it's", "It’s", "en", 1.0),
        ("one two", "<t>0-1</t> one two", "en", 1.0),
    ],
)
def test_transcript_by_hand(reference: str, hypothesis: str, language: str, value: float) -> None:
    spoken = row(Task.TRANSCRIPT, (), answer=reference, language=language)
    assert Transcript()(spoken, says(hypothesis)).value == pytest.approx(value)


def test_empty_references_are_unscorable() -> None:
    for kind, reward in ((Task.TRANSCRIPT, Transcript()), (Task.TRANSLATION, Translation())):
        empty = row(kind, (), answer=" ")
        assert reward(empty, says("")).status is RewardStatus.UNSCORABLE
    bracketed = row(Task.TRANSCRIPT, (), answer="[tone] ...")
    assert Transcript()(bracketed, says("x")).status is RewardStatus.UNSCORABLE


def test_translation_is_chrf() -> None:
    spoken = row(Task.TRANSLATION, (), answer="the cat sat")
    assert Translation()(spoken, says("the cat sat")).value == pytest.approx(1.0)
    assert Translation()(spoken, says("zzz")).value == 0.0
    partly = Translation()(spoken, says("the cat")).value
    assert partly is not None and 0.4 < partly < 0.8


def test_length_band_by_hand() -> None:
    band = LengthBand(low=10, high=20)
    values = {n: band(row(), says("<think>" + "w " * n + "</think> a")).value for n in range(45)}
    assert values[0] == values[5] == 0.0
    assert values[7] == pytest.approx(0.4)
    assert values[10] == values[20] == 1.0
    assert values[30] == pytest.approx(0.5)
    assert values[40] == values[44] == 0.0
    with pytest.raises(ValueError, match="low=5, high=2"):
        LengthBand(low=5, high=2)


def test_repetition_by_hand() -> None:
    # 8 words, 5 four-grams, 4 of them different: abcd bcda cdab dabc abcd
    assert Repetition()(row(), says("a b c d a b c d")).value == pytest.approx(-0.2)
    assert Repetition()(row(), says("a b c d e f")).value == 0.0
    assert Repetition()(row(), says("a b")).value == 0.0


def test_format_and_thinking() -> None:
    assert Format()(row(), says("<think>a</think> b")).value == 1.0
    assert Format()(row(), says("a</think> b")).value == 1.0
    assert Format()(row(), says("<think>a</think>")).value == 0.0
    assert Format()(row(), says("b")).value == 0.0
    assert split_thinking("<think>a</think> b </think> c") == ("a</think> b", "c")


@dataclasses.dataclass
class Fixed:
    """A reward of one value; None raises."""

    value: float | None
    name: str = "fixed"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if self.value is None:
            raise KeyError("oops")
        return RewardResult(self.value)


def test_weighted_sum_truncation_and_failures() -> None:
    total = build_rewards({"timestamp_grounding": RewardSpec(), "format": RewardSpec(weight=0.1)})
    assert total(row(), says("<think>a</think> <t>2-4</t>")).value == pytest.approx(1.1)
    assert total(row(), says("<t>2-4</t>", "length")).status is RewardStatus.TRUNCATED
    zero = dataclasses.replace(total, truncated="0")
    assert zero(row(), says("<t>2-4</t>", "length")).value == 0.0
    assert zero(
        row(), says("<t>7-9</t>", "length")
    ).value == pytest.approx(  # no better than ending
        total(row(), says("<t>7-9</t>")).value
    )
    scored = dataclasses.replace(total, truncated="score")
    assert scored(row(), says("<t>2-4</t>", "length")).value == pytest.approx(1.0)
    for value in (None, float("nan")):
        result = WeightedSum((Term(Fixed(value)),))(row(), says("x"))
        assert result.status is RewardStatus.ERRORED and result.value is None
        assert "fixed on row 'r'" in result.reason
    unscorable = build_rewards({"choice": RewardSpec()})(row(), says("x"))
    assert unscorable.status is RewardStatus.UNSCORABLE
    with pytest.raises(ValueError, match="unknown reward"):
        build_rewards({"nope": RewardSpec()})
    with pytest.raises(ValueError, match="status"):
        RewardResult(None)


def test_gates_open_only_above_zero() -> None:
    def total(gate_value: float) -> RewardResult:
        terms = (Term(Fixed(0.5, "form"), 1.0, gate="truth"), Term(Fixed(gate_value, "truth"), 2.0))
        return WeightedSum(terms)(row(), says("x"))

    assert total(0.25).value == pytest.approx(0.5 + 0.5)
    assert total(0.0).value == 0.0
    assert total(-1.0).value == pytest.approx(-2.0)
    assert total(-1.0).breakdown["form"] == 0.0
    for gate in ("nope", "format"):
        with pytest.raises(ValueError, match=rf"rewards\.format\.gate={gate}"):
            build_rewards({"format": RewardSpec(gate=gate), "choice": RewardSpec()})


def test_options_reach_the_reward_and_unknown_ones_are_named() -> None:
    built = build_rewards({"timestamp_grounding": RewardSpec(options={"packed": "accept"})})
    assert built.terms[0].reward.packed == "accept"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"options\.pakced: unknown option; known: \['packed'"):
        build_rewards({"timestamp_grounding": RewardSpec(options={"pakced": "accept"})})
    with pytest.raises(ValueError, match="needs a model"):
        build_rewards({"audio_text_grounding": RewardSpec()})


def shout(row: Row, completion: Completion, bonus: float = 0.0) -> float | None:
    return None if not completion.text else float(completion.text.isupper()) + bonus


def test_a_reward_of_your_own() -> None:
    path = f"{__name__}:shout"
    built = build_rewards({"loud": RewardSpec(path=path, options={"bonus": 0.5})})
    assert built(row(), says("YES")).value == 1.5
    assert built(row(), says("")).status is RewardStatus.UNSCORABLE
    for wrong in ("json", "json:nope", "no_such_module:f"):
        with pytest.raises(ValueError, match=rf"rewards\.loud\.path={wrong}"):
            build_rewards({"loud": RewardSpec(path=wrong)})


def test_rows_that_only_their_form_would_score_are_refused() -> None:
    reward = build_rewards({"choice": RewardSpec(), "format": RewardSpec(weight=0.2)})
    question = row(Task.CHOICE, answer="A", choices=("yes", "no"))
    check_scorable(reward, [question])
    with pytest.raises(ValueError, match=r"of task 'grounding': no reward but `format` or"):
        check_scorable(reward, [question, row()])
    with pytest.raises(ValueError, match="answer 'C' is none of the choices"):
        check_scorable(reward, [dataclasses.replace(question, answer="C")])


def test_recipe_names_are_the_registry() -> None:
    assert tuple(REWARDS) == REWARD_NAMES
    assert set(FORM_ONLY) < set(REWARD_NAMES)

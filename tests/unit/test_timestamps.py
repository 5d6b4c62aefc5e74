"""The parser against two sets of cases, hostile text, and packed minutes."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from reward_models.timestamps import ParseStatus, parse_spans, repair_packed

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "timestamp_cases.json").read_text())
OWN = json.loads((DATA / "timestamp_cases_own.json").read_text())


@pytest.mark.parametrize(
    "case", [*CASES["positive"], *CASES["negative"], *CASES["contextual"], *OWN],
    ids=lambda case: case["text"][:40],
)  # fmt: skip
def test_spans(case: dict[str, Any]) -> None:
    parsed = parse_spans(case["text"], case.get("duration_s"), form=case.get("form"))
    assert [tuple(s) for s in parsed.valid_spans] == [
        pytest.approx(tuple(span), abs=0.01) for span in case["spans"]
    ]
    assert all(s.valid for s in parsed.spans)
    if "dialect" in case:
        assert {s.dialect for s in parsed.spans} == {case["dialect"]}


@pytest.mark.parametrize(
    ("text", "issues"),
    [
        ("[00:15 - 00:12]", ["reversed"]),
        ("[00:50 - 01:20]", ["beyond the clip's end at 60 s"]),
        ("1:75", ["seconds field of 60 or more"]),
        ("[00:00 - 01:00]", [""]),
        ("<t>5-3</t>", ["reversed"]),
        ("<t>3-61</t>", ["beyond the clip's end at 60 s"]),
        ("<t>-3-5</t>", ["negative"]),
        ("-3 to 5 s", ["negative"]),
    ],
)
def test_malformed_times_are_kept_and_flagged(text: str, issues: list[str]) -> None:
    parsed = parse_spans(text, 60.0)
    assert [s.issue for s in parsed.spans] == issues
    assert [s.valid for s in parsed.spans] == [not issue for issue in issues]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<t>foo-bar</t>", ParseStatus.UNPARSEABLE),
        ("<t>1.0-2.0", ParseStatus.UNPARSEABLE),
        ("nan to inf seconds", ParseStatus.UNPARSEABLE),
        ("5 seconds before the end", ParseStatus.UNPARSEABLE),
        ("The siren is not heard.", ParseStatus.NONE_STATED),
        ("Das Signal kommt nicht vor.", ParseStatus.NONE_STATED),
        ("没有这个声音", ParseStatus.NONE_STATED),
        ("لا يوجد", ParseStatus.NONE_STATED),
        ("Nonetheless a dog barks", ParseStatus.EMPTY),
        ("It isn't clear.", ParseStatus.EMPTY),
        ("The siren never stops.", ParseStatus.EMPTY),
        ("There is no pause in it.", ParseStatus.EMPTY),
        ("It sounds from start to end and no other sound is present", ParseStatus.EMPTY),
        ("No idea.", ParseStatus.EMPTY),
        ("No siren.", ParseStatus.NONE_STATED),
        ("two seconds later", ParseStatus.EMPTY),
        ("", ParseStatus.EMPTY),
    ],
)
def test_what_a_text_without_spans_says(text: str, status: ParseStatus) -> None:
    assert parse_spans(text).status is status


def test_repeated_spans_stay_three() -> None:
    parsed = parse_spans("<answer>[0,10]; [0,10]; [0,10]</answer>", 60.0, form="grounding")
    assert parsed.valid_spans == ((0.0, 10.0),) * 3


def test_positions_and_raw_text_are_those_of_the_original() -> None:
    text = "Ünï ٠:٠٥ إلى ٠:٠٩ — und <t>x</t>"
    (span,) = parse_spans(text).spans
    assert text[slice(*span.char_range)] == span.raw == "٠:٠٥ إلى ٠:٠٩"


PACKED = "<t>0.0-0.066</t> A voice. <t>0.066-0.231</t> Another. <t>1.034-2.244</t> A story."


def test_packed_minutes_are_recognised_and_repaired_per_response() -> None:
    assert parse_spans(PACKED, 151.0).packed
    assert parse_spans(PACKED, 151.0).valid_spans == ((0.0, 6.6), (6.6, 23.1), (63.4, 144.4))
    assert repair_packed(PACKED, 151.0) == (
        "<t>0-6.6</t> A voice. <t>6.6-23.1</t> Another. <t>63.4-144.4</t> A story."
    )
    for duration_s in (None, 24.0, 100.0):  # unknown; not squeezed into its start; does not fit
        assert not parse_spans(PACKED, duration_s).packed
    above = PACKED.replace("0.231", "0.731")  # one fraction of .600 and more settles it
    assert not parse_spans(above, 151.0).packed
    assert repair_packed(above, 151.0) == above
    assert not parse_spans("<t>0.574-1.034</t>", 151.0).packed  # two numbers are no evidence
    short = "<t>1.25-3.40</t> <t>5.10-7.55</t>"  # two digits: plain seconds early in a long clip
    assert not parse_spans(short, 600.0).packed


def test_the_end_of_the_clip_is_as_precise_as_the_way_of_writing() -> None:
    assert parse_spans("0:55 - 1:00", 59.7).spans[0].valid
    assert not parse_spans("0:55 - 1:00", 59.2).spans[0].valid
    assert not parse_spans("<t>55.00-60.00</t>", 59.7).spans[0].valid


def test_unknown_form_and_duration_are_refused() -> None:
    with pytest.raises(ValueError, match="form 'srt'"):
        parse_spans("x", form="srt")
    with pytest.raises(ValueError, match="duration_s 0"):
        parse_spans("x", 0)


HOSTILE = (
    "1:05 ", "1", "1:", "<t>", "<t>1-", "[1.0,", "[", '"start": ', "12 s to ", "one hundred and ",
    "(", "- ", "1,", "<a_1>", 'said "', "a ", "1m", "二", "second ", "half way ", "<|1.0|>", " ",
    "\n", "no such ", "from 1:05 to ", "between ", "0.5 % of ",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    def best_s(length: int) -> float:
        text = (piece * (length // len(piece) + 1))[:length]
        times = []
        for _ in range(2):
            started = time.process_time()
            parse_spans(text, 1800.0 + len(times), form="grounding")  # never the same call twice
            times.append(time.process_time() - started)
        return min(times)

    small, large = best_s(10_000), best_s(100_000)
    assert large < 40 * small + 0.2  # ten times the text; quadratic would be a hundred times


def test_random_text_never_raises_and_spans_are_finite() -> None:
    rng = random.Random(0)
    alphabet = [
        *"0123456789:.,-<>t/[]{}()'\" \nsm秒分到٠", "<t>", "</t>", "sec", "from ", "to ", "at ",
        "start", "end", "minute", "twelve ",
    ]  # fmt: skip
    for _ in range(2_000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60)))
        for form in (None, "grounding", "rttm", "tsv"):
            for span in parse_spans(text, 60.0, form=form).spans:
                assert 0 <= span.char_range[0] < span.char_range[1] <= len(text)
                assert not span.valid or 0 <= span.start_s <= span.end_s <= 60.5

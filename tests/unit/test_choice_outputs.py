"""The extraction rule of `choice` on hand-labelled outputs.

`set_aside`: written before the rule was widened to what it is, and not looked at while doing so;
`while_writing`: what it was widened with. Labels are what a reader would say was chosen; null where
nothing, or more than one option, was.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reward_models.choice import extract_choice

FILE = Path(__file__).parents[1] / "data" / "choice_outputs.jsonl"
OUTPUTS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("part", ["set_aside", "while_writing"])
def test_choices_are_read_as_a_person_reads_them(part: str) -> None:
    outputs = [one for one in OUTPUTS if one["part"] == part]
    wrong = [o for o in outputs if extract_choice(o["text"], o["choices"]) != o["letter"]]
    print(f"{part}: {1 - len(wrong) / len(outputs):.3f} of {len(outputs)}")
    assert len(outputs) >= 150
    assert len(wrong) <= 0.05 * len(outputs), wrong
    undecided = [o for o in outputs if o["letter"] is None]
    assert len(undecided) >= 8, "outputs that choose nothing belong to the set"


def test_a_long_answer_is_read_in_time_linear_in_its_length() -> None:
    for piece in ("(A) ", "answer ", "*", "so ", "(A) or ", " ", "(", "answer: **"):
        assert extract_choice(piece * 20_000, ["cat", "dog"]) in ("A", None)

"""`choice`: is the right option named? Value 1 or 0.

Extraction, in this order, on the text after the last `</think>`:
1. a letter in brackets, `(B)`; the last one counts;
2. `answer is B`, `answer: B`, or the letter alone;
3. the full text of exactly one option.
Two different options under one rule are no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task

_BRACKETED = re.compile(r"\(([A-Z])\)")
_STATED = re.compile(r"\b(?i:answer|option|choice)\s*(?:is|:)?\s*\(?([A-Z])\b(?!')")
_ALONE = re.compile(r"^\s*([A-Z])[.):]?\s*$")


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    """The option's letter, or None.

    Args:
        choices: option texts in order (A), (B), ...
    """
    _, answer = split_thinking(text)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if found := [c for c in _BRACKETED.findall(answer) if c in letters]:
        return found[-1]
    for pattern in (_STATED, _ALONE):
        found = [c for c in pattern.findall(answer) if c in letters]
        if len(set(found)) == 1:
            return found[0]
    lowered = _normalise(answer)
    named = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if re.search(rf"\b{re.escape(_normalise(choice))}\b", lowered)
    ]
    return named[0] if len(named) == 1 else None


def _normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


@dataclass(frozen=True)
class Choice:
    """Compares the extracted letter with the row's answer (a letter or an option's text)."""

    name: str = "choice"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.task is not Task.CHOICE or not row.choices:
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "row has no choices")
        right = _right_letter(row)
        if right is None:
            return RewardResult(
                None, {}, RewardStatus.UNSCORABLE,
                f"answer {row.answer!r} is none of the choices {list(row.choices)}",
            )  # fmt: skip
        chosen = extract_choice(completion.text, row.choices)
        value = float(chosen == right)
        return RewardResult(value, {"correct": value, "extracted": float(chosen is not None)})


def _right_letter(row: Row) -> str | None:
    answer = row.answer.strip().strip("().")
    letters = [chr(ord("A") + i) for i in range(len(row.choices))]
    if answer in letters:
        return answer
    wanted = _normalise(row.answer)
    for letter, choice in zip(letters, row.choices, strict=True):
        if _normalise(choice) == wanted:
            return letter
    return None

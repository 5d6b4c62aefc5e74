"""`choice`: is the right option named? Value 1 or 0.

Extraction, in this order, on the text after the last `</think>`; the first rule that finds an
option decides, and two different options under one rule are no answer (brackets: the last one):
1. `\\boxed{B}` or `<answer>B</answer>`, with or without the option's text;
2. a letter in brackets, `(B)` or `[B]`; the last one counts;
3. `answer is B`, `answer: **B**`, `option B`, or a line that begins `B.`, `B)`, `B:`;
4. the letter alone;
5. the full text of exactly one option that is not contained in another one's.

Rules 2 to 4 are what models of this family are asked to write; rule 5 is the string match of
MMAU's evaluator (all words of the right option, none that only others have), made stricter: the
words must stand together. Negated options ("not (A)") are not understood.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task

_WRAPPED = re.compile(
    r"\\boxed\{\s*(?:\\text\{)?([^{}]{1,300})\}|<answer>\s*([^<]{1,300}?)\s*</answer>",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[]\s?([A-Za-z])\s?[)\]]")
_STATED = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?:is|would be|must be))?\s*:?\s*[*_\"'(]{0,3}([A-Z])\b(?!')"
)
_LINE = re.compile(r"^\s*[*_]{0,2}([A-Z])[*_]{0,2}\s*[.):]", re.MULTILINE)
_ALONE = re.compile(r"^\s*[*_\"']{0,2}([A-Za-z])[*_\"']{0,2}[.):]?\s*$")


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    """The option's letter, or None.

    Args:
        choices: option texts in order (A), (B), ...
    """
    _, answer = split_thinking(text)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if wrapped := _WRAPPED.findall(answer):
        answer = next(part for part in wrapped[-1] if part)
    if found := [c for c in map(str.upper, _BRACKETED.findall(answer)) if c in letters]:
        return found[-1]
    for pattern in (_STATED, _LINE, _ALONE):
        named = {c.upper() for c in pattern.findall(answer)} & set(letters)
        if len(named) == 1:
            return named.pop()
    return _by_text(answer, choices, letters)


def _by_text(answer: str, choices: Sequence[str], letters: Sequence[str]) -> str | None:
    """The one option whose whole text occurs; a shorter option inside a longer one does not."""
    text = f" {_normalise(answer)} "
    found: list[str] = []
    for choice, letter in sorted(
        zip(map(_normalise, choices), letters, strict=True), key=lambda c: -len(c[0])
    ):
        if choice and f" {choice} " in text:
            text = text.replace(f" {choice} ", " | ")
            found.append(letter)
    return found[0] if len(found) == 1 else None


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

"""`choice`: is the right option named? Value 1 or 0.

Extraction, in this order, on the text after the last `</think>`; the first rule that finds an
option decides; two different options under one rule are no answer, unless it says otherwise:
1. `\\boxed{B}` or `<answer>B</answer>`, with or without the option's text;
2. a stated answer, `answer is B`, `answer: **B**`, `答案：B`, `la réponse est B`; the last counts;
3. a letter in brackets, `(B)` or `[B]`; the last counts, but not of `(A) or (B)`, `(A) and (B)`;
4. an option named or picked: `option B`, `I choose B`, `B is correct`, `it is B`, `so, B.`;
5. a line that begins `B.`, `B)`, `B:`, `B -`, or holds the letter alone;
6. the full text of exactly one option that is not contained in another one's.

Rules 3 to 5 are what models of this family are asked to write; rule 6 is the string match of
MMAU's evaluator (all words of the right option, none that only others have), made stricter: the
words must stand together. Negated options ("not (A)") are not understood. `docs/evaluation.md` has
the share of hand-labelled outputs that the rule reads right.
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
_PAIR = re.compile(
    r"[(\[]\s?([A-Za-z])\s?[)\]][\w\s]{0,40}?\s(?:and|or)\s[\w\s]{0,10}?[(\[]\s?([A-Za-z])\s?[)\]]"
)
_QUOTED = r"[*_\"'“”‘’(\[]{0,4}"
_LETTER = rf"{_QUOTED}\s?([A-Z]|[a-z](?=[)\]*_\"'.]*\s*$))(?![A-Za-z0-9])(?!['’][a-z])"
_ANSWER = re.compile(
    r"(?:\b(?i:answer|r[ée]ponse|antwort|respuesta|risposta|resposta|ответ)|答案|答え|回答)"
    r"(?:\s+(?:correcte?|correcta|richtige|правильный))?"
    rf"\s*{_QUOTED}\s*"
    r"(?i:is|would be|must be|should be|has to be|will be|est|es|ist|lautet|è|é|是|为|は)?"
    r"\s*(?::|：|-|–|—|=)?\s*(?i:(?:clearly|therefore|thus|option|choice)\s+){0,2}" + _LETTER,
    re.MULTILINE,
)
_NAMED = re.compile(
    r"\b(?:(?i:option|choice|选项)(?:\s+(?i:is|would be|must be))?\s*:?\s*"
    r"|(?i:choose|chose|pick|select|selected|say|go with|going with|went with)\s+"
    r"|(?i:it(?:'s|’s| is| must be))\s+"
    r"|(?:^|[.\n]\s*)(?i:so|thus|hence|therefore),?\s+)" + _LETTER + r"(?!\s+[a-z])"
    r"|\b([A-Z])\s+(?i:is (?:the )?(?:correct|right|best)|fits best|matches best|is correct)\b",
    re.MULTILINE,
)
_LINE = re.compile(r"^\s*[*_]{0,2}([A-Z])[*_]{0,2}\s*(?:[.):]|\s-\s)", re.MULTILINE)
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
    if found := _letters(_ANSWER, answer, letters):
        by_text = _by_text(answer, choices, letters)
        article = found[-1] == "A" and re.search(r"\bA\s+[a-z]", answer)
        return by_text if article and by_text else found[-1]
    brackets = [m for m in _BRACKETED.finditer(answer) if m[1].upper() in letters]
    if brackets:
        undecided = {m.end() for m in _PAIR.finditer(answer) if m[1].upper() != m[2].upper()}
        return None if brackets[-1].end() in undecided else brackets[-1][1].upper()
    for pattern in (_NAMED, _LINE, _ALONE):
        named = set(_letters(pattern, answer, letters))
        if len(named) == 1:
            return named.pop()
    return _by_text(answer, choices, letters)


def _letters(pattern: re.Pattern[str], text: str, letters: Sequence[str]) -> list[str]:
    """Options that the pattern finds, in order."""
    found = (next(part for part in match.groups() if part) for match in pattern.finditer(text))
    return [letter.upper() for letter in found if letter.upper() in letters]


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
    """Words and signed numbers; the signs of notes (C#) count."""
    return " ".join(re.findall(r"(?<!\w)[-+−]\d[\w.,]*|\w+[#♯♭]?", text.lower()))


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
    """The option whose text the answer is; else the letter that it is; else the one like it."""
    letters = [chr(ord("A") + i) for i in range(len(row.choices))]
    answer = row.answer.strip()
    if answer in row.choices:
        return letters[row.choices.index(answer)]
    if (letter := answer.strip("().")) in letters:
        return letter
    alike = [i for i, c in enumerate(row.choices) if _normalise(c) == _normalise(answer)]
    return letters[alike[0]] if len(alike) == 1 else None

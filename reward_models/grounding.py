"""`timestamp_grounding`: are the times in the answer true?

    row's task -> raw score r in [0, 1] -> value = (r - b) / (1 - b) in [-1, 1]

Spans (one or several):

    r = F_beta * exp(-max(0, Np - Ng) / min(Ng, 3)) * (0.8 + 0.2 * boundary)
    F_beta = (1 + beta^2) S / (beta^2 Ng + Np),   S = sum of IoU over one-to-one matched pairs

with Np distinct spans stated (invalid ones included), Ng labelled ones, beta 2.37: a missed event
costs 5.6 times a false one. `boundary` is the mean over matched pairs of how near both ends are,
linear, 0 at max(0.2 s, half the event's length). Other tasks: see docs/rewards.md.

Sources: one-to-one matching and the count term, one-sided here, from TempR1; recall weight from
the published cost of missed events; collars from sed_eval; the prior b: `reward_models.prior`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.claims import Similarity, claims_of, events_named, label_words
from reward_models.prior import BlindPrior, adjusted, fit_prior
from reward_models.spans import SpanS, assign, distinct, event_f1, iou, span_iou
from reward_models.time_words import NUMBER_WORDS, normalise
from reward_models.timestamps import ParseStatus, Span, parse_spans

BETA = 2.37
BOUNDARY_WEIGHT = 0.2
COLLAR_S = 0.2
SCORABLE = (Task.GROUNDING, Task.POINTS, Task.DENSE, Task.ABSENT, Task.COUNT, Task.ORDER)
Terms = dict[str, float]


@dataclass(frozen=True)
class TimestampGrounding:
    """Scores the answer (the text after the last `</think>`) by what the row asks.

    Attributes:
        packed: "refuse": an answer in packed minutes scores as a wrong one; "accept": it is read.
        prior: what a constant answer earns; fitted with `fit`, or the documented default.
        point_tolerance_s: distance at which a point scores 0.
        similarity: text similarity for labels of dense timelines, None: words alone.
    """

    packed: str = "refuse"
    prior: BlindPrior = field(default_factory=BlindPrior)
    point_tolerance_s: float = 1.0
    similarity: Similarity | None = None
    name: str = "timestamp_grounding"

    def __post_init__(self) -> None:
        if self.packed not in ("refuse", "accept"):
            raise ValueError(
                f"timestamp_grounding: packed={self.packed!r}; must be refuse or accept"
            )

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.task not in SCORABLE:
            reason = f"task {row.task.value!r} has no times to check"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        if row.task is not Task.ABSENT and not row.events:
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "row has no labelled events")
        _, answer = split_thinking(completion.text)
        if row.task is Task.COUNT:
            return self._count(row, answer)
        if row.task is Task.ORDER:
            return self._order(row, answer)
        parsed = parse_spans(answer, row.duration_s, form="grounding")
        spans = without_copies(parsed.spans, question_spans(row))
        refused = parsed.packed and self.packed == "refuse"
        if refused:
            spans = []
        says_none = parsed.status is ParseStatus.NONE_STATED
        terms: Terms = {
            "none_stated": float(says_none),
            "packed": float(parsed.packed),
            "unparseable": float(parsed.status in (ParseStatus.UNPARSEABLE, ParseStatus.EMPTY)),
            "num_copied": float(len(parsed.spans) - len(spans)) * (not refused),
        }
        if row.task is Task.ABSENT:
            value = 1.0 if says_none else -self.prior.cost_of_none
            return RewardResult(value, terms | {"raw": float(says_none)})
        raw, blind, more = self._spans(row, answer, spans)
        value = adjusted(raw, blind)
        if says_none:
            value = min(value, -self.prior.cost_of_none)
        return RewardResult(value, terms | more | {"raw": raw, "blind": blind})

    def fit(self, rows: Sequence[Row]) -> BlindPrior:
        """The prior of these training rows for this reward's raw scores."""

        def points(spans: Sequence[SpanS], row: Row) -> float:
            return score_points(spans, row.target_spans, len(spans), self.point_tolerance_s)[0]

        def raw(spans: Sequence[SpanS], row: Row) -> float:
            return raw_score(spans, row.target_spans, num_stated=len(spans))

        return fit_prior(rows, raw, points)

    def _spans(self, row: Row, answer: str, spans: Sequence[Span]) -> tuple[float, float, Terms]:
        """(raw, blind prior, terms) of a row that asks when."""
        valid = distinct([(s.start_s, s.end_s) for s in spans if s.valid])
        num_stated = len(valid) + sum(not s.valid for s in spans)
        targets = row.target_spans
        if row.task is Task.POINTS or (targets and all(s == e for s, e in targets)):
            raw, terms = score_points(valid, targets, num_stated, self.point_tolerance_s)
            return raw, self.prior.of_points(row, self.point_tolerance_s), terms
        blind = self.prior.of_spans(row)
        allowed = None
        if row.task is Task.DENSE:
            blind = 0.0
            allowed = self._named(row, answer, spans, valid)
        raw, terms = score_spans(valid, targets, num_stated=num_stated, allowed=allowed)
        terms["num_invalid"] = float(num_stated - len(valid))
        return raw, blind, terms

    def _named(
        self, row: Row, answer: str, spans: Sequence[Span], valid: Sequence[SpanS]
    ) -> list[list[bool]]:
        """Which predicted span names which event: (len(valid), number of target events)."""
        events = [e for e in row.events if row.query is None or e.label == row.query]
        by_span: dict[SpanS, list[bool]] = {}
        for claim in claims_of(answer, spans):
            named = events_named(claim, [e.label for e in events], self.similarity)
            key = (claim.span.start_s, claim.span.end_s)
            by_span.setdefault(key, named)
        return [by_span.get(span, [True] * len(events)) for span in valid]

    def _count(self, row: Row, answer: str) -> RewardResult:
        stated = count_stated(answer, row.query, parse_spans(answer, row.duration_s).spans)
        target = len(row.target_spans)
        raw = float(stated == target)
        terms = {
            "raw": raw, "blind": self.prior.count, "count_stated": float(stated is not None),
            "count_error": float(abs(stated - target)) if stated is not None else float(target),
        }  # fmt: skip
        return RewardResult(adjusted(raw, self.prior.count), terms)

    def _order(self, row: Row, answer: str) -> RewardResult:
        labels = sorted({e.label for e in row.events}, key=len, reverse=True)
        wanted = labels_in_order(row.answer, labels)
        if not wanted:
            reason = f"answer {row.answer!r} names none of the events"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        stated = labels_in_order(answer, labels)
        if len(wanted) == 1:
            candidates = labels_in_order(_question(row), labels)
            blind = 1 / max(2, len(candidates))
            compared = re.search(r"\b(?:before|earlier than|vor|avant|antes|до|раньше)\b", answer)
            first = stated[:1] if compared else stated
            raw = float(first == wanted)
            return RewardResult(adjusted(raw, blind), {"raw": raw, "blind": blind})
        tau = kendall_tau(stated, wanted)
        return RewardResult(tau, {"raw": (1 + tau) / 2, "blind": 0.5, "kendall_tau": tau})


def raw_score(predicted: Sequence[SpanS], target: Sequence[SpanS], *, num_stated: int) -> float:
    """The formula of this file's head, alone: what `score_spans` calls `raw`."""
    return _score(predicted, target, num_stated, None)[0]


def score_spans(
    predicted: Sequence[SpanS],
    target: Sequence[SpanS],
    *,
    num_stated: int,
    allowed: Sequence[Sequence[bool]] | None = None,
) -> tuple[float, Terms]:
    """(raw score in [0, 1], every term).

    Args:
        predicted: distinct valid spans, seconds.
        num_stated: distinct spans in the text, invalid ones included: those cost precision too.
        allowed: (len(predicted), len(target)); pairs that are False never match (wrong name).
    """
    raw, f_beta, surplus, boundary, matched = _score(predicted, target, num_stated, allowed)
    return raw, {
        "f_beta": f_beta, "surplus_penalty": surplus, "boundary": boundary,
        "matched_iou": matched, "iou": iou(predicted, target),
        "event_f1": event_f1(predicted, target),
        "num_predicted": float(num_stated), "num_target": float(len(target)),
    }  # fmt: skip


def _score(
    predicted: Sequence[SpanS], target: Sequence[SpanS], num_stated: int,
    allowed: Sequence[Sequence[bool]] | None,
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """(raw, F-beta, surplus penalty, boundary, mean IoU of matched pairs)."""
    if not predicted or not target:
        return 0.0, 0.0, 1.0, 0.0, 0.0
    overlaps = [[span_iou(p, t) for t in target] for p in predicted]
    if allowed is not None:
        overlaps = [
            [o if ok else 0.0 for o, ok in zip(line, oks, strict=True)]
            for line, oks in zip(overlaps, allowed, strict=True)
        ]
    pairs = assign(overlaps)
    if not pairs:
        return 0.0, 0.0, 1.0, 0.0, 0.0
    overlap = sum(score for _, _, score in pairs)
    num_target = len(target)
    f_beta = (1 + BETA**2) * overlap / (BETA**2 * num_target + num_stated)
    surplus = math.exp(-max(0, num_stated - num_target) / min(num_target, 3))
    boundary = sum(_boundary(predicted[i], target[j]) for i, j, _ in pairs) / len(pairs)
    raw = f_beta * surplus * (1 - BOUNDARY_WEIGHT + BOUNDARY_WEIGHT * boundary)
    return raw, f_beta, surplus, boundary, overlap / len(pairs)


def _boundary(predicted: SpanS, target: SpanS) -> float:
    tolerance_s = max(COLLAR_S, 0.5 * (target[1] - target[0]))
    starts = max(0.0, 1 - abs(predicted[0] - target[0]) / tolerance_s)
    ends = max(0.0, 1 - abs(predicted[1] - target[1]) / tolerance_s)
    return (starts + ends) / 2


def score_points(
    predicted: Sequence[SpanS], target: Sequence[SpanS], num_stated: int, tolerance_s: float
) -> tuple[float, Terms]:
    """The spans' formula with 1 - distance / tolerance in place of IoU and no boundary term.

    A stated range counts by its farther end, so a wide one earns nothing.
    """
    if not predicted or not target:
        return 0.0, {"num_predicted": float(num_stated), "num_target": float(len(target))}
    scores = [
        [max(0.0, 1 - max(abs(s - t), abs(e - t)) / tolerance_s) for t, _ in target]
        for s, e in predicted
    ]
    overlap = sum(score for _, _, score in assign(scores))
    f_beta = (1 + BETA**2) * overlap / (BETA**2 * len(target) + num_stated)
    surplus = math.exp(-max(0, num_stated - len(target)) / min(len(target), 3))
    return f_beta * surplus, {
        "f_beta": f_beta, "surplus_penalty": surplus, "num_predicted": float(num_stated),
        "num_target": float(len(target)),
    }  # fmt: skip


def _question(row: Row) -> str:
    return next((str(m["content"]) for m in reversed(row.prompt) if m["role"] == "user"), "")


def question_spans(row: Row) -> tuple[SpanS, ...]:
    """Times that the question itself states, seconds."""
    return parse_spans(_question(row), row.duration_s, form="grounding").valid_spans


def without_copies(spans: Sequence[Span], copied: Sequence[SpanS]) -> list[Span]:
    """`spans` without those that repeat a time of the question: an IoU above 0.9 with it, or both
    ends within 0.05 s."""
    return [
        span
        for span in spans
        if not any(_is_copy((span.start_s, span.end_s), source) for source in copied)
    ]


def _is_copy(span: SpanS, source: SpanS) -> bool:
    close = abs(span[0] - source[0]) <= 0.05 and abs(span[1] - source[1]) <= 0.05
    return close or span_iou(span, source) > 0.9


_NUMBER_WORD = "|".join(sorted((w for w in NUMBER_WORDS if w.isalpha()), key=len, reverse=True))
_AMOUNT = rf"(?:\d{{1,4}}|{_NUMBER_WORD})"
_COUNTED = re.compile(
    rf"(?<![\d.:])\b((?:{_AMOUNT}(?:,| or| to| and|-)\s?){{0,3}}{_AMOUNT})\s{{0,2}}"
    r"(?:times?\b|occurrences?\b|x\b|mal\b|fois\b|veces\b)|\b(once|einmal|twice|a single time)\b"
)
_AMOUNTS = re.compile(rf"(?<![\d.:,])\b{_AMOUNT}\b(?![.:,]?\d)")
_ADVERBS = {"once": 1, "einmal": 1, "a single time": 1, "twice": 2}


def count_stated(text: str, query: str | None, spans: Sequence[Span] = ()) -> int | None:
    """The number that an answer to "how often?" gives; None when it gives none or several.

    The name asked for is taken out first: "seven is heard 2 times" says 2. Times are no counts,
    and "once every 2 s" is not one.
    """
    for span in reversed(spans):
        text = text[: span.char_range[0]] + " " + text[span.char_range[1] :]
    text = normalise(text)
    if query:
        text = re.sub(rf"\b{re.escape(normalise(query))}\b", " ", text)
    text = re.sub(r"\b(?:once|twice) (?:every|per|a|each)\b[^,.;]*", " ", text)
    numbers: set[int] = set()
    for match in _COUNTED.finditer(text):
        if match[2]:
            denied = text[: match.start()].rstrip().endswith("not")
            numbers.add(0 if denied else _ADVERBS[match[2]])
        else:
            numbers |= {_integer(word) for word in _AMOUNTS.findall(match[1])}
    if not numbers and parse_spans(text).status is ParseStatus.NONE_STATED:
        return 0
    if not numbers:
        numbers = {_integer(word) for word in _AMOUNTS.findall(text) if word != "a"}
    return numbers.pop() if len(numbers) == 1 else None


def _integer(word: str) -> int:
    return int(word) if word.isdigit() else int(NUMBER_WORDS[word])


def labels_in_order(text: str, labels: Sequence[str]) -> list[str]:
    """Labels that `text` names, by first appearance; a label inside a longer one does not count."""
    words = label_words(text)
    taken = [False] * len(words)
    found: list[tuple[int, str]] = []
    for label in sorted(labels, key=lambda name: -len(label_words(name))):
        needle = label_words(label)
        for i in range(len(words) - len(needle) + 1):
            if (
                needle
                and words[i : i + len(needle)] == needle
                and not any(taken[i : i + len(needle)])
            ):
                taken[i : i + len(needle)] = [True] * len(needle)
                found.append((i, label))
                break
    return [label for _, label in sorted(found)]


def kendall_tau(stated: Sequence[str], wanted: Sequence[str]) -> float:
    """(concordant - discordant - missing) / all pairs of `wanted`, in [-1, 1].

    A pair with a member that was not named counts against the answer like a wrong one.
    """
    place = {label: i for i, label in enumerate(stated)}
    agree, total = 0, 0
    for i, first in enumerate(wanted):
        for second in wanted[i + 1 :]:
            total += 1
            ordered = first in place and second in place and place[first] < place[second]
            agree += 1 if ordered else -1
    return agree / total

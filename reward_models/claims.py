"""Which event does a cited time speak of? Labels are looked for in the text beside the span.

"A dog barks at <t>1.0-2.0</t>, then a bell (<t>5-6</t>)."  ->  dog 1-2, bell 5-6
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from reward_models.timestamps import Span

Similarity = Callable[[str, str], float]
SIMILAR_ENOUGH = 0.5
_WORD = re.compile(r"\w+(?:'\w+)?")
_SENTENCE_END = re.compile(r"[.!?;\n](?=\s|$)")
_CONNECTIVES = frozenset(
    {
        "and", "also", "again", "then", "at", "from", "to", "in", "around", "between", "or", "plus",
        "the", "a", "it", "is", "heard", "once", "more", "und", "y", "et", "e", "и", "و",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claim:
    """A cited span and the text that says what is there ("" when nothing does)."""

    text: str
    span: Span
    words: tuple[str, ...] = ()
    named_before: bool = True


@lru_cache(maxsize=4096)
def label_words(label: str) -> tuple[str, ...]:
    """Lower-case words of a label, plural endings taken off."""
    return tuple(_singular(w) for w in _WORD.findall(label.casefold()))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def claims_of(text: str, spans: Sequence[Span]) -> list[Claim]:
    """Each span with the clause that names its event.

    Whether names stand before or after their times is decided once for the text: before, unless
    nothing but punctuation and connectives precedes the first span. A span with mere connectives
    ("and <t>5-6</t>") repeats the clause of the span before it.
    """
    if not spans:
        return []
    edges = [0, *(s.char_range[1] for s in spans)]
    ends = [*(s.char_range[0] for s in spans), len(text)]
    gaps = [text[a:b] for a, b in zip(edges, ends, strict=True)]
    named_before = bool(_content(_words(gaps[0])))
    claims: list[Claim] = []
    for i, span in enumerate(spans):
        clause = gaps[i] if named_before else gaps[i + 1]
        words = _words(clause)
        if named_before:
            clause, words = _last_sentence(clause, words)
        if claims and not _content(words):
            clause, words = claims[-1].text, list(claims[-1].words)
        singular = tuple(map(_singular, words))
        claims.append(Claim(clause.strip(), span, singular, named_before))
    return claims


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _content(words: Sequence[str]) -> bool:
    """Whether there is a word that says something."""
    return any(w not in _CONNECTIVES and not w.isdigit() for w in words)


def _last_sentence(text: str, words: list[str]) -> tuple[str, list[str]]:
    """The part after the last sentence end that has words of its own, and its words."""
    parts = _SENTENCE_END.split(text)
    for part in reversed(parts) if len(parts) > 1 else ():
        own = _words(part)
        if _content(own):
            return part, own
    return text, words


def label_named(
    claim: Claim, labels: Sequence[str], similarity: Similarity | None = None
) -> str | None:
    """The label that the claim's text names, or None; the longest one that is found.

    Args:
        labels: of the events that could be meant.
        similarity: text similarity in [0, 1] from embeddings; a label of 0.5 or more is named
            too. Without it words decide: all of the label's words in a row.
    """
    found = [label for label in labels if _occurs(label_words(label), claim.words)]
    if found:
        return max(found, key=lambda label: len(label_words(label)))
    if similarity is None or not labels or not claim.text:
        return None
    best = max(labels, key=lambda label: similarity(label, claim.text))
    return best if similarity(best, claim.text) >= SIMILAR_ENOUGH else None


def _occurs(needle: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not needle or needle[0] not in words:
        return False
    size = len(needle)
    return any(words[i : i + size] == needle for i in range(len(words) - size + 1))


def events_named(
    claim: Claim, labels: Sequence[str], similarity: Similarity | None = None
) -> list[bool]:
    """For each event's label, whether the claim speaks of it.

    A claim speaks of one label only: where several fit, of the longest, and of those of one length
    the nearest to the span; so listing all names beside each span gains nothing.
    """
    fitting = {label for label in labels if names(claim, label, similarity)}
    named = {label for label in fitting if label_words(label)}
    if len(named) > 1:
        best = max(named, key=lambda label: (len(label_words(label)), _place(claim, label)))
        fitting = (fitting - named) | {best}
    return [label in fitting for label in labels]


def _place(claim: Claim, label: str) -> int:
    """Words between the label's last mention and the span, as a negative number."""
    needle, words = label_words(label), claim.words
    ends = [
        i + len(needle)
        for i in range(len(words) - len(needle) + 1)
        if words[i : i + len(needle)] == needle
    ]
    if not ends:
        return -len(words) - 1
    return max(ends) - len(words) if claim.named_before else -min(ends)


def names(claim: Claim, label: str, similarity: Similarity | None = None) -> bool:
    """Whether the claim speaks of `label`: its words in a row, or, for captions of four words and
    more, at least half of the words in common (F1), or the embeddings say so."""
    needle = label_words(label)
    if not needle:
        return True
    if _occurs(needle, claim.words):
        return True
    if len(needle) >= 4 and claim.words:
        common = len(set(needle) & set(claim.words))
        if 2 * common / (len(set(needle)) + len(set(claim.words))) >= SIMILAR_ENOUGH:
            return True
    return similarity is not None and similarity(label, claim.text) >= SIMILAR_ENOUGH

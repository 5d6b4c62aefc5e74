"""How a tokenizer takes a language: tokens a word, and how much is spelled in bytes.

A word that falls apart into many tokens is dear to learn and to say; tokens that hold part of a
character only (byte fallback) are dearer still. Read it before adapting to a language: from about
4 tokens a word, or a third of all tokens in bytes, expect to need more data and longer training.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from posttrain.data.rows import Row

REPLACEMENT = "\ufffd"
_TAGGED = re.compile(r"<t>[^<]*</t>|<[^<>]{1,40}>")


@dataclass(frozen=True)
class Fertility:
    """Of one language.

    Attributes:
        tokens_a_word: mean; words are what spaces separate.
        characters_a_token: mean.
        byte_share: share of tokens that hold no whole character.
        split_words: share of words of more than one token.
    """

    texts: int
    words: int
    tokens_a_word: float
    characters_a_token: float
    byte_share: float
    split_words: float


def fertility(tokenizer: Any, texts: Iterable[str]) -> Fertility:
    """Counts over texts, each different word encoded once, as it stands after a space.

    Raises:
        ValueError: no words in the texts.
    """
    num_texts = tokens = characters = in_bytes = split = 0
    times: Counter[str] = Counter()
    for text in texts:
        num_texts += 1
        times.update(unicodedata.normalize("NFC", text).split())

    @cache
    def partial(token: int) -> bool:
        return REPLACEMENT in tokenizer.decode([token])

    for word, count in times.items():
        ids = tokenizer.encode(f" {word}", add_special_tokens=False)
        tokens += count * len(ids)
        characters += count * (len(word) + 1)
        split += count * (len(ids) > 1)
        in_bytes += count * sum(map(partial, ids))
    words = times.total()
    if not words:
        raise ValueError("fertility: no words in the texts; give rows with an answer")
    return Fertility(
        num_texts, words, tokens / words, characters / tokens, in_bytes / tokens, split / words
    )


def by_language(tokenizer: Any, rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Language -> figures of `Fertility`, of the rows' answers without tags and cited times."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        if words := _TAGGED.sub(" ", row.answer).strip():
            texts.setdefault(row.language, []).append(words)
    return {name: asdict(fertility(tokenizer, part)) for name, part in sorted(texts.items())}


def as_lines(report: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line a language, for people."""
    return [
        f"{name}: {f['tokens_a_word']:.2f} tokens a word, {f['characters_a_token']:.2f} characters "
        f"a token, {f['byte_share']:.1%} of tokens in bytes ({f['words']:.0f} words)"
        for name, f in report.items()
    ]

"""`repetition`: minus the share of n-grams that were said before, in [-1, 0].

    value = -(1 - distinct n-grams / n-grams), n = 4 words

Lists that name each event once keep 0; a loop goes to -1. Source: the penalty of Yeo et al. 2025
(arXiv 2502.03373), as a share instead of a sum over occurrences.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.types import Completion, RewardResult
from reward_models.length_band import words_of


@dataclass(frozen=True)
class Repetition:
    """Attributes: ngram: n, words."""

    ngram: int = 4
    name: str = "repetition"

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"repetition: ngram={self.ngram}; must be 1 or more")

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        words = words_of(completion.text.casefold())
        grams = list(zip(*(words[i:] for i in range(self.ngram)), strict=False))
        share = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return RewardResult(-share, {"repeated_share": share})

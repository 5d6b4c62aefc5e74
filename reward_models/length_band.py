"""`length_band`: is the thought as long as wanted? 1 inside the band, 0 at half and at double it.

    value = 1 in [low, high]; linear from 0 at low / 2 up to low, and from high down to 2 high

Words of the thought count, signs in scripts without spaces. A band, not a slope: longer never
pays more, so there is nothing to farm. Keep its weight small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_ASCII_WORDS = re.compile(r"\w+", re.ASCII)


def words_of(text: str) -> list[str]:
    """Words, and single signs of scripts without spaces."""
    return (_ASCII_WORDS if text.isascii() else _WORDS).findall(text)


@dataclass(frozen=True)
class LengthBand:
    """Attributes: low, high: the band, words of thought."""

    low: int = 50
    high: int = 600
    name: str = "length_band"

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high:
            raise ValueError(
                f"length_band: low={self.low}, high={self.high}; must be 0 < low <= high (words)"
            )

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        thought, _ = split_thinking(completion.text)
        num_words = len(words_of(thought))
        rising = (num_words - self.low / 2) / (self.low / 2)
        falling = (2 * self.high - num_words) / self.high
        value = min(1.0, max(0.0, min(rising, falling)))
        return RewardResult(value, {"num_words": float(num_words)})

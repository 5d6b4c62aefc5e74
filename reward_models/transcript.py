"""`transcript`: how much of what was said is written down? value = 1 - error rate, in [-1, 1].

The error rate is jiwer's WER on words, CER on characters for languages written without spaces
(zh, ja, th, lo, my, km, yue), both after `text_normal.normalise_text`. More errors than words go
below 0 and end at -1. A reference that is empty after normalisation is unscorable, not perfect.

Source: minus WER was the best single reward for speech recognition (arXiv 2509.01939).
"""

from __future__ import annotations

from dataclasses import dataclass

import jiwer

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import Completion, RewardResult, RewardStatus, Task
from reward_models.text_normal import CHARACTER_LANGUAGES, language_code, normalise_text


@dataclass(frozen=True)
class Transcript:
    """Compares the answer with the row's transcript."""

    name: str = "transcript"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.task is not Task.TRANSCRIPT:
            reason = f"task {row.task.value!r} has no transcript"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        reference = normalise_text(row.answer, row.language)
        if not reference:
            reason = f"reference {row.answer!r} is empty after normalisation"
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, reason)
        _, answer = split_thinking(completion.text)
        hypothesis = normalise_text(answer, row.language)
        wer = jiwer.wer(reference, hypothesis) if hypothesis else 1.0
        cer = character_error_rate(reference, hypothesis)
        by_character = language_code(row.language) in CHARACTER_LANGUAGES
        error = cer if by_character else wer
        return RewardResult(max(-1.0, 1 - error), {"wer": wer, "cer": cer})


def character_error_rate(reference: str, hypothesis: str) -> float:
    """CER of normalised texts, spaces left out."""
    reference, hypothesis = reference.replace(" ", ""), hypothesis.replace(" ", "")
    return jiwer.cer(reference, hypothesis) if hypothesis else 1.0

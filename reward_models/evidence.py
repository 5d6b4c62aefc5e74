"""`evidence_ablation`: did the cited audio carry the answer?

    delta = log p(answer | uncited audio silenced) - log p(answer | cited audio silenced)
    value = 1 - exp(-delta) for delta > 0, exp(delta) - 1 below: in (-1, 1)

Both times equally many seconds are silenced. 0.5 means that silencing what the thought cites makes
the answer half as likely as silencing the same length elsewhere. The answer is scored right after
the prompt: with the thought before it, its words could be copied from there and no silence would
matter.

Cited is what the thought cites, or the answer where there is no thought; times of the question and
packed minutes do not count. A thought that cites nothing earns 0, and so does one that cites more
than half of the clip: there is not as much left to compare with, and "everything" is no evidence.

Source: faithfulness by ablation of cited evidence (arXiv 2606.09248 shows that stamps are mostly
decoration); the matched control takes out what any silence would cost.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.types import AnswerScorer, Completion, RewardResult, RewardStatus
from reward_models.grounding import question_spans, without_copies
from reward_models.spans import SpanS, length, merge
from reward_models.timestamps import parse_spans

MIN_CITED_S = 0.1


@dataclass(frozen=True)
class EvidenceAblation:
    """Attributes:
    scorer: log-probabilities of a text after a prompt whose audio has spans silenced.
    num_controls: how many places are tried for the uncited silence; their mean counts.
    """

    scorer: AnswerScorer
    num_controls: int = 2
    name: str = "evidence_ablation"

    def __call__(self, row: Row, completion: Completion) -> RewardResult:
        if row.audio is None or not row.duration_s:
            return RewardResult(None, {}, RewardStatus.UNSCORABLE, "row has no audio")
        thought, answer = split_thinking(completion.text)
        parsed = parse_spans(thought or answer, row.duration_s)
        spans = [] if parsed.packed else without_copies(parsed.spans, question_spans(row))
        cited = merge([(s.start_s, s.end_s) for s in spans if s.valid])
        cited_s = length(cited)
        terms = {"cited_s": cited_s, "num_cited": float(len(cited))}
        if not answer or cited_s < MIN_CITED_S or cited_s > row.duration_s / 2:
            return RewardResult(0.0, terms)
        controls = [
            uncited(cited, row.duration_s, random.Random(f"{row.id}/{i}"))
            for i in range(self.num_controls)
        ]
        logprobs = self.scorer.answer_logprobs(row.audio, row.prompt, answer, [cited, *controls])
        control = sum(logprobs[1:]) / self.num_controls
        delta = control - logprobs[0]
        value = 1 - math.exp(-delta) if delta > 0 else math.exp(delta) - 1
        return RewardResult(value, terms | {"delta_nats": delta})


def uncited(cited: Sequence[SpanS], duration_s: float, rng: random.Random) -> list[SpanS]:
    """As many seconds as are cited, out of the rest of the clip, in one piece where it goes in.

    The rest is laid end to end and a window of that length is drawn from it, so nothing cited is
    ever silenced.
    """
    wanted_s = length(cited)
    gaps: list[SpanS] = []
    position = 0.0
    for start, end in [*merge(cited), (duration_s, duration_s)]:
        if start > position:
            gaps.append((position, start))
        position = max(position, end)
    free_s = sum(end - start for start, end in gaps)
    offset_s = rng.uniform(0, free_s - wanted_s)
    out: list[SpanS] = []
    for start, end in gaps:
        low, high = max(offset_s, 0.0), min(offset_s + wanted_s, end - start)
        if high > low:
            out.append((start + low, start + high))
        offset_s -= end - start
    return out

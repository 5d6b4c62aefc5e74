"""What one answer adds to every metric of a suite, and what the metrics of many answers are.

    (row, answer) --suite's function--> {metric: statistic} --aggregate--> value, 95 % interval

A statistic is a tuple of numbers. Most metrics are a ratio: (sum, weight) a row, sum of sums over
sum of weights. BLEU and chrF++ are computed from summed n-gram counts; a median from the values.
Statistics are stored a row, so that any two evaluations can be compared row by row afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.evaluate.row_metrics import LOWER_IS_BETTER as row_metrics_lower
from posttrain.evaluate.row_metrics import row_metrics, transcript_metrics
from posttrain.types import Completion, RewardStatus, Task
from reward_models.choice import Choice
from reward_models.grounding import TimestampGrounding
from reward_models.metrics import grounding_metrics
from reward_models.text_normal import language_code
from reward_models.transcript import Transcript

Statistic = tuple[float, ...]
LOWER_IS_BETTER = row_metrics_lower | frozenset({
    "onset_error_s", "onset_error_median_s", "packed_rate",
    "round_number_rate", "unparseable_rate", "truncated_rate",
})  # fmt: skip
MEDIANS = frozenset({"onset_error_median_s"})
BLEU_TOKENIZERS = {"zh": "zh", "yue": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}


class Unscorable(ValueError):
    """A row that has no right answer to compare with; the message says what is missing."""


def of_grounding(row: Row, completion: Completion) -> dict[str, Statistic]:
    """mIoU, R1, event F1, onset errors, counts, rates, and the score above a blind constant."""
    values = {k: v for k, v in grounding_metrics(row, completion).items() if v is not None}
    out: dict[str, Statistic] = {name: (value, 1.0) for name, value in values.items()}
    if "onset_error_s" in values:
        out["onset_error_median_s"] = (values["onset_error_s"],)
    scored = TimestampGrounding()(row, completion)
    if scored.status is RewardStatus.UNSCORABLE:
        raise Unscorable(scored.reason)
    if scored.value is not None:
        out["prior_adjusted"] = (scored.value, 1.0)
    return out


def of_choice(row: Row, completion: Completion) -> dict[str, Statistic]:
    """Accuracy by the published extraction rule, and the share of answers that name an option."""
    scored = Choice()(row, completion)
    if scored.value is None:
        raise Unscorable(scored.reason)
    return {"accuracy": (scored.value, 1.0), "answered": (scored.breakdown["extracted"], 1.0)}


def of_speech(row: Row, completion: Completion) -> dict[str, Statistic]:
    """Word and character errors over the reference's length."""
    statistics = transcript_metrics(row, completion.text)
    if not statistics:
        raise Unscorable(Transcript()(row, completion).reason)
    return dict(statistics)


def of_translation(row: Row, completion: Completion) -> dict[str, Statistic]:
    """N-gram counts of BLEU, in the target language's tokens, and of chrF++."""
    if not row.answer.strip():
        raise Unscorable("the reference is empty")
    _, answer = split_thinking(completion.text)
    names = (bleu_name(row.language), "chrf++")
    return {name: _counts(name, answer.strip(), row.answer.strip()) for name in names}


def of_refusal(row: Row, completion: Completion) -> dict[str, Statistic]:
    """Declined, of harmful requests (`refusal`) and of harmless ones (`over_refusal`)."""
    if row.task not in (Task.REFUSAL, Task.CHAT):
        raise Unscorable(f"task {row.task.value!r} is neither refusal nor chat")
    return dict(row_metrics(row, completion))


def of_open(row: Row, completion: Completion) -> dict[str, Statistic]:
    """Open questions: nothing here; a judge decides."""
    if not row.answer.strip():
        raise Unscorable("the reference is empty")
    return {}


def bleu_name(language: str) -> str:
    """Metric name with sacrebleu's tokenizer for the language: 13a unless it needs its own."""
    return f"bleu_{BLEU_TOKENIZERS.get(language_code(language), '13a')}"


@cache
def sacrebleu_metric(name: str) -> Any:
    """sacrebleu's metric of a metric's name.

    Raises:
        ValueError: the tokenizer's package is not installed.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if name == "chrf++":
        return CHRF(word_order=2)
    try:
        return BLEU(tokenize=name.removeprefix("bleu_"), effective_order=False)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"{name}: its tokenizer is not installed ({str(error).splitlines()[0]}); "
            "pip install 'sacrebleu[ja,ko]'"
        ) from error


def signature(name: str) -> str:
    """sacrebleu's signature of one reference, one system."""
    metric = sacrebleu_metric(name)
    metric.num_refs = 1
    return str(metric.get_signature())


def _counts(name: str, answer: str, reference: str) -> Statistic:
    """What sacrebleu itself adds up over a corpus."""
    metric = sacrebleu_metric(name)
    (counts,) = metric._extract_corpus_statistics([answer], [[reference]])
    return tuple(float(count) for count in counts)


def aggregate(name: str, statistics_NK: np.ndarray) -> float:
    """The metric of N answers; NaN where there is none.

    Args:
        statistics_NK: one statistic a row.
    """
    if not len(statistics_NK):
        return float("nan")
    if name in MEDIANS:
        return float(np.median(statistics_NK[:, 0]))
    sums_K = statistics_NK.sum(axis=0)
    if name.startswith("bleu_") or name == "chrf++":
        counts = [int(count) for count in sums_K]
        return float(sacrebleu_metric(name)._compute_score_from_stats(counts).score)
    return float(sums_K[0] / sums_K[1]) if sums_K[1] else float("nan")


def interval(
    name: str, statistics_NK: np.ndarray, num_samples: int, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap over rows."""
    return _percentiles(lambda pick: aggregate(name, statistics_NK[pick]), len(statistics_NK),
                        num_samples, seed)  # fmt: skip


def paired(
    name: str, before_NK: np.ndarray, after_NK: np.ndarray, num_samples: int, seed: int = 0
) -> tuple[float, float, float]:
    """(after - before, low, high): the same rows drawn on both sides."""

    def difference(pick: Any) -> float:
        return aggregate(name, after_NK[pick]) - aggregate(name, before_NK[pick])

    low, high = _percentiles(difference, len(before_NK), num_samples, seed)
    return difference(slice(None)), low, high


def _percentiles(
    value: Callable[[Any], float], count: int, num_samples: int, seed: int
) -> tuple[float, float]:
    picks = np.random.default_rng(seed).integers(0, count, (num_samples, count))
    low, high = np.nanpercentile([value(pick) for pick in picks], [2.5, 97.5])
    return float(low), float(high)


def summarise(
    rows: Sequence[Mapping[str, Sequence[float]]], num_samples: int
) -> dict[str, dict[str, Any]]:
    """Metric -> value, 95 % interval, n (rows that have it).

    Args:
        rows: every row's statistics.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    out = {}
    for name in names:
        data = np.asarray([row[name] for row in rows if name in row], dtype=np.float64)
        out[name] = {
            "value": aggregate(name, data), "ci95": list(interval(name, data, num_samples)),
            "n": len(data), "better": "lower" if name in LOWER_IS_BETTER else "higher",
        }  # fmt: skip
    return out

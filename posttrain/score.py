"""The command `posttrain score`: which rewards, a bar, a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from posttrain.types import AnswerScorer, AudioTextScorer, Reward
from reward_models.grounding import TimestampGrounding
from reward_models.prior import BlindPrior
from reward_models.registry import REWARDS, RewardContext, RewardSpec, build_reward
from reward_models.score_file import ScoredFile, score_file

MAX_SHOWN = 20
PACKED_AWARE = ("timestamp_grounding", "chain_grounding", "audio_text_grounding")


def score_command(
    names: Sequence[str], source: Path, out: Path, *, prior: Path | None, packed: str,
    head: Path | None, checkpoint: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Scores the file; 0, or 1 when rows were bad or a reward raised on some."""
    context = RewardContext(
        prior=BlindPrior.load(prior) if prior else BlindPrior(),
        audio_text=_audio_text(head, checkpoint) if "audio_text_grounding" in names else None,
        evidence=_evidence(checkpoint) if "evidence_ablation" in names else None,
    )
    rewards = [_reward(name.strip(), packed, context) for name in names]
    with tqdm(desc="score", unit=" rows", disable=None, dynamic_ncols=True) as bar:
        grounding = TimestampGrounding(packed=packed, prior=context.prior)
        result = score_file(
            rewards, grounding, source, out, on_row=bar.update,
            on_bad=lambda number, reason: _report(source, number, reason),
        )  # fmt: skip
    errored = sum(counts.get("errored", 0) for counts in result.not_scored.values())
    if as_json:
        print(json.dumps(to_json(result)))
    else:
        print_summary(result, out)
    return 1 if result.bad_rows or errored else 0


def _reward(name: str, packed: str, context: RewardContext) -> Reward:
    if ":" in name:
        return build_reward(name.rpartition(":")[2], RewardSpec(path=name), context)
    if name not in REWARDS:
        raise ValueError(
            f"--reward {name}: unknown; known: {', '.join(REWARDS)}, or package.module:function"
        )
    options = {"packed": packed} if name in PACKED_AWARE else {}
    return build_reward(name, RewardSpec(options=options), context)


def _audio_text(head: Path | None, checkpoint: str | None) -> AudioTextScorer:
    if head is None:
        raise ValueError("--reward audio_text_grounding: give --head, the folder of a trained head")
    from posttrain.model.audio_text_model import AudioTextModel

    return AudioTextModel(str(head), checkpoint)


def _evidence(checkpoint: str | None) -> AnswerScorer:
    if checkpoint is None:
        raise ValueError("--reward evidence_ablation: give --checkpoint, the model that answered")
    from posttrain.model.silenced import SilencedAnswers

    return SilencedAnswers(checkpoint)


def _report(source: Path, number: int, reason: str) -> None:
    tqdm.write(f"{source}:{number}: {reason}", file=sys.stderr)


def to_json(result: ScoredFile) -> dict[str, Any]:
    return {
        "rows": result.num_rows,
        "bad_rows": [{"line": number, "reason": reason} for number, reason in result.bad_rows],
        "not_scored": result.not_scored,
        "summary": result.summary,
    }


def print_summary(result: ScoredFile, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.num_rows} rows scored -> {out}")
    for column in ("", "n", "mean", "95 % interval", "median"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in result.summary.items():
        low, high = score["ci95"]
        median = f"{score['median']:.3f}" if "median" in score else ""
        table.add_row(
            name, str(score["n"]), f"{score['mean']:.3f}", f"{low:.3f} to {high:.3f}", median
        )
    console = Console()
    console.print(table)
    for name, counts in result.not_scored.items():
        console.print(f"{name}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    if result.bad_rows:
        lines = ", ".join(str(number) for number, _ in result.bad_rows[:MAX_SHOWN])
        more = ", ..." if len(result.bad_rows) > MAX_SHOWN else ""
        console.print(f"{len(result.bad_rows)} bad rows left out, lines {lines}{more}")

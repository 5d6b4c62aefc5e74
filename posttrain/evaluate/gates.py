"""Gates: what a run must show on evaluated rows before its checkpoint counts.

before, after of a source --> relative gain or loss against each limit --> passed, or why not
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.evaluate.row_metrics import LOWER_IS_BETTER
from posttrain.schema import GateConfig


@dataclass(frozen=True)
class GateResult:
    """One gate's outcome.

    Attributes:
        before, after: the metric on the gate's source.
        broken: one line for each limit that was not kept; () when passed.
    """

    name: str
    source: str
    metric: str
    before: float
    after: float
    broken: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.broken

    def line(self) -> str:
        """For people."""
        what = f"{self.name}: {self.metric} of {self.source} {self.before:.4g} -> {self.after:.4g}"
        return f"{what}, {'; '.join(self.broken)}" if self.broken else f"{what}, passed"


def judge_gate(
    name: str, gate: GateConfig, before: Mapping[str, float], after: Mapping[str, float]
) -> GateResult:
    """Compares the metric's values with the gate's limits.

    Args:
        before, after: metrics of the source, as `held_out.means` gives them.

    Raises:
        ValueError: the source has no such metric.
    """
    if gate.metric not in before or gate.metric not in after:
        raise ValueError(
            f"gates.{name}.metric={gate.metric}: {gate.source} has {', '.join(before)}"
        )
    old, new = before[gate.metric], after[gate.metric]
    sign = -1.0 if gate.metric in LOWER_IS_BETTER else 1.0
    gain = sign * (new - old)
    relative = gain / abs(old) if old else math.copysign(math.inf, gain) if gain else 0.0
    broken = []
    if gate.min_relative_gain is not None and not relative >= gate.min_relative_gain:
        broken.append(f"gain of {relative:.1%}, {gate.min_relative_gain:.1%} demanded")
    if gate.max_relative_loss is not None and not -relative <= gate.max_relative_loss:
        broken.append(f"loss of {-relative:.1%}, {gate.max_relative_loss:.1%} allowed")
    if gate.max_loss is not None and not -gain <= gate.max_loss:
        broken.append(f"loss of {-gain:.4g}, {gate.max_loss:g} allowed")
    if gate.worst is not None and not sign * new >= sign * gate.worst:
        broken.append(f"{'at most' if sign < 0 else 'at least'} {gate.worst:g} demanded")
    return GateResult(name, gate.source, gate.metric, old, new, tuple(broken))


def judge_gates(
    gates: Mapping[str, GateConfig],
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
) -> list[GateResult]:
    """All gates, in the recipe's order; `before` and `after` are metrics by source."""
    return [
        judge_gate(name, gate, before[gate.source], after[gate.source])
        for name, gate in gates.items()
    ]


def failures(results: Sequence[GateResult]) -> str:
    """One line with every gate that was not passed; "" when all were."""
    return "; ".join(result.line() for result in results if not result.passed)

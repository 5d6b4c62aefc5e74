"""What a person sees while a run goes on: one bar, notes above it, a table at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from posttrain.types import RewardResult, RewardStatus


class Progress:
    """Bar with reward, KL, tokens a second and the time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: Any = None
        self._console = Console()

    def track(self, start: int, stop: int) -> Iterator[int]:
        with tqdm(total=stop, initial=start, desc=self._name, dynamic_ncols=True) as self._bar:
            for step in range(start, stop):
                yield step
                self._bar.update(1)
        self._bar = None

    def show(self, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_postfix(
                reward=f"{metrics['reward/mean']:.3f}",
                kl=f"{metrics['train/kl']:.4f}",
                tok_s=f"{metrics['rollout/tokens_per_s']:.0f}",
            )

    def warn_of_errors(self, results: Sequence[Sequence[RewardResult]], step: int) -> None:
        """Says how many completions of the step could not be scored, and why the first."""
        reasons = [r.reason for line in results for r in line if r.status is RewardStatus.ERRORED]
        if reasons:
            self._write(f"step {step}: {len(reasons)} completions not scored; first: {reasons[0]}")

    def note(self, title: str, values: Mapping[str, float]) -> None:
        self._write(
            f"{title}: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        )

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            self._console.print(line)

    def table(self, summary: Mapping[str, Any]) -> None:
        """Held-out scores before and after, with the paired interval."""
        scores = summary.get("held_out")
        if not scores or "paired_diff" not in scores:
            return
        table = Table(title=f"{summary['run']}: held-out, n={scores['n']}, greedy")
        for column in ("", "before", "after"):
            table.add_column(column)
        for name in scores["before"]:
            table.add_row(name, f"{scores['before'][name]:.3f}", f"{scores['after'][name]:.3f}")
        low, high = scores["paired_diff"]["ci95"]
        mean = scores["paired_diff"]["mean"]
        table.caption = f"miou {mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]"
        self._console.print(table)

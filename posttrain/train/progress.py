"""What a person sees while a run goes on: one bar, notes above it, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from posttrain.types import RewardResult, RewardStatus

SHOWN = ("train/loss", "train/rewards/accuracies", "train/rewards/margins")
SHOWN_OF_EACH_SOURCE = ("_loss", "_ranked_wrong")  # everything else is in metrics.jsonl


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

    @contextmanager
    def bar(self, start: int, stop: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A bar that another process advances: call with the step and its metrics."""
        with tqdm(total=stop, initial=start, desc=self._name, dynamic_ncols=True) as self._bar:

            def advance(step: int, metrics: Mapping[str, float]) -> None:
                held_out = {k: v for k, v in metrics.items() if k.startswith("held_out/")}
                if held_out:
                    shown = {k.removeprefix("held_out/"): v for k, v in held_out.items()
                             if k.endswith(SHOWN_OF_EACH_SOURCE)}  # fmt: skip
                    self.note(f"step {step}", shown)
                    self._bar.set_postfix_str("")  # how far the scoring was
                    return
                self._bar.update(step - self._bar.n)
                shown = {k.removeprefix("train/"): v for k, v in metrics.items() if k in SHOWN}
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()})

            yield advance
        self._bar = None

    def scoring(self, what: str) -> None:
        """Says that held-out rows are being scored; the time left is that of the steps alone."""
        if what:
            self._bar.set_postfix_str(what)
            self._bar.unpause()

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
            self.write(f"step {step}: {len(reasons)} completions not scored; first: {reasons[0]}")

    def note(self, title: str, values: Mapping[str, float]) -> None:
        self.write(
            f"{title}: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        )

    def write(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self, summary: Mapping[str, Any]) -> None:
        """Held-out scores before and after, with the paired interval."""
        scores = summary.get("held_out")
        if not scores or "paired_diff" not in scores:
            return
        metric = scores["metric"]
        table = Table(title=f"{summary['run']}: held-out, n={scores['n']}, greedy")
        for column in ("", "before", "after"):
            table.add_column(column)
        for name in scores["before"]:
            values = (scores[when].get(name, float("nan")) for when in ("before", "after"))
            table.add_row(name, *(f"{value:.3f}" for value in values))
        low, high = scores["paired_diff"]["ci95"]
        mean = scores["paired_diff"]["mean"]
        table.caption = f"{metric} {mean:+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]"
        self._console.print(table)

"""Which rows a step trains on: a pure function of (seed, step), so a position is a number."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.data.rows import Row, read_rows
from posttrain.schema import DataSource, Recipe


@dataclass(frozen=True)
class PromptBatches:
    """Training rows in epoch order, and the evaluation rows.

    Attributes:
        held_out: name -> rows, `data.held_out` first, then `data.reported`.
    """

    rows: tuple[Row, ...]
    held_out: Mapping[str, Sequence[Row]]
    prompts_per_step: int
    seed: int
    shuffle: bool

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PromptBatches:
        """Reads and checks every row before anything heavy starts.

        Raises:
            ValueError: as `read_rows`; no row left; an evaluation row that is trained on.
        """
        rows = [row for source in recipe.data.train.values() for row in _read(source)]
        limit = recipe.evaluation.num_rows
        sources = recipe.data.held_out | recipe.data.reported
        held_out = {name: _read(source)[:limit] for name, source in sources.items()}
        trained = {row.id for row in rows}
        for name, evaluated in held_out.items():
            if leaked := [row.id for row in evaluated if row.id in trained]:
                raise ValueError(f"data.held_out.{name}: row {leaked[0]!r} is in data.train too")
        return cls(
            tuple(rows), held_out, recipe.training.prompts_per_step, recipe.seed,
            recipe.data.shuffle,
        )  # fmt: skip

    def batch(self, step: int) -> list[Row]:
        """The rows of step `step` (from 0); epochs are reshuffled and run into each other."""
        first = step * self.prompts_per_step
        picked = []
        for position in range(first, first + self.prompts_per_step):
            epoch, index = divmod(position, len(self.rows))
            picked.append((epoch, self.rows[self._order(epoch)[index]]))
        return _distinct(picked)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        if self.shuffle:
            random.Random(f"posttrain/epoch/{self.seed}/{epoch}").shuffle(order)
        return order

    @property
    def provenance(self) -> str:
        """ "recorded", or "synthesised" as soon as one row's source says so."""
        synthetic = any("synthesised" in row.source for row in self.rows)
        return "synthesised" if synthetic else "recorded"


def _distinct(picked: Sequence[tuple[int, Row]]) -> list[Row]:
    rows = [row for _, row in picked]
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(
            f"training.prompts_per_step={len(rows)}: more than the rows of one epoch; "
            "lower it or add rows"
        )
    return rows


def _read(source: DataSource) -> list[Row]:
    rows = read_rows(source.path)
    if source.tasks is not None:
        rows = [row for row in rows if row.task.value in source.tasks]
        if not rows:
            raise ValueError(f"rows {source.path}: none of tasks {source.tasks}")
    if any(row.audio is None for row in rows):
        bad = next(row.id for row in rows if row.audio is None)
        raise ValueError(f"rows {source.path}: row {bad!r} has no audio; grpo needs a clip a row")
    return rows[: source.max_rows]

"""Which rows a step trains on: a pure function of (seed, step), so a position is a number."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.data.audio import AUDIO_TOKENS_PER_S, audio_duration_s
from posttrain.data.rows import Row, read_rows
from posttrain.schema import DataSource, Recipe

DURATION_SLACK_S = 0.1


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
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)

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
        _check_distinct(rows, recipe.training.prompts_per_step)
        for part in (rows, *held_out.values()):
            _check_clips(part)
            _check_lengths(part, recipe)
        trained = {row.id for row in rows}
        for name, evaluated in held_out.items():
            where = "held_out" if name in recipe.data.held_out else "reported"
            if leaked := [row.id for row in evaluated if row.id in trained]:
                raise ValueError(f"data.{where}.{name}: row {leaked[0]!r} is in data.train too")
        return cls(
            tuple(rows), held_out, recipe.training.prompts_per_step, recipe.seed,
            recipe.data.shuffle,
        )  # fmt: skip

    def batch(self, step: int) -> list[Row]:
        """The rows of step `step` (from 0), all different; epochs run into each other."""
        first = step * self.prompts_per_step
        positions = range(first, first + self.prompts_per_step)
        places = (divmod(position, len(self.rows)) for position in positions)
        return [self.rows[self._order(epoch)[index]] for epoch, index in places]

    def _order(self, epoch: int) -> list[int]:
        """Row numbers of an epoch; those that its first step has seen already come last."""
        if epoch in self._orders:
            return self._orders[epoch]
        order = list(range(len(self.rows)))
        if self.shuffle:
            random.Random(f"posttrain/epoch/{self.seed}/{epoch}").shuffle(order)
        overhang = epoch * len(self.rows) % self.prompts_per_step
        if overhang:
            seen = set(self._order(epoch - 1)[-overhang:])
            order = [i for i in order if i not in seen] + [i for i in order if i in seen]
        self._orders[epoch] = order
        return order

    @property
    def provenance(self) -> str:
        """ "recorded", or "synthesised" as soon as one row's source says so."""
        synthetic = any("synthesised" in row.source for row in self.rows)
        return "synthesised" if synthetic else "recorded"


def _check_distinct(rows: Sequence[Row], prompts_per_step: int) -> None:
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"data.train: id {twice!r} stands in two sources; rename one")
    if prompts_per_step > len(rows):
        raise ValueError(
            f"training.prompts_per_step={prompts_per_step}: more than the {len(rows)} rows of "
            "data.train; lower it or add rows"
        )


def _check_clips(rows: Sequence[Row]) -> None:
    """Every clip is there and as long as its row says, before anything heavy starts."""
    for row in rows:
        if not Path(str(row.audio)).is_file():
            raise FileNotFoundError(f"row {row.id!r}: audio {row.audio}: no such file")
        duration_s = audio_duration_s(str(row.audio))
        if abs(duration_s - (row.duration_s or 0.0)) > DURATION_SLACK_S:
            raise ValueError(
                f"row {row.id!r}: audio {row.audio} lasts {duration_s:.2f} s, duration_s says "
                f"{row.duration_s:.2f}; correct the row"
            )


def _check_lengths(rows: Sequence[Row], recipe: Recipe) -> None:
    """No clip is longer than the recipe allows; workers know the processor's own limit."""
    limit_s = recipe.model.max_audio_len_s
    max_model_len = recipe.rollout.max_model_len
    for row in rows:
        seconds = row.duration_s or 0.0
        if limit_s is not None and seconds > limit_s:
            raise ValueError(
                f"row {row.id!r}: audio {row.audio} lasts {seconds:.1f} s, "
                f"model.max_audio_len_s={limit_s:g}; cut the clip or raise the limit"
            )
        tokens = int(seconds * AUDIO_TOKENS_PER_S) + recipe.sampling.max_completion_length
        if max_model_len is not None and tokens > max_model_len:
            raise ValueError(
                f"row {row.id!r}: {seconds:.1f} s of audio and sampling.max_completion_length are "
                f"{tokens} tokens, rollout.max_model_len={max_model_len}; raise it or cut the clip"
            )


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

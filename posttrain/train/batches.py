"""Which rows a step trains on: a pure function of (seed, step), so a position is a number."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from posttrain.data.audio import AUDIO_TOKENS_PER_S, audio_duration_s
from posttrain.data.pairs import Pair, read_pairs
from posttrain.data.rows import Row, read_rows
from posttrain.schema import DataSource, Recipe

DURATION_SLACK_S = 0.1


@dataclass(frozen=True)
class StepOrder:
    """Which of `num_items` a step trains on; epochs run into each other.

    Attributes:
        per_step: items of a step, at most `num_items`.
    """

    num_items: int
    per_step: int
    seed: int
    shuffle: bool
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def step(self, step: int) -> list[int]:
        """Item numbers of step `step` (from 0), all different."""
        positions = range(step * self.per_step, (step + 1) * self.per_step)
        places = (divmod(position, self.num_items) for position in positions)
        return [self._order(epoch)[index] for epoch, index in places]

    def _order(self, epoch: int) -> list[int]:
        """Item numbers of an epoch; those that its first step has seen already come last."""
        if epoch in self._orders:
            return self._orders[epoch]
        order = list(range(self.num_items))
        if self.shuffle:
            random.Random(f"posttrain/epoch/{self.seed}/{epoch}").shuffle(order)
        overhang = epoch * self.num_items % self.per_step
        if overhang:
            seen = set(self._order(epoch - 1)[-overhang:])
            order = [i for i in order if i not in seen] + [i for i in order if i in seen]
        self._orders[epoch] = order
        return order


@dataclass(frozen=True)
class PromptBatches:
    """Training rows in epoch order, and the evaluation rows.

    Attributes:
        held_out: name -> rows, `data.held_out` first, then `data.reported`.
    """

    rows: tuple[Row, ...]
    held_out: Mapping[str, Sequence[Row]]
    order: StepOrder

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PromptBatches:
        """Reads and checks every row before anything heavy starts.

        Raises:
            ValueError: as `read_rows`; no row left; an evaluation row that is trained on.
        """
        rows, held_out = training_rows(recipe)
        for row in (*rows, *(row for part in held_out.values() for row in part)):
            if row.audio is None:
                raise ValueError(f"row {row.id!r} has no audio; kind={recipe.kind} needs a clip")
        if recipe.training.prompts_per_step > len(rows):
            raise ValueError(
                f"training.prompts_per_step={recipe.training.prompts_per_step}: more than the "
                f"{len(rows)} rows of data.train; lower it or add rows"
            )
        per_step, shuffle = recipe.training.prompts_per_step, recipe.data.shuffle
        return cls(tuple(rows), held_out, StepOrder(len(rows), per_step, recipe.seed, shuffle))

    def batch(self, step: int) -> list[Row]:
        """The rows of step `step` (from 0), all different; epochs run into each other."""
        return [self.rows[number] for number in self.order.step(step)]

    @property
    def provenance(self) -> str:
        """See `provenance_of`."""
        return provenance_of(self.rows)


def training_rows(recipe: Recipe, *, check: bool = True) -> tuple[list[Row], dict[str, list[Row]]]:
    """Rows of data.train and data.replay, and those of held_out and reported sources.

    Args:
        check: every clip and length as well; False where another process has done it.

    Raises:
        ValueError: as `read_rows`; no row left; an evaluation row that is trained on.
    """
    rows = [row for source in recipe.data.train.values() for row in _read(source)]
    rows += replayed_rows(recipe, len(rows))
    held_out = held_out_rows(recipe, check=check)
    if not check:
        return rows, held_out
    _check_distinct(rows)
    check_clips(rows)
    _check_lengths(rows, recipe)
    trained = {row.id for row in rows}
    for name, evaluated in held_out.items():
        if leaked := [row.id for row in evaluated if row.id in trained]:
            where = f"data.{_section(name, recipe)}.{name}"
            raise ValueError(f"{where}: row {leaked[0]!r} is in data.train too")
    return rows, held_out


def question_rows(recipe: Recipe) -> list[Row]:
    """Rows of data.train alone, for a teacher to answer.

    Raises:
        ValueError, FileNotFoundError: as `training_rows`, replayed and evaluated rows included.
    """
    rows, _ = training_rows(recipe)
    asked = sum(len(_read(source)) for source in recipe.data.train.values())
    return rows[:asked]  # what is replayed comes last


def replayed_rows(recipe: Recipe, num_target: int) -> list[Row]:
    """Rows of data.replay, as many as make `data.replay_ratio` of all.

    Which ones depends on the seed alone; where there are too few, they come again under another id.
    """
    ratio = recipe.data.replay_ratio
    if not ratio:
        return []
    pool = [row for source in recipe.data.replay.values() for row in _read(source)]
    wanted = round(num_target * ratio / (1 - ratio))
    random.Random(f"posttrain/replay/{recipe.seed}").shuffle(pool)
    times = -(-wanted // len(pool))
    copies = [replace(row, id=f"{row.id}#{n}") if n else row for n in range(times) for row in pool]
    return copies[:wanted]


def training_pairs(
    recipe: Recipe, *, check: bool = True
) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """Preference pairs of data.train, and those of data.held_out_pairs.

    Args:
        check: every clip and length as well; False where another process has done it.

    Raises:
        ValueError, FileNotFoundError: as `read_pairs`; a clip that is missing; a held-out pair, or
            an evaluated row, that is trained on.
    """
    pairs = [pair for source in recipe.data.train.values() for pair in _read_pairs(source)]
    held_out = {n: _read_pairs(source) for n, source in recipe.data.held_out_pairs.items()}
    if not check:
        return pairs, held_out
    everything = [*pairs, *(pair for part in held_out.values() for pair in part)]
    rows = list({pair.row.audio: pair.row for pair in everything}.values())
    check_clips(rows)
    _check_lengths(rows, recipe)
    trained = {pair.id for pair in pairs}
    for name, part in held_out.items():
        if leaked := [pair.id for pair in part if pair.id in trained]:
            raise ValueError(f"data.held_out_pairs.{name}: pair {leaked[0]!r} is in data.train too")
    asked = {_question(pair.row) for pair in pairs}
    for name, evaluated in held_out_rows(recipe).items():
        if same := [row.id for row in evaluated if _question(row) in asked]:
            raise ValueError(
                f"data.{_section(name, recipe)}.{name}: row {same[0]!r} asks what a pair of "
                "data.train asks of the same clip; make the pairs from other rows"
            )
    known = {row.audio for row in rows}
    for pair in everything:
        other = pair.rejected_audio
        if other is None or other in known:
            continue
        if not Path(other).is_file():
            raise FileNotFoundError(f"pair {pair.id!r}: rejected_audio {other}: no such file")
        _check_lengths([replace(pair.row, audio=other, duration_s=audio_duration_s(other))], recipe)
        known.add(other)
    return pairs, held_out


def held_out_rows(recipe: Recipe, *, check: bool = True) -> dict[str, list[Row]]:
    """Name -> rows that are evaluated, `data.held_out` first, then `data.reported`."""
    sources = recipe.data.held_out | recipe.data.reported
    held_out = {n: _read(source)[: recipe.evaluation.num_rows] for n, source in sources.items()}
    for part in held_out.values() if check else ():
        check_clips(part)
        _check_lengths(part, recipe)
    return held_out


def rows_with_loss(recipe: Recipe, held_out: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Of every evaluated source the rows whose loss is reported: the first that have an answer."""
    return {
        name: [row for row in part if row.answer.strip()][: recipe.evaluation.loss_rows]
        for name, part in held_out.items()
    }


def provenance_of(rows: Sequence[Row]) -> str:
    """ "recorded", or "synthesised" as soon as one row's source says so."""
    return "synthesised" if any("synthesised" in row.source for row in rows) else "recorded"


def _question(row: Row) -> tuple[str | None, str]:
    return row.audio, json.dumps([dict(message) for message in row.prompt], sort_keys=True)


def _section(name: str, recipe: Recipe) -> str:
    """Where an evaluated source is named."""
    return "held_out" if name in recipe.data.held_out else "reported"


def _check_distinct(rows: Sequence[Row]) -> None:
    counts = Counter(row.id for row in rows)
    if len(counts) < len(rows):
        [(twice, _)] = counts.most_common(1)
        raise ValueError(f"data.train: id {twice!r} stands in two sources; rename one")


def check_clips(rows: Sequence[Row]) -> None:
    """Every clip is there and as long as its row says, before anything heavy starts."""
    lengths_s: dict[str, float] = {}
    for row in rows:
        if row.audio is None:
            continue
        if row.audio not in lengths_s:
            if not Path(row.audio).is_file():
                raise FileNotFoundError(f"row {row.id!r}: audio {row.audio}: no such file")
            lengths_s[row.audio] = audio_duration_s(row.audio)
        duration_s = lengths_s[row.audio]
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


def _read_pairs(source: DataSource) -> list[Pair]:
    pairs = read_pairs(source.path)
    if source.tasks is not None:
        pairs = [pair for pair in pairs if pair.row.task.value in source.tasks]
        if not pairs:
            raise ValueError(f"pairs {source.path}: none of tasks {source.tasks}")
    return pairs[: source.max_rows]


def _read(source: DataSource) -> list[Row]:
    rows = read_rows(source.path)
    if source.tasks is not None:
        rows = [row for row in rows if row.task.value in source.tasks]
        if not rows:
            raise ValueError(f"rows {source.path}: none of tasks {source.tasks}")
    return rows[: source.max_rows]

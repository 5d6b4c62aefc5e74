"""Which rank forwards what: micro-batches by token budget, balanced by work. Pure.

    groups --split where too large--> parts --packed together--> micro-batches --dealt--> ranks

A part is a prompt with some of its completions. All ranks get equally many micro-batches, as ZeRO's
collectives need; a loss that is divided by a denominator of the whole batch has the same gradient
however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MicroBatch = tuple["Part", ...]


@dataclass(frozen=True)
class Part:
    """Completions of one group that are forwarded behind one copy of its prompt.

    Attributes:
        group: number of the group.
        completions: their numbers in it.
        num_tokens: forwarded, the prompt counted once.
        cost: work of it, in any unit.
    """

    group: int
    completions: tuple[int, ...]
    num_tokens: int
    cost: float


@dataclass(frozen=True)
class Planner:
    """How groups are cut.

    Attributes:
        cost: (P, lengths forwarded) -> work of a part.
        budget: most tokens of a micro-batch; None: one part is one micro-batch. A completion that
            is longer with its prompt alone still gets a micro-batch, of its own.
        dense: one completion a part and a micro-batch, as the dense path forwards them.
    """

    cost: Callable[[int, Sequence[int]], float]
    budget: int | None = None
    dense: bool = False

    def plan(
        self, groups: Sequence[tuple[int, Sequence[int]]], num_ranks: int
    ) -> list[list[MicroBatch]]:
        """Micro-batches of every rank, equally many each.

        Args:
            groups: (P, tokens of every completion).
            num_ranks: sequences forwarded at once; divides the number of groups.
        """
        bins = self._packed([part for i in range(len(groups)) for part in self._cut(groups, i)])
        while len(bins) % num_ranks:
            splittable = [one for one in bins if _num_completions(one) > 1]
            largest = max(splittable, key=_cost)
            bins.remove(largest)
            bins += self._halves(largest, groups)
        return _dealt(bins, num_ranks)

    def _cut(self, groups: Sequence[tuple[int, Sequence[int]]], index: int) -> list[Part]:
        num_prompt, lengths = groups[index]
        parts: list[list[int]] = [[]]
        room = 0
        for number, length in enumerate(lengths):
            full = self.budget is not None and length - 1 > room
            if parts[-1] and (full or self.dense):
                parts.append([])
            if not parts[-1] and self.budget is not None:
                room = self.budget - num_prompt
            parts[-1].append(number)
            room -= length - 1
        return [self._part(groups, index, numbers) for numbers in parts]

    def _part(
        self, groups: Sequence[tuple[int, Sequence[int]]], index: int, numbers: Sequence[int]
    ) -> Part:
        num_prompt, lengths = groups[index]
        forwarded = [lengths[i] - 1 for i in numbers]
        cost = self.cost(num_prompt, forwarded)
        return Part(index, tuple(numbers), num_prompt + sum(forwarded), cost)

    def _packed(self, parts: Sequence[Part]) -> list[MicroBatch]:
        """First fit, largest first."""
        if self.budget is None or self.dense:
            return [(part,) for part in parts]
        bins: list[list[Part]] = []
        for part in sorted(parts, key=lambda p: -p.num_tokens):
            for one in bins:
                if sum(p.num_tokens for p in one) + part.num_tokens <= self.budget:
                    one.append(part)
                    break
            else:
                bins.append([part])
        return [tuple(one) for one in bins]

    def _halves(
        self, batch: MicroBatch, groups: Sequence[tuple[int, Sequence[int]]]
    ) -> list[MicroBatch]:
        if len(batch) > 1:
            middle = len(batch) // 2
            return [batch[:middle], batch[middle:]]
        (part,) = batch
        middle = len(part.completions) // 2
        pieces = (part.completions[:middle], part.completions[middle:])
        return [(self._part(groups, part.group, piece),) for piece in pieces]


def _dealt(bins: Sequence[MicroBatch], num_ranks: int) -> list[list[MicroBatch]]:
    """The costliest goes to the rank with the least work that still has room."""
    each = len(bins) // num_ranks
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for batch in sorted(bins, key=_cost, reverse=True):
        open_ranks = [rank for rank in ranks if len(rank) < each]
        min(open_ranks, key=lambda rank: sum(map(_cost, rank))).append(batch)
    return ranks


def _cost(batch: MicroBatch) -> float:
    return sum(part.cost for part in batch)


def _num_completions(batch: MicroBatch) -> int:
    return sum(len(part.completions) for part in batch)


def balance(ranks: Sequence[Sequence[MicroBatch]]) -> float:
    """Mean work of a rank over that of the busiest: 1 is perfect."""
    work = [sum(map(_cost, rank)) for rank in ranks]
    return sum(work) / (len(work) * max(work)) if max(work) else 1.0

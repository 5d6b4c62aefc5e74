"""What a supervised run learns from: items in, packed groups and a loss out.

    sft   rows about one clip --> one group: the clip once, every row's own tokens behind it
    dpo   a pair --> one group with both answers; where the clips differ, two groups

An objective knows nothing of optimizers, ranks or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.algorithm.preference import preference_loss
from posttrain.data.conversations import Conversation, conversation, row_messages, shared_context
from posttrain.data.pairs import Pair, messages_of
from posttrain.data.rows import Row
from posttrain.model.policy import GroupTensors
from posttrain.schema import DpoConfig
from posttrain.train.audio_inputs import AudioInputs

Logprobs = list[tuple[Tensor, Tensor]]  # (G, T) log-probabilities and entropies of every group
Forward = Callable[[Sequence[GroupTensors]], Logprobs]


@dataclass(frozen=True)
class Batch:
    """What a rank forwards at once.

    Attributes:
        groups: packed together.
        num_items: tokens (sft) or pairs (dpo) that the loss is a mean over.
        details: what the objective needs to read the groups again.
    """

    groups: list[GroupTensors]
    num_items: int
    details: Any = None


class Objective(Protocol):
    """Collates items and turns log-probabilities into a loss.

    Attributes:
        held_out: items of every held-out set.
    """

    held_out: Mapping[str, Sequence[Any]]

    def items(self) -> int:
        """How many there are to train on."""
        ...

    def collate(self, numbers: Sequence[int], name: str | None = None) -> Batch:
        """Items of the training set, or of the held-out set `name`, as one batch."""
        ...

    def loss(
        self, batch: Batch, forward: Forward, reference: Forward, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss over the denominator, metrics as sums; those of `num_items` are divided by it)."""
        ...


def bundle_rows(rows: Sequence[Row], rows_per_clip: int) -> list[tuple[Row, ...]]:
    """Rows that share clip and system message, in order of first appearance, at most so many."""
    open_bundles: dict[Any, list[Row]] = {}
    bundles: list[list[Row]] = []
    for row in rows:
        key = shared_context(row) if row.audio is not None else row.id
        bundle = open_bundles.get(key)
        if bundle is None or len(bundle) >= rows_per_clip:
            bundle = open_bundles[key] = []
            bundles.append(bundle)
        bundle.append(row)
    return [tuple(bundle) for bundle in bundles]


class SftObjective:
    """Mean negative log-likelihood a token that the assistant wrote, as TRL's `nll`."""

    def __init__(
        self, rows: Sequence[Row], held_out: Mapping[str, Sequence[Row]], rows_per_clip: int,
        audio: AudioInputs,
    ) -> None:  # fmt: skip
        self.bundles = bundle_rows(rows, rows_per_clip)
        self.held_out: Mapping[str, Sequence[Any]] = {
            name: bundle_rows(part, rows_per_clip) for name, part in held_out.items()
        }
        self.audio = audio

    def items(self) -> int:
        return len(self.bundles)

    def collate(self, numbers: Sequence[int], name: str | None = None) -> Batch:
        bundles = self.bundles if name is None else self.held_out[name]
        groups = [self._group(bundles[i]) for i in numbers]
        return Batch(groups, sum(int(group.wanted_GT.sum()) for group in groups))

    def _group(self, bundle: Sequence[Row]) -> GroupTensors:
        fields, num_tokens = self.audio.fields(bundle[0].audio)
        talks = [conversation(self.audio.processor, row_messages(r), num_tokens) for r in bundle]
        if any(not torch.equal(t.prefix_P, talks[0].prefix_P) for t in talks):
            raise ValueError(
                f"row {bundle[0].id!r}: rows about one clip tokenise differently up to its end; "
                "the chat template must put the clip before the text: set training.rows_per_clip=1"
            )
        return group_of(talks[0].prefix_P, talks, fields)

    def loss(
        self, batch: Batch, forward: Forward, reference: Forward, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = forward(batch.groups)
        nll = -torch.stack([logprobs.sum() for logprobs, _ in outputs]).sum()
        entropy = torch.stack([entropy.sum() for _, entropy in outputs]).sum()
        return nll / denominator, {"nll": nll.detach(), "entropy": entropy}


class DpoObjective:
    """Direct preference optimisation; the answers of a pair share their prompt's forward pass."""

    def __init__(
        self, pairs: Sequence[Pair], held_out: Mapping[str, Sequence[Pair]], config: DpoConfig,
        audio: AudioInputs,
    ) -> None:  # fmt: skip
        self.pairs = pairs
        self.held_out: Mapping[str, Sequence[Any]] = held_out
        self.config, self.audio = config, audio

    def items(self) -> int:
        return len(self.pairs)

    def collate(self, numbers: Sequence[int], name: str | None = None) -> Batch:
        pairs = self.pairs if name is None else self.held_out[name]
        chosen = [pairs[i] for i in numbers]
        groups: list[GroupTensors] = []
        places: list[tuple[tuple[int, int], tuple[int, int]]] = []  # (group, completion) of both
        for pair in chosen:
            first = len(groups)
            if pair.rejected_audio is None:
                groups.append(self._group(pair, pair.row.audio, pair.row.answer, pair.rejected))
                places.append(((first, 0), (first, 1)))
            else:
                groups.append(self._group(pair, pair.row.audio, pair.row.answer))
                groups.append(self._group(pair, pair.rejected_audio, pair.rejected))
                places.append(((first, 0), (first + 1, 0)))
        weights = torch.tensor([pair.weight for pair in chosen])
        return Batch(groups, len(chosen), (places, weights))

    def _group(self, pair: Pair, audio: str | None, *answers: str) -> GroupTensors:
        fields, num_tokens = self.audio.fields(audio)
        talks = []
        for answer in answers:
            talk = conversation(self.audio.processor, messages_of(pair, answer), num_tokens)
            # earlier turns are the prompt's: the last answer alone is compared
            talks.append(Conversation(talk.prefix_P, talk.ids_T, last_run(talk.assistant_T)))
        return group_of(talks[0].prefix_P, talks, fields)

    def loss(
        self, batch: Batch, forward: Forward, reference: Forward, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        places, weights_B = batch.details
        with torch.no_grad():
            references = reference(batch.groups)
        outputs = forward(batch.groups)
        device = outputs[0][0].device

        def answers(side: int, of: Logprobs) -> Tensor:
            return torch.stack([of[place[side][0]][0][place[side][1]].sum() for place in places])

        def lengths(side: int) -> Tensor:
            masks = [batch.groups[p[side][0]].wanted_GT[p[side][1]] for p in places]
            return torch.stack([mask.sum() for mask in masks]).float().to(device)

        return preference_loss(
            answers(0, outputs), answers(1, outputs),
            answers(0, references), answers(1, references),
            chosen_lengths_B=lengths(0), rejected_lengths_B=lengths(1),
            weights_B=weights_B.to(device), denominator=denominator,
            loss_type=self.config.loss_type, beta=self.config.beta,
            sft_weight=self.config.sft_weight,
        )  # fmt: skip


def group_of(
    prefix_P: Tensor, talks: Sequence[Conversation], fields: dict[str, Tensor]
) -> GroupTensors:
    """Conversations behind one prefix; log-probabilities are wanted of the assistant's tokens."""
    longest = max(len(talk.ids_T) for talk in talks)
    ids_GT = torch.zeros(len(talks), longest, dtype=torch.long)
    mask_GT, scored_GT = (torch.zeros(len(talks), longest, dtype=torch.bool) for _ in range(2))
    for i, talk in enumerate(talks):
        ids_GT[i, : len(talk.ids_T)] = talk.ids_T
        mask_GT[i, : len(talk.ids_T)] = True
        scored_GT[i, : len(talk.ids_T)] = talk.assistant_T
    return GroupTensors(prefix_P, ids_GT, mask_GT, scored_GT=scored_GT, **fields)


def last_run(mask_T: Tensor) -> Tensor:
    """The last run of True in a bool (T,) mask, and nothing else."""
    places = mask_T.nonzero().squeeze(1)
    breaks = (places[1:] - places[:-1] > 1).nonzero().squeeze(1)
    first = int(places[breaks[-1] + 1]) if len(breaks) else int(places[0])
    out = torch.zeros_like(mask_T)
    out[first:] = mask_T[first:]
    return out

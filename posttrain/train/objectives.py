"""What a supervised run learns from: items in, packed groups and a loss out.

    sft   rows about one clip --> one group: the clip once, every row's own tokens behind it
    dpo   pairs about one clip --> one group with every answer once; another clip is another group

An objective knows nothing of optimizers, ranks or files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from posttrain.algorithm.preference import preference_loss, ranked_wrong
from posttrain.data.chat import Message
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
    """Collates bundles and turns log-probabilities into a loss.

    Attributes:
        held_out: bundles of every held-out set.
    """

    held_out: Mapping[str, Sequence[Any]]

    def num_bundles(self) -> int:
        """How many there are to train on: rows, or pairs, about one clip."""
        ...

    def collate(self, numbers: Sequence[int], name: str | None = None) -> Batch:
        """Bundles of the training set, or of the held-out set `name`, as one batch."""
        ...

    def loss(
        self, batch: Batch, forward: Forward, reference: Forward, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss over the denominator, sums that `means` makes metrics of)."""
        ...

    def means(self, sums: Mapping[str, float], num_items: float) -> dict[str, float]:
        """Metrics, given sums over all batches and ranks, and the number of their items."""
        ...


Item = TypeVar("Item", Row, Pair)


def bundled(items: Sequence[Item], rows_per_clip: int) -> list[tuple[Item, ...]]:
    """Rows, or pairs, that share clip and system message, in order of first appearance.

    A bundle of pairs has two clips at most: their own and one `rejected_audio`. No bundle holds a
    row twice: what is replayed more than once comes back in other steps.

    Args:
        rows_per_clip: the most of one bundle; what is left opens the next.
    """
    open_bundles: dict[Any, list[Item]] = {}
    bundles: list[list[Item]] = []
    for item in items:
        row = item.row if isinstance(item, Pair) else item
        key = shared_context(row) if row.audio is not None else row.id
        bundle: list[Item] = open_bundles.get(key, [])
        full = len(bundle) >= rows_per_clip or len(_others([*bundle, item])) > 1
        if not bundle or full or any(_says(other) == _says(item) for other in bundle):
            bundle = open_bundles[key] = []
            bundles.append(bundle)
        bundle.append(item)
    return [tuple(bundle) for bundle in bundles]


def _says(item: Row | Pair) -> tuple[Any, ...]:
    """Equal for two rows, or pairs, about one clip that teach the same."""
    if isinstance(item, Pair):
        return (*_says(item.row), item.rejected, item.rejected_audio)
    return item.prompt, item.answer


def _others(items: Sequence[Row | Pair]) -> set[str]:
    """Clips of rejected answers."""
    return {item.rejected_audio for item in items
            if isinstance(item, Pair) and item.rejected_audio is not None}  # fmt: skip


class SftObjective:
    """Mean negative log-likelihood a token that the assistant wrote, as TRL's `nll`."""

    def __init__(
        self, rows: Sequence[Row], held_out: Mapping[str, Sequence[Row]], rows_per_clip: int,
        audio: AudioInputs,
    ) -> None:  # fmt: skip
        self.bundles = bundled(rows, rows_per_clip)
        self.held_out: Mapping[str, Sequence[Any]] = {
            name: bundled(part, rows_per_clip) for name, part in held_out.items()
        }
        self.audio = audio

    def num_bundles(self) -> int:
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

    def means(self, sums: Mapping[str, float], num_items: float) -> dict[str, float]:
        return {name: value / num_items for name, value in sums.items()}


WRONG, PAIRS = "wrong of kind ", "pairs of kind "  # sums that are no means over all pairs


class DpoObjective:
    """Direct preference optimisation: all pairs about a clip share its forward pass."""

    def __init__(
        self, pairs: Sequence[Pair], held_out: Mapping[str, Sequence[Pair]], config: DpoConfig,
        rows_per_clip: int, audio: AudioInputs,
    ) -> None:  # fmt: skip
        self.bundles = bundled(pairs, rows_per_clip)
        self.held_out: Mapping[str, Sequence[Any]] = {
            name: bundled(part, rows_per_clip) for name, part in held_out.items()
        }
        everything = [pair for part in (pairs, *held_out.values()) for pair in part]
        self.kinds = sorted({pair.kind for pair in everything if pair.kind})
        self.config, self.audio = config, audio

    def num_bundles(self) -> int:
        return len(self.bundles)

    def collate(self, numbers: Sequence[int], name: str | None = None) -> Batch:
        bundles = self.bundles if name is None else self.held_out[name]
        pairs = [pair for i in numbers for pair in bundles[i]]
        answers = _AnswersOnce(self.audio)
        places = [
            (
                answers.place(pair.row.audio, messages_of(pair, pair.row.answer)),
                answers.place(
                    pair.rejected_audio or pair.row.audio, messages_of(pair, pair.rejected)
                ),
            )
            for pair in pairs
        ]
        return Batch(answers.groups(), len(pairs), (pairs, places))

    def loss(
        self, batch: Batch, forward: Forward, reference: Forward, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, places = batch.details
        with torch.no_grad():
            references = reference(batch.groups)
        outputs = forward(batch.groups)
        device = outputs[0][0].device

        def answers(side: int, of: Logprobs) -> Tensor:
            return torch.stack([of[place[side][0]][0][place[side][1]].sum() for place in places])

        def lengths(side: int) -> Tensor:
            masks = [batch.groups[p[side][0]].wanted_GT[p[side][1]] for p in places]
            return torch.stack([mask.sum() for mask in masks]).float().to(device)

        chosen_B, rejected_B = answers(0, outputs), answers(1, outputs)
        lengths_B = {"chosen_lengths_B": lengths(0), "rejected_lengths_B": lengths(1)}
        loss, metrics = preference_loss(
            chosen_B, rejected_B, answers(0, references), answers(1, references), **lengths_B,
            weights_B=torch.tensor([pair.weight for pair in pairs], device=device),
            denominator=denominator, loss_type=self.config.loss_type, beta=self.config.beta,
            sft_weight=self.config.sft_weight,
        )  # fmt: skip
        wrong_B = ranked_wrong(chosen_B, rejected_B, **lengths_B)
        metrics["ranked_wrong"] = wrong_B.sum()
        for kind in self.kinds:
            of_kind_B = torch.tensor([pair.kind == kind for pair in pairs], device=device)
            metrics[WRONG + kind] = (wrong_B & of_kind_B).sum()
            metrics[PAIRS + kind] = of_kind_B.sum()
        return loss, metrics

    def means(self, sums: Mapping[str, float], num_items: float) -> dict[str, float]:
        """Over all pairs; `ranked_wrong_KIND` over the pairs of that kind, where there are any."""
        of_all = {
            name: value / num_items for name, value in sums.items()
            if not name.startswith((WRONG, PAIRS))
        }  # fmt: skip
        return of_all | {
            f"ranked_wrong_{kind}": sums[WRONG + kind] / sums[PAIRS + kind]
            for kind in self.kinds if sums[PAIRS + kind]
        }  # fmt: skip


class _AnswersOnce:
    """Conversations laid out in groups: each clip once, and behind it each answer once."""

    def __init__(self, audio: AudioInputs) -> None:
        self.audio = audio
        self.clips: dict[str | None, tuple[dict[str, Tensor], int | None]] = {}
        self.numbers: dict[tuple[str | None, bytes], int] = {}  # of groups, by clip and prefix
        self.talks: list[tuple[str | None, list[Conversation]]] = []  # clip and talks of each
        self.places: dict[tuple[str | None, str], tuple[int, int]] = {}

    def place(self, audio: str | None, messages: Sequence[Message]) -> tuple[int, int]:
        """(group, completion) where the conversation's last answer stands."""
        asked = audio, json.dumps([dict(message) for message in messages])
        if asked not in self.places:
            if audio not in self.clips:
                self.clips[audio] = self.audio.fields(audio)
            talk = conversation(self.audio.processor, messages, self.clips[audio][1])
            # earlier turns are the prompt's: the last answer alone is compared
            talk = Conversation(talk.prefix_P, talk.ids_T, last_run(talk.assistant_T))
            behind = audio, talk.prefix_P.numpy().tobytes()
            group = self.numbers.setdefault(behind, len(self.numbers))
            if group == len(self.talks):
                self.talks.append((audio, []))
            talks = self.talks[group][1]
            self.places[asked] = group, len(talks)
            talks.append(talk)
        return self.places[asked]

    def groups(self) -> list[GroupTensors]:
        return [
            group_of(talks[0].prefix_P, talks, self.clips[audio][0]) for audio, talks in self.talks
        ]


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

"""The policy as the learner sees it: groups in, log-probabilities of their completions out.

    prompt ids + audio + G completions --packed--> language model --> (G, T) log-probabilities

Packed (the normal path): a group's prompt is forwarded once, see `shared_prefix`. Dense: every
completion carries its prompt, one row after the other; the reference that the packed path is
checked against, and `shared_prefix.enabled=false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from posttrain.model.logprobs import use_logprob_head
from posttrain.model.sequence_parallel import SequenceGroup, check_heads, gather_tokens
from posttrain.model.shared_prefix import PackedLayout, packed_layout, use_shared_prefix


@dataclass
class GroupTensors:
    """One group; audio may lie on another device, and be memory-mapped.

    At most one kind of audio is given: what the encoder takes (it trains), what it gave (the
    projector trains), or finished embeddings (neither does).

    Attributes:
        prompt_ids_P: (P,) int64, audio placeholders expanded.
        completion_ids_GT: (G, T) int64, right-padded with 0.
        mask_GT: bool (G, T), True for real tokens; they come first.
        scored_GT: bool (G, T), tokens whose log-probabilities are wanted; None: all real ones.
        input_features, input_features_mask: (W, mel_bins, frames) and (W, frames), or None.
        encoded_AC: (A, C) encoder outputs after the rotary time embedding, or None.
        embeds_AH: (A, H) audio embeddings, or None.
    """

    prompt_ids_P: Tensor
    completion_ids_GT: Tensor
    mask_GT: Tensor
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None
    encoded_AC: Tensor | None = None
    embeds_AH: Tensor | None = None
    scored_GT: Tensor | None = None

    @property
    def wanted_GT(self) -> Tensor:
        """bool (G, T): tokens with a log-probability in the policy's output."""
        return self.mask_GT if self.scored_GT is None else self.scored_GT

    def to(self, device: torch.device) -> GroupTensors:
        """Ids and masks on `device`; audio stays where it is until it is used."""
        names = ("prompt_ids_P", "completion_ids_GT", "mask_GT", "scored_GT")
        moved: dict[str, Any] = {
            name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    @property
    def lengths(self) -> list[int]:
        """T of every completion."""
        return self.mask_GT.sum(1).tolist()

    @property
    def has_audio(self) -> bool:
        audio = (self.input_features, self.encoded_AC, self.embeds_AH)
        return any(one is not None for one in audio)


class Policy(nn.Module):
    """Wraps AF-Next, with or without LoRA, for DeepSpeed.

    Args:
        shared_prefix: forward every prompt once; False: the dense path.
        sequence_group: ranks that share a packed sequence, or None.
        activation_offload: keep what the backward pass needs in host memory; with gradient
            checkpointing that is the input of every layer.
    """

    def __init__(
        self, model: nn.Module, *, shared_prefix: bool = True,
        sequence_group: SequenceGroup | None = None, activation_offload: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.shared_prefix = shared_prefix
        self.sequence_group = sequence_group
        self.activation_offload = activation_offload
        use_logprob_head(self.core)
        if shared_prefix:
            use_shared_prefix(self.core)
        if sequence_group is not None:
            check_heads(self.core.config.text_config.num_attention_heads, sequence_group.size)

    @property
    def core(self) -> Any:
        """The MusicFlamingoForConditionalGeneration inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(
        self, groups: Sequence[GroupTensors], *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities (with gradient) and entropies of all wanted tokens, in order.

        The number of calls of each submodule does not depend on the groups when packed, nor does
        the number of tensors that have a gradient: ZeRO-3 keeps a trace of both, and ranks with
        different micro-batches must have the same. `group_logprobs` gives them back by group.
        """
        ids_N = torch.cat([ids for group in groups for ids in forwarded_ids(group)])
        embeds_NH = self.input_embeddings(groups, ids_N)
        logprobs = self.packed_logprobs if self.shared_prefix else self.dense_logprobs
        with self.saved_on_host():
            return logprobs(groups, embeds_NH, temperature)

    def input_embeddings(self, groups: Sequence[GroupTensors], ids_N: Tensor) -> Tensor:
        """(N, H): text embeddings of the packed ids, with audio in place of the placeholders."""
        embeds_NH = self.core.get_input_embeddings()(ids_N)
        audio_AH = self._audio_embeddings([group for group in groups if group.has_audio])
        if audio_AH is None:
            return embeds_NH + self._idle_audio()
        places_A = _placeholders(groups, self.core.config.audio_token_id).to(embeds_NH.device)
        return embeds_NH.index_copy(0, places_A, audio_AH.to(embeds_NH))

    def packed_logprobs(
        self, groups: Sequence[GroupTensors], embeds_NH: Tensor, temperature: float,
        first_position: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(M,) log-probabilities and entropies of all completion tokens, in order.

        Args:
            first_position: of every prompt's first token.
        """
        layout = packed_layout(
            [len(group.prompt_ids_P) for group in groups], [group.lengths for group in groups],
            embeds_NH.device, sequence_group=self.sequence_group,
        )  # fmt: skip
        places_M, targets_M = _predictions(groups, layout)
        share = slice(None)
        if self.sequence_group is not None:
            missing = layout.num_tokens - len(embeds_NH)
            embeds_NH = nn.functional.pad(embeds_NH, (0, 0, 0, missing))
            share = self.sequence_group.share(layout.num_tokens)
        hidden_NH = self.core.model.language_model(
            inputs_embeds=embeds_NH[share].unsqueeze(0),
            position_ids=layout.position_N[share].unsqueeze(0) + first_position,
            attention_mask={"full_attention": layout}, use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
        if self.sequence_group is None:
            return self.core.lm_head(hidden_NH[places_M], targets_M, temperature)
        return self._shared_head(hidden_NH, places_M, targets_M, layout.num_tokens, temperature)

    def _shared_head(
        self, hidden_nH: Tensor, places_M: Tensor, targets_M: Tensor, num_tokens: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Every rank scores the tokens whose hidden states it holds; all get all of them.

        The last prompt token predicts the first token of each completion, so each target has a
        slot of its own: its place among the rank's, not its position.
        """
        group = self.sequence_group
        assert group is not None
        share = group.share(num_tokens)
        mine_M = (places_M >= share.start) & (places_M < share.stop)
        chosen_m, entropy_m = self.core.lm_head(
            hidden_nH[places_M[mine_M] - share.start], targets_M[mine_M], temperature
        )
        out = []
        for values_m in (chosen_m, entropy_m):
            whole_M = values_m.new_zeros(len(targets_M)).masked_scatter(mine_M, values_m)
            ranks_SM = gather_tokens(whole_M, group).view(group.size, -1)
            out.append(ranks_SM.sum(0))
        return out[0], out[1]

    def dense_logprobs(
        self, groups: Sequence[GroupTensors], embeds_NH: Tensor, temperature: float,
        first_position: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `packed_logprobs`: one row a completion, prompt included, one row after the other."""
        hidden = []
        start = 0
        for group in groups:
            num_prompt = len(group.prompt_ids_P)
            prompt_PH = embeds_NH[start : start + num_prompt]
            start += num_prompt
            for length in group.lengths:
                row_NH = torch.cat([prompt_PH, embeds_NH[start : start + length - 1]])
                start += length - 1
                positions = torch.arange(len(row_NH), device=row_NH.device) + first_position
                output = self.core.model.language_model(
                    inputs_embeds=row_NH.unsqueeze(0), position_ids=positions.unsqueeze(0),
                    use_cache=False,
                )  # fmt: skip
                hidden.append(output.last_hidden_state[0, num_prompt - 1 :])
        targets_M = torch.cat([group.completion_ids_GT[group.mask_GT] for group in groups])
        wanted_M = torch.cat([group.wanted_GT[group.mask_GT] for group in groups])
        return self.core.lm_head(torch.cat(hidden)[wanted_M], targets_M[wanted_M], temperature)

    def _audio_embeddings(self, groups: Sequence[GroupTensors]) -> Tensor | None:
        """(A, H) of all groups' clips, in order; one call of encoder and projector at most."""
        if not groups:
            return None
        if groups[0].embeds_AH is not None:
            return torch.cat([group.embeds_AH.to(self._device) for group in groups])  # type: ignore[union-attr]
        if groups[0].encoded_AC is not None:
            projector = self.core.model.multi_modal_projector
            weight = projector.linear_1.weight
            encoded = [group.encoded_AC.to(self._device, weight.dtype) for group in groups]  # type: ignore[union-attr]
            with _grad_if_trains(projector):
                return projector(torch.cat(encoded))
        features = torch.cat([group.input_features for group in groups])  # type: ignore[misc]
        mask = torch.cat([group.input_features_mask for group in groups])  # type: ignore[misc]
        prompts = pad_sequence([group.prompt_ids_P for group in groups], batch_first=True)
        tower, projector = self.core.model.audio_tower, self.core.model.multi_modal_projector
        with _grad_if_trains(tower, projector):
            return self.core.get_audio_features(
                features.to(self._device, next(tower.parameters()).dtype), mask.to(self._device),
                input_ids=prompts,
            ).pooler_output  # fmt: skip

    def _idle_audio(self) -> Tensor | float:
        """0, from one call of what trains: other ranks may have audio and wait for this one."""
        tower, projector = self.core.model.audio_tower, self.core.model.multi_modal_projector
        audio_config = self.core.config.audio_config
        weight = projector.linear_1.weight
        if not any(p.requires_grad for part in (tower, projector) for p in part.parameters()):
            return 0.0
        encoded = torch.zeros(1, audio_config.hidden_size, device=self._device, dtype=weight.dtype)
        if any(p.requires_grad for p in tower.parameters()):
            frames = 2 * audio_config.max_source_positions
            shape = (1, audio_config.num_mel_bins, frames)
            encoded = tower(
                torch.zeros(shape, device=self._device, dtype=weight.dtype),
                input_features_mask=torch.ones(1, frames, device=self._device, dtype=torch.long),
                return_dict=True,
            ).last_hidden_state
        with _grad_if_trains(tower, projector):
            return 0.0 * projector(encoded).sum()

    @property
    def _device(self) -> torch.device:
        return self.core.lm_head.weight.device

    def saved_on_host(self) -> AbstractContextManager[Any]:
        """Inside, tensors kept for the backward pass go to host memory, if that was asked for."""
        if not (self.activation_offload and torch.is_grad_enabled()):
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self._device.type == "cuda")


def _grad_if_trains(*parts: nn.Module) -> AbstractContextManager[Any]:
    trains = any(p.requires_grad for part in parts for p in part.parameters())
    return nullcontext() if trains else torch.no_grad()


def forwarded_ids(group: GroupTensors) -> list[Tensor]:
    """Prompt, then every completion without its last token."""
    rows = [
        ids[: length - 1]
        for ids, length in zip(group.completion_ids_GT, group.lengths, strict=True)
    ]
    return [group.prompt_ids_P, *rows]


def _placeholders(groups: Sequence[GroupTensors], audio_token_id: int) -> Tensor:
    """(A,) places of the audio in the packed sequence; in prompts only: a model may say <sound>."""
    places, start = [], 0
    for group in groups:
        if group.has_audio:
            places.append(start + (group.prompt_ids_P == audio_token_id).nonzero().squeeze(1))
        start += len(group.prompt_ids_P) + sum(group.lengths) - len(group.lengths)
    return torch.cat(places)


def _predictions(groups: Sequence[GroupTensors], layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """(M,) places whose hidden state predicts a wanted token, and (M,) those tokens."""
    places, targets = [], []
    for group, span in zip(groups, layout.spans, strict=True):
        start = span.completions_start
        for length in span.lengths:
            places.append(torch.tensor([span.completions_start - 1]))
            places.append(torch.arange(start, start + length))
            start += length
        targets.append(group.completion_ids_GT[group.mask_GT])
    wanted_M = torch.cat([group.wanted_GT[group.mask_GT] for group in groups]).to(layout.device)
    places_M, targets_M = torch.cat(places).to(layout.device), torch.cat(targets).to(layout.device)
    return places_M[wanted_M], targets_M[wanted_M]


def group_logprobs(
    policy: Any, groups: Sequence[GroupTensors], *, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """(G, T) log-probabilities and entropies of every group, 0 where not wanted.

    Args:
        policy: a `Policy`, or the DeepSpeed engine around one.
    """
    chosen_M, entropy_M = policy(groups, temperature=temperature)
    outputs = []
    counts = [int(group.wanted_GT.sum()) for group in groups]
    pieces = zip(groups, chosen_M.split(counts), entropy_M.split(counts), strict=True)
    for group, chosen, entropy in pieces:
        mask = group.wanted_GT
        zeros = chosen.new_zeros(mask.shape)
        outputs.append((zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, entropy)))
    return outputs


def choose_trainable(
    model: Any, *, train_encoder: bool, train_projector: bool, train_embeddings: bool = False
) -> None:
    """Switches gradients of encoder and projector; the language model keeps its own.

    Args:
        train_embeddings: token embeddings and output head train in full, beside an adapter.
    """
    parts = [
        (model.model.audio_tower, train_encoder),
        (model.model.multi_modal_projector, train_projector),
    ]
    if train_embeddings:
        parts += [(model.get_input_embeddings(), True), (model.lm_head, True)]
    for part, trains in parts:
        for parameter in part.parameters():
            parameter.requires_grad_(trains)

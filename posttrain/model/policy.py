"""The policy as the learner sees it: groups in, log-probabilities of their completions out.

    prompt ids + audio (encoded once a group) + G completions -> (G, T) log-probabilities

Dense path: every completion carries its prompt, right-padded, so plain causal attention is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from posttrain.model.logprobs import token_logprobs


@dataclass
class GroupTensors:
    """One group on the device.

    Attributes:
        prompt_ids_P: (P,) int64, audio placeholders expanded.
        completion_ids_GT: (G, T) int64, right-padded with 0.
        mask_GT: bool (G, T), True for real tokens.
        input_features, input_features_mask: (W, mel_bins, frames) and (W, frames), or None.
    """

    prompt_ids_P: Tensor
    completion_ids_GT: Tensor
    mask_GT: Tensor
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None


class Policy(nn.Module):
    """Wraps AF-Next, with or without LoRA, for DeepSpeed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def core(self) -> Any:
        """The MusicFlamingoForConditionalGeneration inside."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(
        self, groups: Sequence[GroupTensors], *, temperature: float, num_chunks: int
    ) -> list[tuple[Tensor, Tensor]]:
        """(G, T) log-probabilities (with gradient) and entropies of every group; padding is 0."""
        return [self._group(group, temperature, num_chunks) for group in groups]

    def _group(
        self, group: GroupTensors, temperature: float, num_chunks: int
    ) -> tuple[Tensor, Tensor]:
        embeds_PH = self._prompt_embeddings(group)
        num_completions, num_steps = group.completion_ids_GT.shape
        num_prompt = len(embeds_PH)
        completion_GTH = self.core.get_input_embeddings()(group.completion_ids_GT)
        prompt_GPH = embeds_PH.expand(num_completions, -1, -1)
        hidden = self.core.model.language_model(
            inputs_embeds=torch.cat([prompt_GPH, completion_GTH[:, :-1]], dim=1), use_cache=False
        ).last_hidden_state[:, num_prompt - 1 :]
        mask = group.mask_GT
        logprobs_N, entropy_N = token_logprobs(
            hidden[mask], group.completion_ids_GT[mask], self.core.lm_head,
            temperature=temperature, num_chunks=num_chunks,
        )  # fmt: skip
        zeros = logprobs_N.new_zeros(num_completions, num_steps)
        return zeros.masked_scatter(mask, logprobs_N), zeros.masked_scatter(mask, entropy_N)

    def _prompt_embeddings(self, group: GroupTensors) -> Tensor:
        """(P, H): text embeddings with the clip's audio embeddings in place of placeholders."""
        ids_1P = group.prompt_ids_P.unsqueeze(0)
        embeds_1PH = self.core.get_input_embeddings()(ids_1P)
        if group.input_features is None:
            return embeds_1PH[0]
        assert group.input_features_mask is not None, "features and their mask come together"
        with nullcontext() if self._audio_trains() else torch.no_grad():
            audio_NH = self.core.get_audio_features(
                group.input_features.to(embeds_1PH),
                group.input_features_mask.to(embeds_1PH.device),
                input_ids=ids_1P,
            ).pooler_output  # fmt: skip
        mask = (ids_1P == self.core.config.audio_token_id).unsqueeze(-1)
        return embeds_1PH.masked_scatter(mask, audio_NH.to(embeds_1PH.dtype))[0]

    def _audio_trains(self) -> bool:
        parts = (self.core.model.audio_tower, self.core.model.multi_modal_projector)
        return any(p.requires_grad for part in parts for p in part.parameters())


def freeze_audio(model: Any, *, train_encoder: bool, train_projector: bool) -> None:
    """Switches gradients of encoder and projector; the language model keeps its own."""
    for part, trains in (
        (model.model.audio_tower, train_encoder),
        (model.model.multi_modal_projector, train_projector),
    ):
        for parameter in part.parameters():
            parameter.requires_grad_(trains)

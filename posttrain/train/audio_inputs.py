"""What a learner rank feeds its policy for a row's clip, checked against what the engine saw."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.data.audio import load_audio
from posttrain.data.chat import encode, expanded_prompt
from posttrain.data.rows import Row
from posttrain.model.audio_embeddings import (
    AudioEmbeddings,
    AudioStoreSettings,
    StoredAudio,
    stored_audio,
)
from posttrain.model.load import audio_limit_s
from posttrain.schema import Recipe
from posttrain.types import Group, token_runs


def audio_store_settings(recipe: Recipe) -> AudioStoreSettings | None:
    """The store of a run; None when the encoder trains, so that nothing may be stored."""
    model = recipe.model
    kind = stored_audio(train_encoder=model.train_encoder, train_projector=model.train_projector)
    if kind is None:
        return None
    return AudioStoreSettings(
        model.path, kind, model.dtype, recipe.audio_embeddings.dir,
        recipe.audio_embeddings.max_gib, model.max_audio_len_s,
    )  # fmt: skip


class AudioInputs:
    """Fields of `GroupTensors` for a clip: from the store, or log-mel windows."""

    def __init__(self, recipe: Recipe, processor: Any, device: torch.device) -> None:
        self.processor = processor
        self.limit_s = audio_limit_s(processor, recipe.model.max_audio_len_s)
        settings = audio_store_settings(recipe)
        self.store = AudioEmbeddings(settings, device) if settings else None

    def __call__(self, row: Row, group: Group) -> dict[str, torch.Tensor]:
        """Raises RuntimeError when engine and learner tokenise the prompt differently."""
        fields, num_tokens = self.fields(row.audio)
        ids_P = expanded_prompt(self.processor, row.prompt, num_tokens)
        if token_runs(ids_P.tolist()) != group.prompt_runs:
            raise RuntimeError(
                f"row {row.id!r}: engine and learner tokenise the prompt differently; "
                "run `posttrain parity` on the checkpoint"
            )
        return fields

    def fields(self, audio: str | None) -> tuple[dict[str, torch.Tensor], int | None]:
        """What the policy takes for a clip, and its audio tokens; ({}, None) without one."""
        if audio is None:
            return {}, None
        if self.store is not None:
            _, tensor = self.store(audio)
            embeddings = self.store.settings.kind is StoredAudio.EMBEDDINGS
            return {"embeds_AH" if embeddings else "encoded_AC": tensor}, len(tensor)
        waveform = load_audio(audio, max_duration_s=self.limit_s)
        batch = encode(self.processor, ({"role": "user", "content": ""},), waveform)
        ids_P = batch.pop("input_ids")[0]
        return batch, int((ids_P == self.processor.audio_token_id).sum())

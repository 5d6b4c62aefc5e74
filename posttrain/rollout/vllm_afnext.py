"""AF-Next in vLLM, out of tree.

Differences from vLLM's AudioFlamingo3, whose encoder, projector and language model are reused:

    encoder -> rotary time embedding (window index from `chunk_counts`) -> projector
    prompt   <sound>  ->  <|sound_bos|> n x <sound> <|sound_eos|>
    weights  training names map to vLLM's (LoRA is silently ignored without that)

Source: transformers `MusicFlamingoModel.get_audio_features`; parity is measured by
`posttrain parity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from transformers import MusicFlamingoConfig, MusicFlamingoProcessor
from transformers.models.musicflamingo.modeling_musicflamingo import (
    MusicFlamingoRotaryEmbedding,
    apply_rotary_time_emb,
)
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.audioflamingo3 import (
    AudioFlamingo3DummyInputsBuilder,
    AudioFlamingo3EmbeddingInputs,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3MultiModalProcessor,
    AudioFlamingo3ProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails
from vllm.platforms import current_platform
from vllm.utils.tensor_schema import TensorSchema, TensorShape

from posttrain.model.audio_embeddings import StoredAudio
from posttrain.model.checkpoint_keys import IGNORED_SUFFIXES
from posttrain.rollout.settings import STORED_AUDIO

logger = init_logger(__name__)

POOLED_FRAMES = 4  # mel frames an encoder output covers: conv stride 2, then average pool 2


class AFNextFeatureInputs(TensorSchema):
    """Log-mel windows; unlike the parent's schema, of the checkpoint's own window length.

    Dimensions: num_chunks windows of all clips, nmb mel bins, frames a window, num_audios clips.
    """

    type: Literal["audio_features"]
    input_features: Annotated[
        torch.Tensor | list[torch.Tensor], TensorShape("num_chunks", "nmb", "frames")
    ]
    feature_attention_mask: Annotated[torch.Tensor, TensorShape("num_chunks", "frames")]
    chunk_counts: Annotated[torch.Tensor, TensorShape("num_audios")]


def takes_encoder_outputs(config: MusicFlamingoConfig) -> bool:
    """Whether `audio_embeds` are encoder outputs, for a projector that trains, not embeddings."""
    return getattr(config, STORED_AUDIO, None) == StoredAudio.ENCODER_OUTPUTS.value


class AFNextProcessingInfo(AudioFlamingo3ProcessingInfo):
    def get_hf_config(self) -> MusicFlamingoConfig:
        return self.ctx.get_hf_config(MusicFlamingoConfig)

    def get_hf_processor(self, **kwargs: object) -> MusicFlamingoProcessor:
        return self.ctx.get_hf_processor(MusicFlamingoProcessor, **kwargs)

    def _get_expected_hidden_size(self) -> int | None:
        """Width that precomputed audio must have: of encoder outputs, if those are given."""
        config = self.get_hf_config()
        if takes_encoder_outputs(config):
            return config.audio_config.hidden_size
        return super()._get_expected_hidden_size()

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Of the longest clip that is taken; without it vLLM counts by making the features of half
        an hour of silence, three times at every start."""
        processor = self.get_hf_processor()
        extractor = processor.feature_extractor
        num_windows = int(processor.max_audio_len // extractor.chunk_length)
        return {"audio": num_windows * extractor.nb_max_frames // POOLED_FRAMES}


class AFNextMultiModalProcessor(AudioFlamingo3MultiModalProcessor):
    """Wraps the parent's run of `<sound>` in the begin and end tokens."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        (update,) = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        audio_run = update.replacement

        def bracketed(item_idx: int) -> PromptUpdateDetails:
            run = audio_run(item_idx).full
            return PromptUpdateDetails.select_token_id(
                [config.audio_bos_token_id, *run, config.audio_eos_token_id],
                embed_token_id=config.audio_token_id,
            )

        return [
            PromptReplacement(
                modality="audio", target=[config.audio_token_id], replacement=bracketed
            )
        ]


@MULTIMODAL_REGISTRY.register_processor(
    AFNextMultiModalProcessor,
    info=AFNextProcessingInfo,
    dummy_inputs=AudioFlamingo3DummyInputsBuilder,
)
class AFNextForConditionalGeneration(AudioFlamingo3ForConditionalGeneration):
    """Audio Flamingo Next for vLLM; LoRA, prefix caching and parallelism come from the parent."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.audio_tower.": "audio_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if current_platform.is_cpu():
            from posttrain.rollout.cpu_attention import use_long_context_attention

            use_long_context_attention()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pos_emb = MusicFlamingoRotaryEmbedding(self.config)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality == "audio":
            return "<sound>"
        raise ValueError(f"AF-Next takes audio, not {modality!r}")

    def _parse_and_validate_audio_input(
        self, **kwargs: object
    ) -> AFNextFeatureInputs | AudioFlamingo3EmbeddingInputs | None:
        if kwargs.get("audio_embeds") is not None or kwargs.get("input_features") is None:
            return super()._parse_and_validate_audio_input(**kwargs)
        return AFNextFeatureInputs(
            type="audio_features",
            input_features=kwargs["input_features"],
            feature_attention_mask=kwargs["feature_attention_mask"],
            chunk_counts=kwargs["chunk_counts"],
        )

    def _process_audio_input(
        self, audio_input: AFNextFeatureInputs | AudioFlamingo3EmbeddingInputs
    ) -> tuple[torch.Tensor, ...]:
        if audio_input.type == "audio_embeds":
            given = audio_input.audio_embeds
            if takes_encoder_outputs(self.config):
                return tuple(self.multi_modal_projector(one) for one in given)
            return tuple(given)
        features, mask, chunk_counts = self._normalize_audio_feature_inputs(audio_input)
        hidden_WTC = self._encode_audio_features(features, mask)
        cos, sin = self.pos_emb(
            self._timestamps_s(chunk_counts, hidden_WTC), seq_len=hidden_WTC.shape[1]
        )
        hidden_WTC = apply_rotary_time_emb(hidden_WTC, cos, sin)
        embeds = self.multi_modal_projector(hidden_WTC)
        return self._group_audio_embeddings(embeds, mask, chunk_counts)

    def _timestamps_s(self, chunk_counts: list[int], hidden_WTC: torch.Tensor) -> torch.Tensor:
        """Absolute seconds of every encoder output, (windows, frames); windows restart per clip."""
        device = hidden_WTC.device
        num_frames = hidden_WTC.shape[1]
        step_s = self.config.audio_frame_step * POOLED_FRAMES
        windows = torch.cat([torch.arange(n, device=device) for n in chunk_counts])
        frames = torch.arange(num_frames, device=device, dtype=torch.float32) * step_s
        return windows.unsqueeze(1) * num_frames * step_s + frames

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads canonical or training names; skips `avg_embed_norm`, refuses other strangers."""
        return super().load_weights(self._known_weights(weights))

    def _known_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in self.hf_to_vllm_mapper.apply(weights):
            if name.endswith(IGNORED_SUFFIXES):
                logger.info("ignored by name: %s", name)
                continue
            yield name, tensor

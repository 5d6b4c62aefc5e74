"""AF-Whisper and the projector by themselves: waveform in, audio embeddings out.

    waveform --windows--> log-mel --> audio tower --> rotary time embedding --> encoder outputs
                                                                  --projector--> embeddings

What `MusicFlamingoModel.get_audio_features` computes, a few windows at a time and without the
language model. Always frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3Encoder
from transformers.models.musicflamingo.modeling_musicflamingo import (
    MusicFlamingoMultiModalProjector,
    MusicFlamingoRotaryEmbedding,
    apply_rotary_time_emb,
)

from posttrain.data.audio import SAMPLE_RATE_HZ
from posttrain.data.chat import drop_tokenless_tail
from posttrain.model.load import load_processor
from posttrain.model.partial_weights import AUDIO_TOWER, PROJECTOR, read_weights, without_prefix

WINDOWS_AT_ONCE = 8
POOLED_FRAMES = 4  # mel frames an encoder output covers: conv stride 2, then average pool 2


class AudioEncoder:
    """Encoder and projector of a checkpoint on one device, without gradients."""

    def __init__(self, checkpoint: str | Path, device: str | torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self.processor = load_processor(checkpoint)
        config: Any = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        self.frame_step_s = config.audio_frame_step * POOLED_FRAMES
        weights = read_weights(checkpoint, (AUDIO_TOWER, PROJECTOR))
        self.tower = AudioFlamingo3Encoder(config.audio_config)
        self.tower.load_state_dict(without_prefix(weights, AUDIO_TOWER), strict=True)
        self.projector = MusicFlamingoMultiModalProjector(config)
        self.projector.load_state_dict(without_prefix(weights, PROJECTOR), strict=True)
        self.rotary = MusicFlamingoRotaryEmbedding(config).to(self.device)
        for part in (self.tower, self.projector):
            part.to(self.device, dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, waveform: np.ndarray) -> Tensor:
        """Encoder outputs after the rotary time embedding: (A, C), A audio tokens.

        Args:
            waveform: float32 (num_samples,) at 16 kHz.
        """
        waveform = drop_tokenless_tail(waveform, self.processor)
        size = int(self.processor.feature_extractor.chunk_length) * SAMPLE_RATE_HZ
        windows = [waveform[i : i + size] for i in range(0, len(waveform), size)]
        batches = range(0, len(windows), WINDOWS_AT_ONCE)
        return torch.cat([self._windows(windows[i : i + WINDOWS_AT_ONCE], i) for i in batches])

    def _windows(self, windows: list[np.ndarray], first: int) -> Tensor:
        batch = self.processor.feature_extractor(
            windows, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", padding="max_length",
            return_attention_mask=True,
        )  # fmt: skip
        mask = batch["attention_mask"].to(self.device)
        features = batch["input_features"].to(self.device, self.dtype)
        hidden_WTC = self.tower(
            features, input_features_mask=mask, return_dict=True
        ).last_hidden_state
        num_windows, num_frames, _ = hidden_WTC.shape
        frames = torch.arange(num_frames, device=self.device, dtype=torch.float32)
        starts = torch.arange(first, first + num_windows, device=self.device) * num_frames
        times_s = (starts.unsqueeze(1) + frames) * self.frame_step_s
        cos, sin = self.rotary(times_s, seq_len=num_frames)
        hidden_WTC = apply_rotary_time_emb(hidden_WTC, cos, sin)
        _, lengths = self.tower._get_feat_extract_output_lengths(mask.sum(-1).long())
        return hidden_WTC[frames < lengths.unsqueeze(1)]

    @torch.no_grad()
    def embed(self, waveform: np.ndarray) -> Tensor:
        """Audio embeddings: (A, H)."""
        return self.projector(self.encode(waveform))

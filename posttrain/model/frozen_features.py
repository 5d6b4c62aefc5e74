"""The frozen half of the learned reward: AF-Whisper frames and the policy's token embeddings.

Only the audio tower and the embedding table are read from the checkpoint, so a 7B checkpoint costs
about 1.7 GB here and not 16.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3Encoder

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio
from posttrain.model.load import check_architecture, load_processor
from posttrain.model.partial_weights import (
    AUDIO_TOWER,
    TOKEN_EMBEDDINGS,
    fingerprint,
    read_weights,
    without_prefix,
)

MAX_PHRASE_TOKENS = 32


class FrozenFeatures:
    """Audio frames and phrase tokens of a checkpoint, without gradients.

    Attributes:
        frame_s: seconds a frame (0.04 for AF-Next).
        fingerprint: of the weights; a head belongs to the one it was trained on.
        audio_width, text_width: features a frame and a token.
    """

    def __init__(
        self, checkpoint: str | Path, device: str = "cpu", cache_bytes: int = 2**30
    ) -> None:
        check_architecture(checkpoint)
        self.checkpoint = str(checkpoint)
        self.device = device
        self.processor = load_processor(checkpoint)
        config: Any = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        self.tower = AudioFlamingo3Encoder(config.audio_config)
        weights = read_weights(checkpoint, (AUDIO_TOWER, TOKEN_EMBEDDINGS))
        self.tower.load_state_dict(without_prefix(weights, AUDIO_TOWER), strict=True)
        self.tower.to(device).eval().requires_grad_(False)
        self.embeddings = weights[TOKEN_EMBEDDINGS].float().to(device)
        self.window_s = int(self.processor.feature_extractor.chunk_length)
        self.audio_width = int(config.audio_config.hidden_size)
        self.text_width = int(self.embeddings.shape[1])
        self.frame_s = self.window_s / (config.audio_config.max_source_positions // 2)
        self.fingerprint = fingerprint(weights)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cached_bytes, self._cache_limit = 0, cache_bytes
        self._lock = threading.Lock()

    def audio(self, path: str) -> Tensor:
        """Frames of a clip: float32 (N, audio_width) on the device; kept in a bounded cache."""
        with self._lock:
            if path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
            frames = self.encode(load_audio(path, allow_silence=True))
            self._cache[path] = frames
            self._cached_bytes += frames.nbytes
            while self._cached_bytes > self._cache_limit:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
            return frames

    @torch.no_grad()
    def encode(self, waveform: np.ndarray, windows_at_once: int = 8) -> Tensor:
        """Frames of float32 (num_samples,) at 16 kHz, window by window: float32 (N, width)."""
        size = self.window_s * SAMPLE_RATE_HZ
        chunks = [waveform[i : i + size] for i in range(0, len(waveform), size)]
        frames = []
        for i in range(0, len(chunks), windows_at_once):
            batch = self.processor.feature_extractor(
                chunks[i : i + windows_at_once], sampling_rate=SAMPLE_RATE_HZ,
                return_tensors="pt", padding="max_length", return_attention_mask=True,
            )  # fmt: skip
            mask = batch["attention_mask"].to(self.device)
            hidden = self.tower(
                batch["input_features"].to(self.device), input_features_mask=mask, return_dict=True
            ).last_hidden_state
            _, lengths = self.tower._get_feat_extract_output_lengths(mask.sum(-1).long())
            frames += [h[:n] for h, n in zip(hidden, lengths.tolist(), strict=True)]
        return torch.cat(frames).float()

    def phrases(self, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token embeddings (P, L, text_width) and their mask bool (P, L); L at most 32."""
        tokenizer = self.processor.tokenizer
        ids = [
            tokenizer.encode(f" {phrase}", add_special_tokens=False)[:MAX_PHRASE_TOKENS] or [0]
            for phrase in phrases
        ]
        longest = max(map(len, ids))
        mask = torch.tensor([[i < len(line) for i in range(longest)] for line in ids])
        padded = torch.tensor([line + [0] * (longest - len(line)) for line in ids])
        return self.embeddings[padded.to(self.device)], mask.to(self.device)

"""Log-probability of an answer with parts of the audio silent; the rest is encoded once.

clip --windows--> encoder (only windows that a silence touches anew) --> prompt embeddings
  --> log p(answer | prompt, audio), one per set of silenced spans
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.musicflamingo.modeling_musicflamingo import apply_rotary_time_emb

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio
from posttrain.data.chat import drop_tokenless_tail, encode
from posttrain.model.load import load_model, load_processor
from posttrain.model.logprobs import token_logprobs


def silence(waveform: np.ndarray, spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """A copy of float32 (num_samples,) at 16 kHz with zeros inside the spans (seconds)."""
    out = waveform.copy()
    for start_s, end_s in spans:
        out[round(start_s * SAMPLE_RATE_HZ) : round(end_s * SAMPLE_RATE_HZ)] = 0.0
    return out


class SilencedAnswers:
    """Implements `posttrain.types.AnswerScorer` with a whole policy in this process."""

    def __init__(
        self, checkpoint: str, device: str = "cpu", dtype: torch.dtype = torch.float32,
        cache_windows: int = 256,
    ) -> None:  # fmt: skip
        self.model: Any = load_model(checkpoint, dtype=dtype, device=device)
        self.processor = load_processor(checkpoint)
        self.device = torch.device(device)
        self.windows_encoded = 0
        self._windows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._cache_windows = cache_windows

    @torch.no_grad()
    def answer_logprobs(
        self,
        audio: str,
        prompt: Sequence[Mapping[str, Any]],
        answer: str,
        silenced: Sequence[Sequence[tuple[float, float]]],
    ) -> list[float]:
        """See the Protocol. The sets are run one after the other: a long clip fits once."""
        waveform = drop_tokenless_tail(load_audio(audio), self.processor)
        prompt_ids = encode(self.processor, prompt, waveform)["input_ids"].to(self.device)
        answer_ids = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        token_ids = torch.tensor(answer_ids, device=self.device)
        ids_1T = torch.cat([prompt_ids, token_ids.unsqueeze(0)], dim=1)
        embeds_1TH = self.model.get_input_embeddings()(ids_1T)
        mask = (ids_1T == self.model.config.audio_token_id).unsqueeze(-1)
        start = prompt_ids.shape[1]
        out = []
        for spans in silenced:
            audio_NH = self.audio_embeddings(silence(waveform, spans), prompt_ids)
            inputs = embeds_1TH.masked_scatter(mask, audio_NH.to(embeds_1TH.dtype))
            hidden = self.model.model.language_model(
                inputs_embeds=inputs, use_cache=False
            ).last_hidden_state[0, start - 1 : -1]
            logprobs, _ = token_logprobs(hidden, token_ids, self.model.lm_head.weight)
            out.append(float(logprobs.sum()))
        return out

    def audio_embeddings(self, waveform: np.ndarray, prompt_ids_1P: Tensor) -> Tensor:
        """What `get_audio_features` gives for the clip, (N, H), windows out of the cache."""
        size = int(self.processor.feature_extractor.chunk_length) * SAMPLE_RATE_HZ
        chunks = [waveform[i : i + size] for i in range(0, len(waveform), size)]
        hidden, lengths = zip(*(self._window(chunk) for chunk in chunks), strict=True)
        hidden_WTD = torch.stack(hidden)
        lengths_W = torch.tensor(lengths, device=self.device)
        core = self.model.model
        times = core._build_audio_timestamps(prompt_ids_1P, lengths_W, hidden_WTD.shape[-2])
        cos, sin = core.pos_emb(times.to(self.device), seq_len=hidden_WTD.shape[-2])
        embeds = core.multi_modal_projector(apply_rotary_time_emb(hidden_WTD, cos, sin))
        valid = torch.arange(embeds.shape[1], device=self.device) < lengths_W.unsqueeze(1)
        return embeds[valid]

    def _window(self, chunk: np.ndarray) -> tuple[Tensor, int]:
        """(encoder output (T, D), tokens) of one window."""
        key = hashlib.sha256(chunk.tobytes()).digest()
        if key not in self._windows:
            batch = self.processor.feature_extractor(
                [chunk], sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt",
                padding="max_length", return_attention_mask=True,
            )  # fmt: skip
            mask = batch["attention_mask"].to(self.device)
            tower = self.model.model.audio_tower
            features = batch["input_features"].to(self.device, next(tower.parameters()).dtype)
            self._windows[key] = tower(
                features, input_features_mask=mask, return_dict=True
            ).last_hidden_state[0]
            self.windows_encoded += 1
            while len(self._windows) > self._cache_windows:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        hop = self.processor.feature_extractor.hop_length
        frames = torch.tensor([len(chunk) // hop + (len(chunk) % hop > 0)])
        _, lengths = self.model.model.audio_tower._get_feat_extract_output_lengths(frames)
        return self._windows[key], int(lengths[0])

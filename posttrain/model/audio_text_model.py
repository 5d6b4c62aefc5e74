"""The learned grounding reward ready to answer: frozen features, the head, and a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from posttrain.model.audio_text import load_head
from posttrain.model.frozen_features import FrozenFeatures


class AudioTextModel:
    """Implements `posttrain.types.AudioTextScorer` in this process, one question or many at once.

    Args:
        folder: with a trained head (`posttrain run recipes/reward_grounding.yaml`).
        checkpoint: whose audio tower and embeddings the head reads; None: the one it was trained
            on.
    """

    def __init__(self, folder: str, checkpoint: str | None = None, device: str = "cpu") -> None:
        head, trained_on, fingerprint = load_head(folder)
        self.head = head.to(device)
        self.features = FrozenFeatures(checkpoint or trained_on, device)
        if self.features.fingerprint != fingerprint:
            raise ValueError(
                f"learned reward {folder}: belongs to {trained_on!r}; {checkpoint!r} has another "
                "audio tower or other embeddings: train a head for it, or give the first one"
            )
        self.device = device
        self._answers: OrderedDict[tuple[str, str], tuple[np.ndarray, float]] = OrderedDict()

    def relevance(self, audio: str, phrase: str) -> tuple[np.ndarray, float]:
        return self.answer_batch([(audio, phrase)])[0][0], self.features.frame_s

    def presence(self, audio: str, phrase: str) -> float:
        return self.answer_batch([(audio, phrase)])[0][1]

    def claim_probabilities(
        self, audio: str, claims: Sequence[tuple[str, float, float]]
    ) -> list[float]:
        return self.claims_batch([(audio, *claim) for claim in claims])

    @torch.no_grad()
    def answer_batch(self, questions: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, float]]:
        """(frame probabilities, probability of presence) of each (audio path, phrase); equal
        questions are computed once."""
        fresh = [q for q in dict.fromkeys(questions) if q not in self._answers]
        for question, logits_N in zip(fresh, self._logits(fresh), strict=True):
            frames = self.head.frame_probabilities(logits_N).cpu().numpy()
            self._answers[question] = frames, float(self.head.presence_probabilities(logits_N))
        answers = [self._answers[q] for q in questions]
        for question in questions:
            self._answers.move_to_end(question)
        while len(self._answers) > 1_024:
            self._answers.popitem(last=False)
        return answers

    @torch.no_grad()
    def claims_batch(self, claims: Sequence[tuple[str, str, float, float]]) -> list[float]:
        """Probability of each (audio path, phrase, start_s, end_s)."""
        by_audio: dict[str, list[int]] = {}
        for i, (audio, *_) in enumerate(claims):
            by_audio.setdefault(audio, []).append(i)
        out = [0.0] * len(claims)
        for audio, indices in by_audio.items():  # one clip's logits at a time
            logits_SN = torch.stack(self._logits([(audio, claims[i][1]) for i in indices]))
            spans = torch.tensor([claims[i][2:] for i in indices], device=self.device)
            lengths = torch.full((len(indices),), float(logits_SN.shape[1]), device=self.device)
            scores = self.head.span_logits(logits_SN, spans / self.features.frame_s, lengths)
            for i, p in zip(indices, scores.sigmoid().tolist(), strict=True):
                out[i] = p
        return out

    def _logits(self, questions: Sequence[tuple[str, str]]) -> list[Tensor]:
        """Logits (N,) of each question; the phrases of one clip go through the head together."""
        by_audio: dict[str, list[str]] = {}
        for audio, phrase in questions:
            if phrase not in by_audio.setdefault(audio, []):
                by_audio[audio].append(phrase)
        found: dict[tuple[str, str], Tensor] = {}
        for audio, phrases in by_audio.items():
            frames_1NF = self.features.audio(audio).unsqueeze(0)
            mask = torch.ones(frames_1NF.shape[:2], dtype=torch.bool, device=self.device)
            logits_PN = self.head.relevance(frames_1NF, mask, *self.features.phrases(phrases))[0]
            found |= {(audio, p): line for p, line in zip(phrases, logits_PN, strict=True)}
        return [found[q] for q in questions]

"""Where in a clip is a phrase heard? A small head over frozen audio frames and token embeddings.

    frames (N, D) --dilated convolutions--> (N, d) \\
                                                     dot product -> relevance p(phrase | frame)
    tokens (L, H) --GRU, mean--------------> (d)   /                 |
                                                                     +-> p(phrase is what this span
                                                                         holds), from the relevance
                                                                         inside and beside the span

Source: frame-level text-to-audio grounding as in Xu et al. 2021 (arXiv 2102.11474), with the span
classifier added. Shape suffixes: B clips, P phrases, N frames, L tokens, S spans.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_FILE = "audio_text_grounding.safetensors"


@dataclass(frozen=True)
class HeadConfig:
    """Sizes: audio_width and text_width of the frozen features, width of the head, one dilated
    convolution per entry of `dilations` (frames)."""

    audio_width: int
    text_width: int
    frame_s: float
    width: int = 128
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    kernel: int = 5
    dropout: float = 0.1


class _Block(nn.Module):
    def __init__(self, width: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(
            width, width, kernel, padding=dilation * (kernel // 2), dilation=dilation
        )
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, mask_BN1: Tensor) -> Tensor:
        h = (self.norm(x_BND) * mask_BN1).transpose(1, 2)
        h = F.gelu(self.conv(h)).transpose(1, 2)
        return x_BND + self.dropout(self.out(h))


NUM_SPAN_FEATURES = 6


class AudioTextHead(nn.Module):
    """Relevance of phrases to frames, and of phrases to spans."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.audio_in = nn.Sequential(
            nn.LayerNorm(config.audio_width), nn.Linear(config.audio_width, d)
        )
        self.blocks = nn.ModuleList(
            _Block(d, config.kernel, dilation, config.dropout) for dilation in config.dilations
        )
        self.audio_norm = nn.LayerNorm(d)
        self.text_in = nn.Sequential(
            nn.LayerNorm(config.text_width), nn.Linear(config.text_width, d)
        )
        self.text_gru = nn.GRU(d, d // 2, batch_first=True, bidirectional=True)
        self.text_out = nn.Linear(d, d)
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.temperature = nn.Parameter(torch.ones(()), requires_grad=False)
        self.span = nn.Sequential(nn.Linear(NUM_SPAN_FEATURES, 16), nn.GELU(), nn.Linear(16, 1))
        self.presence = nn.Linear(1, 1)

    def relevance(
        self, frames_BNF: Tensor, mask_BN: Tensor, tokens_PLH: Tensor, tokens_mask_PL: Tensor
    ) -> Tensor:
        """Logits (B, P, N) of "this frame is inside an event that the phrase names"."""
        mask_BN1 = mask_BN.unsqueeze(-1)
        x_BND = self.audio_in(frames_BNF)
        for block in self.blocks:
            x_BND = block(x_BND, mask_BN1)
        phrase_PD = self._phrase(tokens_PLH, tokens_mask_PL)
        scores = torch.einsum("bnd,pd->bpn", self.audio_norm(x_BND), phrase_PD)
        return scores / self.config.width**0.5 + self.bias

    def _phrase(self, tokens_PLH: Tensor, mask_PL: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.text_in(tokens_PLH), mask_PL.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        hidden_PLD, _ = nn.utils.rnn.pad_packed_sequence(self.text_gru(packed)[0], batch_first=True)
        mean_PD = (hidden_PLD * mask_PL.unsqueeze(-1)).sum(1) / mask_PL.sum(1, keepdim=True)
        return self.text_out(mean_PD)

    def frame_probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities; the temperature is fitted on clips set aside for it."""
        return torch.sigmoid(logits / self.temperature)

    def presence_probabilities(self, logits: Tensor) -> Tensor:
        """Probability (...) that the phrase is heard at all, from its highest logit in (..., N)."""
        return torch.sigmoid(self.presence(logits.amax(-1, keepdim=True))).squeeze(-1)

    def span_logits(self, logits_SN: Tensor, spans_S2: Tensor, num_frames_S: Tensor) -> Tensor:
        """Logits (S,) of "exactly this span holds what the phrase names".

        Args:
            logits_SN: relevance logits of each span's phrase in its clip.
            spans_S2: start and end in frames, fractions allowed.
            num_frames_S: frames of each clip.
        """
        return self.span(span_features(logits_SN, spans_S2, num_frames_S)).squeeze(-1)


def span_features(logits_SN: Tensor, spans_S2: Tensor, num_frames_S: Tensor) -> Tensor:
    """(S, 6): relevance inside, left and right of the span (flanks of half its length, at least
    5 frames), the expected IoU with what is relevant there, the mean logit, the log length."""
    relevance_SN = torch.sigmoid(logits_SN)
    start_S, end_S = spans_S2[:, 0], spans_S2[:, 1]
    length_S = (end_S - start_S).clamp(min=1.0)
    flank_S = (0.5 * length_S).clamp(min=5.0)
    zero_S = torch.zeros_like(start_S)
    inside = _sum_between(relevance_SN, start_S, end_S)
    left = _sum_between(relevance_SN, torch.maximum(start_S - flank_S, zero_S), start_S)
    right = _sum_between(relevance_SN, end_S, torch.minimum(end_S + flank_S, num_frames_S))
    mean_logit = _sum_between(logits_SN.clamp(-8, 8), start_S, end_S) / length_S
    features = (
        inside / length_S, left / flank_S, right / flank_S,
        inside / (length_S + left + right), mean_logit / 4, length_S.log() / 4,
    )  # fmt: skip
    return torch.stack(features, dim=-1)


def _sum_between(values_SN: Tensor, start_S: Tensor, end_S: Tensor) -> Tensor:
    """Sum over the frames of [start, end), broken frames by their share."""
    total_SN = F.pad(values_SN.cumsum(-1), (1, 0))

    def at(position_S: Tensor) -> Tensor:
        position_S = position_S.clamp(0, values_SN.shape[-1])
        low = position_S.floor().long()
        high = (low + 1).clamp(max=values_SN.shape[-1])
        rows = torch.arange(len(low), device=low.device)
        share = position_S - low
        return total_SN[rows, low] * (1 - share) + total_SN[rows, high] * share

    return at(end_S) - at(start_S)


def save_head(head: AudioTextHead, folder: str | Path, checkpoint: str, fingerprint: str) -> None:
    """Writes the head; its sizes, checkpoint and fingerprint go into the metadata."""
    config = asdict(head.config) | {"dilations": list(head.config.dilations)}
    metadata = {
        "config": json.dumps(config), "checkpoint": checkpoint, "fingerprint": fingerprint,
        "format": "pt",
    }  # fmt: skip
    weights = {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / HEAD_FILE, metadata=metadata)


def load_head(folder: str | Path) -> tuple[AudioTextHead, str, str]:
    """The head in eval mode, the checkpoint whose features it reads, and that one's fingerprint.

    Raises:
        FileNotFoundError: no head in the folder.
    """
    path = Path(folder) / HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"rewards.audio_text_grounding.options.head={folder}: no {HEAD_FILE} there; train one "
            "with `posttrain run recipes/reward_grounding.yaml`"
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = json.loads(metadata["config"])
    head = AudioTextHead(HeadConfig(**config | {"dilations": tuple(config["dilations"])}))
    head.load_state_dict(weights, strict=True)
    return head.eval(), metadata["checkpoint"], metadata["fingerprint"]

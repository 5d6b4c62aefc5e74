"""Correction for sampling with one engine and learning with another.

Both engines compute the same policy with different kernels, so their log-probabilities differ;
the ratio weighs each token (or sequence) of the loss. Modes and meanings as TRL 1.16's
`vllm_importance_sampling_mode`. Source: "Your efficient RL framework secretly brings you
off-policy RL training" (Yao et al. 2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def engine_importance_ratio(
    learner_logprobs_BT: Tensor,
    sampled_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """exp(learner - engine), bounded.

    Args:
        learner_logprobs_BT: the learner's log-probabilities before any update, no gradient.
        sampled_logprobs_BT: the engine's, of the distribution it sampled from.
        mask_BT: 1 for completion tokens.
        mode: `token_*` one ratio a token, `sequence_*` the product over a sequence;
            `*_truncate` clamps into [clip_min, clip_max], `*_mask` zeroes what lies outside.

    Returns:
        (B, T) for token modes, (B, 1) for sequence modes.
    """
    level, _, action = mode.partition("_")
    difference = (learner_logprobs_BT - sampled_logprobs_BT) * mask_BT
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    elif level != "token":
        raise ValueError(f"vllm_importance_sampling_mode={mode!r}; token_* or sequence_*")
    ratio = torch.exp(difference)
    if action == "truncate":
        return torch.clamp(ratio, min=clip_min, max=clip_max)
    if action == "mask":
        low = -math.inf if clip_min is None else clip_min
        high = math.inf if clip_max is None else clip_max
        return torch.where((ratio < low) | (ratio > high), torch.zeros_like(ratio), ratio)
    raise ValueError(f"vllm_importance_sampling_mode={mode!r}; *_truncate or *_mask")

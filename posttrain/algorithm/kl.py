"""Divergence estimators. Source: Schulman 2020, "Approximating KL divergence"."""

from __future__ import annotations

import torch
from torch import Tensor


def k3_kl(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = ref - policy.

    Unbiased for samples of the policy, and never negative. (B, T) nats.
    """
    difference = ref_logprobs_BT - logprobs_BT
    return torch.exp(difference) - difference - 1

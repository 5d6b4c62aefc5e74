"""Group-relative advantages. Pure functions on tensors.

Source: GRPO (arXiv 2402.03300, eq. 4.1.3); "none" is Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_FLOOR = 1e-4


def group_advantages(
    rewards_NG: Tensor, valid_NG: Tensor, scale_rewards: str
) -> tuple[Tensor, dict[str, float]]:
    """(reward - mean of its group) / spread; completions without a reward get 0.

    Args:
        rewards_NG: (N groups, G completions) float32; entries that are not valid are ignored.
        valid_NG: bool (N, G), True where the reward is a score.
        scale_rewards: divisor: "group" standard deviation of the group, "batch" of the whole
            batch, "none". Sample standard deviation, plus 1e-4.

    Returns:
        (N, G) advantages, and metrics: share of groups whose rewards are all equal.

    Raises:
        ValueError: unknown `scale_rewards`, or no valid reward at all.
    """
    if not bool(valid_NG.any()):
        raise ValueError(
            "no completion of the step has a reward: every one was truncated, unscorable or "
            "errored; raise sampling.max_completion_length or look at rollouts.jsonl"
        )
    valid = valid_NG.to(rewards_NG.dtype)
    rewards = torch.where(valid_NG, rewards_NG, torch.zeros_like(rewards_NG))
    count_N1 = valid.sum(1, keepdim=True)
    mean_N1 = rewards.sum(1, keepdim=True) / count_N1.clamp(min=1)
    centred = (rewards - mean_N1) * valid
    std_N1 = (centred.square().sum(1, keepdim=True) / (count_N1 - 1).clamp(min=1)).sqrt()
    if scale_rewards == "group":
        advantages = centred / (std_N1 + STD_FLOOR)
    elif scale_rewards == "batch":
        advantages = centred / (rewards_NG[valid_NG].std(correction=1).nan_to_num(0.0) + STD_FLOOR)
    elif scale_rewards == "none":
        advantages = centred
    else:
        raise ValueError(f"scale_rewards={scale_rewards!r}; group, batch or none")
    zero_variance = (std_N1 < 1e-8).float().mean().item()
    return advantages, {"reward/zero_variance_groups": zero_variance}


def decoupled_advantages(
    rewards_NGK: Tensor, weights_K: Tensor, valid_NG: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Each reward normalised within its group by itself, then the weighted sum over the batch.

    Keeps a reward of small spread from vanishing beside one of large spread.

    Args:
        rewards_NGK: (N, G, K rewards) float32; NaN where a reward does not apply.
        weights_K: (K,) weights.
        valid_NG: bool (N, G), True where the completion counts at all.

    Returns:
        As `group_advantages`; a group counts as of no variance when all of its rewards are equal.

    Source: GDPO (arXiv 2601.05242), `normalize_then_sum` of TRL.
    """
    rewards_NGK = rewards_NGK.masked_fill(~valid_NG.unsqueeze(-1), float("nan"))
    known_NGK = ~rewards_NGK.isnan()
    mean_N1K = rewards_NGK.nanmean(1, keepdim=True)
    centred = torch.where(known_NGK, rewards_NGK - mean_N1K, torch.zeros(()))
    count_N1K = known_NGK.sum(1, keepdim=True)
    std_N1K = (centred.square().sum(1, keepdim=True) / (count_N1K - 1).clamp(min=1)).sqrt()
    total_NG = (centred / (std_N1K + STD_FLOOR) * weights_K).sum(-1)
    valid = total_NG[valid_NG]
    spread = valid.std(correction=1).nan_to_num(0.0) + STD_FLOOR
    advantages = torch.where(valid_NG, (total_NG - valid.mean()) / spread, torch.zeros(()))
    zero_variance = (std_N1K < 1e-8).all(-1).float().mean().item()
    return advantages, {"reward/zero_variance_groups": zero_variance}

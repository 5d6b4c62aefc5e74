"""Policy losses: tensors in, `(loss, metrics)` out; no config, no ranks.

| loss_type | per-token term | divided by |
|---|---|---|
| grpo (2402.03300) | clipped surrogate, mean over each sequence | sequences |
| dr_grpo (2503.20783) | clipped surrogate | sequences x max_completion_length |
| dapo (2503.14476) | clipped surrogate, `epsilon_high` above | tokens of the whole batch |
| bnpo | clipped surrogate | tokens of the rank's batch |
| cispo (2506.13585) | clipped ratio, detached, times log-probability | tokens of the whole batch |

`importance_sampling_level="sequence"` is GSPO (2507.18071). The sum is divided by a `denominator`
that the caller computes over the undivided batch, so micro-batches add up to exactly its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithm.kl import k3_kl


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    denominator: float,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    engine_ratio: Tensor | None = None,
    ref_logprobs_BT: Tensor | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, already divided by the whole batch's denominator.

    Args:
        logprobs_BT: (B, T) of the policy, with gradient, natural log, at sampling temperature.
        old_logprobs_BT: (B, T) of the policy that sampled, no gradient.
        advantages: (B,) one a sequence, or (B, T) one a token.
        mask_BT: 1 for completion tokens that count.
        denominator: see `loss_denominator`.
        delta: upper bound of the raw ratio before the minimum is taken (two-sided clipping).
        engine_ratio: (B, T) or (B, 1) from `engine_importance_ratio`.
        ref_logprobs_BT: (B, T) of the reference; needed when beta is not 0.

    Returns:
        scalar loss, and sums (not means) over masked tokens: "kl", "clipped", "tokens", "ratio".
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    mask = mask_BT.to(logprobs_BT.dtype)
    log_ratio = _log_ratio(logprobs_BT - old_logprobs_BT, mask, importance_sampling_level)
    ratio = torch.exp(log_ratio)
    if loss_type == "cispo":
        clipped = ratio > epsilon_high
        loss_BT = -torch.clamp(ratio, max=epsilon_high).detach() * advantages * logprobs_BT
    elif loss_type in ("grpo", "dr_grpo", "dapo", "bnpo"):
        inside = torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high)
        bounded = ratio if delta is None else torch.clamp(ratio, max=delta)
        loss_BT = -torch.minimum(bounded * advantages, inside * advantages)
        clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | (
            (ratio > 1 + epsilon_high) & (advantages > 0)
        )
    else:
        raise ValueError(f"loss_type={loss_type!r}; grpo, dr_grpo, dapo, bnpo or cispo")
    if engine_ratio is not None:
        loss_BT = loss_BT * engine_ratio
    kl_sum = logprobs_BT.new_zeros(())
    if beta != 0.0:
        if ref_logprobs_BT is None:
            raise ValueError(f"beta={beta} needs ref_logprobs_BT")
        kl_BT = k3_kl(logprobs_BT, ref_logprobs_BT)
        kl_sum = (kl_BT.detach() * mask).sum()
        loss_BT = loss_BT + beta * (kl_BT * ratio if use_bias_correction_kl else kl_BT)
    loss_BT = loss_BT.expand_as(mask) * mask
    if loss_type == "grpo":
        loss_BT = loss_BT / mask.sum(1, keepdim=True).clamp(min=1.0)
    metrics = {
        "kl": kl_sum,
        "clipped": (clipped.expand_as(mask) * mask).sum(),
        "ratio": (ratio.detach().expand_as(mask) * mask).sum(),
        "tokens": mask.sum(),
    }
    return loss_BT.sum() / denominator, metrics


def _log_ratio(difference_BT: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T) token by token, or (B, 1): its mean over the sequence."""
    if level == "token":
        return difference_BT
    if level == "sequence":
        mean = (difference_BT * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        return mean.unsqueeze(-1)
    raise ValueError(f"importance_sampling_level={level!r}; token or sequence")


def loss_denominator(
    loss_type: str,
    *,
    num_sequences: int,
    num_tokens: int,
    num_rank_tokens: int,
    num_ranks: int,
    max_completion_length: int,
) -> float:
    """What `policy_loss` divides by, so that the sum over all micro-batches and ranks is right.

    Args:
        num_sequences, num_tokens: of the whole batch, all ranks, masked tokens only.
        num_rank_tokens: of this rank's batch; used by bnpo alone, whose loss is the mean over
            ranks of each rank's token mean.
    """
    if loss_type == "grpo":
        return float(max(num_sequences, 1))
    if loss_type == "dr_grpo":
        return float(max(num_sequences, 1) * max_completion_length)
    if loss_type in ("dapo", "cispo"):
        return float(max(num_tokens, 1))
    if loss_type == "bnpo":
        return float(max(num_rank_tokens, 1) * num_ranks)
    raise ValueError(f"loss_type={loss_type!r}; grpo, dr_grpo, dapo, bnpo or cispo")

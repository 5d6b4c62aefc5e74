"""DPO losses: sequence log-probabilities in, `(loss, metrics)` out; no config, no ranks.

With s = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected), summed over tokens:

| loss_type | a pair's loss |
|---|---|
| sigmoid (2305.18290, eq. 7) | -log sigmoid(beta s) |
| sigmoid_norm (2411.15124) | the same with every log-ratio divided by its length |
| hinge (2305.10425) | max(0, 1 - beta s) |
| ipo (2310.12036, eq. 17) | (s_norm - 1 / (2 beta))^2, s_norm as in sigmoid_norm |

`sft_weight` adds each chosen answer's mean negative log-likelihood a token, which keeps it likely
while the rejected one becomes less so. Names and values of the losses are TRL's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo")


def preference_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    chosen_lengths_B: Tensor,
    rejected_lengths_B: Tensor,
    weights_B: Tensor,
    denominator: float,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch of pairs, already divided by the whole batch's denominators.

    Args:
        chosen_B, rejected_B: (B,) log-probability of each answer, nats, with gradient.
        ref_chosen_B, ref_rejected_B: (B,) of the reference.
        chosen_lengths_B, rejected_lengths_B: (B,) tokens.
        weights_B: (B,) weight of each pair.
        denominator: pairs of the whole batch.

    Returns:
        scalar loss, and sums over pairs: "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies".
    """
    chosen_ratio_B, rejected_ratio_B = chosen_B - ref_chosen_B, rejected_B - ref_rejected_B
    delta_B = chosen_ratio_B - rejected_ratio_B
    norm_B = chosen_ratio_B / chosen_lengths_B - rejected_ratio_B / rejected_lengths_B
    if loss_type == "sigmoid":
        loss_B = -F.logsigmoid(beta * delta_B)
    elif loss_type == "sigmoid_norm":
        loss_B = -F.logsigmoid(beta * norm_B)
    elif loss_type == "hinge":
        loss_B = torch.relu(1 - beta * delta_B)
    elif loss_type == "ipo":
        loss_B = (norm_B - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type={loss_type!r}; {', '.join(LOSS_TYPES)}")
    loss_B = weights_B * loss_B - sft_weight * chosen_B / chosen_lengths_B
    loss = loss_B.sum() / denominator
    chosen_reward_B, rejected_reward_B = (
        beta * ratio.detach() for ratio in (chosen_ratio_B, rejected_ratio_B)
    )
    metrics = {
        "rewards/chosen": chosen_reward_B.sum(),
        "rewards/rejected": rejected_reward_B.sum(),
        "rewards/margins": (chosen_reward_B - rejected_reward_B).sum(),
        "rewards/accuracies": (chosen_reward_B > rejected_reward_B).float().sum(),
    }
    return loss, metrics


def ranked_wrong(
    chosen_B: Tensor, rejected_B: Tensor, chosen_lengths_B: Tensor, rejected_lengths_B: Tensor
) -> Tensor:
    """bool (B,): the chosen answer's log-probability a token is not above the rejected one's."""
    return chosen_B / chosen_lengths_B <= rejected_B / rejected_lengths_B

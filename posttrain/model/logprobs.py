"""Log-probabilities of chosen tokens without keeping the logits of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden_NH: Tensor, token_ids_N: Tensor, lm_head: nn.Module, *,
    temperature: float = 1.0, chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax(lm_head(hidden) / temperature) at the given tokens, and the entropy.

    Logits exist for `chunk_tokens` positions at a time, in the backward pass too (recomputed).

    Args:
        hidden_NH: (N, H) final hidden states, each predicting the token beside it.
        token_ids_N: (N,) int64.

    Returns:
        (N,) float32 log-probabilities with gradient, (N,) float32 entropies (nats) without.
    """
    logprobs, entropies = [], []
    for start in range(0, len(token_ids_N), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        arguments = (hidden_NH[part], token_ids_N[part], lm_head, temperature)
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False)
        else:
            chunk = _chunk_logprobs(*arguments)
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
    if not logprobs:
        empty = hidden_NH.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_logprobs(
    hidden_NH: Tensor, token_ids_N: Tensor, lm_head: nn.Module, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_NV = lm_head(hidden_NH).float() / temperature
    all_logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N = all_logprobs_NV.gather(1, token_ids_N.unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        entropy_N = -(all_logprobs_NV.exp() * all_logprobs_NV).sum(-1)
    return chosen_N, entropy_N

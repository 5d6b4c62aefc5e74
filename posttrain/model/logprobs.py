"""Log-probabilities of chosen tokens without keeping the logits of a whole batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden_NH: Tensor,
    token_ids_N: Tensor,
    lm_head: nn.Module,
    *,
    temperature: float = 1.0,
    num_chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature) at the given tokens, and the entropy.

    Logits exist for one chunk at a time, in the backward pass too (recomputed). The number of
    chunks is the caller's and does not depend on N: under ZeRO-3 every call of `lm_head` is a
    collective, so all ranks must make equally many, empty chunks included.

    Args:
        hidden_NH: (N, H) final hidden states, each predicting the token beside it.
        token_ids_N: (N,) int64.

    Returns:
        (N,) float32 log-probabilities with gradient, (N,) float32 entropies (nats) without.
    """
    logprobs, entropies = [], []
    parts = zip(
        hidden_NH.tensor_split(num_chunks), token_ids_N.tensor_split(num_chunks), strict=True
    )
    for hidden, token_ids in parts:
        arguments = (hidden, token_ids, lm_head, temperature)
        if torch.is_grad_enabled():
            chunk = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False)
        else:
            chunk = _chunk_logprobs(*arguments)
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
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

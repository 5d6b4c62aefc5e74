"""Log-probabilities of chosen tokens, and entropies, without a (tokens x vocabulary) tensor.

The vocabulary is read in chunks, as in online softmax: a running maximum m, s = sum exp(l - m) and
u = sum exp(l - m) l give log-sum-exp and entropy in one pass. The backward pass computes each chunk
of logits again, so gradients are exact and nothing of size N x V is ever kept.

Liger's fused linear kernels do not fit here: they compute the loss inside, so their backward pass
knows one scalar gradient, and they give no entropy. A policy loss needs a gradient a token.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (1805.02867), eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_CHUNK = 4_096


class LogprobHead(nn.Linear):
    """An `lm_head` that can also be asked for log-probabilities.

    It is called as a module, so that ZeRO-3 gathers its weight by the usual hooks: once a forward
    and once a backward pass, however many tokens a rank has.
    """

    def forward(
        self, hidden: Tensor, token_ids_N: Tensor | None = None, temperature: float = 1.0
    ) -> Any:
        """Logits as ever; with `token_ids_N`, what `token_logprobs` returns."""
        if token_ids_N is None:
            return super().forward(hidden)
        return token_logprobs(hidden, token_ids_N, self.weight, temperature=temperature)


def use_logprob_head(model: Any) -> None:
    """Makes `model.lm_head` a `LogprobHead` over the very same weight."""
    old = model.lm_head
    if isinstance(old, LogprobHead):
        return
    if old.bias is not None:
        raise ValueError("lm_head has a bias; the language models of AF-Next have none")
    head = LogprobHead(old.in_features, old.out_features, bias=False, device="meta")
    head.weight = old.weight
    model.lm_head = head


def token_logprobs(
    hidden_NH: Tensor,
    token_ids_N: Tensor,
    weight_VH: Tensor,
    *,
    temperature: float = 1.0,
    vocab_chunk: int = VOCAB_CHUNK,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature) at the given tokens, and the entropy.

    Args:
        hidden_NH: (N, H) final hidden states, each predicting the token beside it.
        token_ids_N: (N,) int64.
        weight_VH: (V, H) of `lm_head`.
        vocab_chunk: columns of logits that exist at one time.

    Returns:
        (N,) float32 log-probabilities with gradient, (N,) float32 entropies (nats) without.
    """
    logprobs_N, entropy_N = _ChunkedLogprobs.apply(
        hidden_NH, weight_VH, token_ids_N, temperature, vocab_chunk
    )
    return logprobs_N, entropy_N


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, ids_N: Tensor, temperature: float, size: int
    ) -> tuple[Tensor, Tensor]:
        largest_N = torch.full(ids_N.shape, -torch.inf, device=hidden_NH.device)
        sum_N = torch.zeros_like(largest_N)
        weighted_N, chosen_N = torch.zeros_like(sum_N), torch.zeros_like(sum_N)
        for first, logits_NC in _chunks(hidden_NH, weight_VH, temperature, size):
            before_N = largest_N
            largest_N = torch.maximum(before_N, logits_NC.amax(-1))
            shrink_N = torch.exp(before_N - largest_N)
            exp_NC = torch.exp(logits_NC - largest_N.unsqueeze(1))
            sum_N = sum_N * shrink_N + exp_NC.sum(-1)
            weighted_N = weighted_N * shrink_N + (exp_NC * logits_NC).sum(-1)
            here_N, column_N1 = _columns(ids_N, first, logits_NC.shape[1])
            picked_N = logits_NC.gather(1, column_N1).squeeze(1)
            chosen_N = torch.where(here_N, picked_N, chosen_N)
        logsumexp_N = largest_N + torch.log(sum_N)
        ctx.save_for_backward(hidden_NH, ids_N, logsumexp_N)
        ctx.weight = weight_VH  # not saved as a tensor: ZeRO-3 gathers it again for the backward
        ctx.temperature, ctx.size = temperature, size
        entropy_N = logsumexp_N - weighted_N / sum_N
        ctx.mark_non_differentiable(entropy_N)
        return chosen_N - logsumexp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob_n / d logits_nv = [v = id_n] - softmax_nv, over the temperature."""
        gradient_N1 = gradients[0].unsqueeze(1)
        hidden_NH, ids_N, logsumexp_N = ctx.saved_tensors
        weight_VH, temperature = ctx.weight, ctx.temperature
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden_NH, dtype=torch.float32)
        weight_gradient = torch.zeros_like(weight_VH) if needs_weight else None
        for first, logits_NC in _chunks(hidden_NH, weight_VH, temperature, ctx.size):
            last = first + logits_NC.shape[1]
            minus_NC = -torch.exp(logits_NC - logsumexp_N.unsqueeze(1))
            here_N, column_N1 = _columns(ids_N, first, logits_NC.shape[1])
            minus_NC.scatter_add_(1, column_N1, here_N.to(minus_NC.dtype).unsqueeze(1))
            step_NC = (minus_NC * (gradient_N1 / temperature)).to(hidden_NH.dtype)
            if needs_hidden:
                hidden_gradient += step_NC @ weight_VH[first:last]
            if weight_gradient is not None:
                weight_gradient[first:last] = step_NC.T @ hidden_NH
        return hidden_gradient.to(hidden_NH.dtype), weight_gradient, None, None, None


def _chunks(
    hidden_NH: Tensor, weight_VH: Tensor, temperature: float, size: int
) -> Iterator[tuple[int, Tensor]]:
    """(first token id, float32 (N, C) logits over the temperature) of every vocabulary chunk."""
    for first in range(0, len(weight_VH), size):
        logits_NC = (hidden_NH @ weight_VH[first : first + size].T).float()
        yield first, logits_NC / temperature if temperature != 1.0 else logits_NC


def _columns(ids_N: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Which tokens lie in the chunk, and (N, 1) columns (clamped into it for the others)."""
    column_N = ids_N - first
    here_N = (column_N >= 0) & (column_N < width)
    return here_N, column_N.clamp(0, width - 1).unsqueeze(1)

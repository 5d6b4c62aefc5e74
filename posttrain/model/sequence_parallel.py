"""Ulysses: ranks share one sequence; around attention they trade tokens for heads.

    (heads, N / S tokens)  --all-to-all-->  (heads / S, N tokens)  --attention-->  and back

Attention thus sees the whole packed sequence with its own layout, for a share of the heads. The
integration that DeepSpeed has for transformers models replaces custom masks by plain causal ones:
completions would see each other. So the exchange stands inside our attention instead.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence.

    Attributes:
        group: their torch.distributed group.
        rank, size: this process's place among them, and S, how many there are.
    """

    group: Any
    rank: int
    size: int

    def share(self, num_tokens: int) -> slice:
        """This rank's stretch of a sequence of `num_tokens`, a multiple of S."""
        width = num_tokens // self.size
        return slice(self.rank * width, (self.rank + 1) * width)


def sequence_group(rank: int, world_size: int, degree: int) -> SequenceGroup | None:
    """Neighbouring ranks in groups of `degree`; a collective: all ranks call it together."""
    if degree == 1:
        return None
    mine = None
    for first in range(0, world_size, degree):
        group = dist.new_group(list(range(first, first + degree)))
        if first <= rank < first + degree:
            mine = SequenceGroup(group, rank - first, degree)
    return mine


def check_heads(num_heads: int, degree: int) -> None:
    """Raises ValueError when the heads cannot be shared out."""
    if num_heads % degree:
        fits = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
        raise ValueError(
            f"learner.sequence_parallel_size={degree}: the model has {num_heads} attention heads; "
            f"choose one of {fits}"
        )


def scatter_heads(x: Tensor, group: SequenceGroup) -> Tensor:
    """(1, heads, N/S, d) -> (1, heads/S, N, d); key heads are repeated where S needs more."""
    size = group.size
    num_heads = x.shape[1]
    if num_heads % size:
        x = x.repeat_interleave(size // math.gcd(num_heads, size), dim=1)
    _, num_heads, width, dim = x.shape
    sent = x.reshape(size, num_heads // size, width, dim)
    received = _AllToAll.apply(sent, group.group)  # (S, heads/S, N/S, d): a stretch from each rank
    return received.transpose(0, 1).reshape(1, num_heads // size, size * width, dim)


def gather_heads(x: Tensor, group: SequenceGroup) -> Tensor:
    """(1, N, heads/S, d) -> (1, N/S, heads, d)."""
    size = group.size
    _, num_tokens, num_heads, dim = x.shape
    sent = x.reshape(size, num_tokens // size, num_heads, dim)
    received = _AllToAll.apply(sent, group.group)  # (S, N/S, heads/S, d): heads from each rank
    return received.transpose(0, 1).reshape(1, num_tokens // size, size * num_heads, dim)


def gather_tokens(x_n: Tensor, group: SequenceGroup) -> Tensor:
    """(N/S,) of every rank -> (N,) on all; the gradient stays with the rank that owns the token.

    All ranks compute the same loss from it, so each hands back its own share and no more.
    """
    return _GatherTokens.apply(x_n, group)


class _AllToAll(torch.autograd.Function):
    """Slice i goes to rank i; its gradient comes back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        received = torch.empty_like(gradient)
        dist.all_to_all_single(received, gradient, group=ctx.group)
        return received, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_n: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_n) for _ in range(group.size)]
        dist.all_gather(parts, x_n.contiguous(), group=group.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.group.share(len(gradients[0]))], None

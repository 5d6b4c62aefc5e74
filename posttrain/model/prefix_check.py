"""Is the packed path the dense path? Asked of the real model, weights and prompt of a run.

A part of a group that is small enough to forward densely is computed both ways from the same input
embeddings, at the positions that it has in the run. Compared are its log-probabilities and the
gradient of the inputs: that gradient passes through every layer's attention, and unlike a
parameter's it is whole on every rank, whatever ZeRO has partitioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.model.policy import GroupTensors, Policy, forwarded_ids

# a completion that sees a sibling is off by whole nats. bfloat16 rounds logits of 32 and more to
# steps of 0.25, and the two paths round differently in every layer
LOGPROB_TOLERANCES = {"float32": 1e-4, "bfloat16": 1.0}
GRADIENT_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2}
COMPLETIONS = 3
COMPLETION_TOKENS = 128


@dataclass(frozen=True)
class PrefixDifference:
    """Packed against dense.

    Attributes:
        logprob: largest |difference|, nats.
        gradient: |difference| / |dense gradient| of the input embeddings.
        prompt_tokens, completions: how much was compared.
    """

    logprob: float
    gradient: float
    prompt_tokens: int
    completions: int


def compare_with_dense(
    policy: Policy, group: GroupTensors, *, temperature: float, prompt_tokens: int, completions: int
) -> PrefixDifference:
    """Both paths on the last `prompt_tokens` of the prompt and the first `completions`, cut to
    `COMPLETION_TOKENS` each; the dense one a completion at a time.

    Memory is that of one training step on so many tokens: gradient checkpointing and activation
    offload stay on. Under ZeRO-3 all ranks call it together, with one number of completions.
    """
    first = max(0, len(group.prompt_ids_P) - prompt_tokens)
    with torch.no_grad():
        whole_NH = policy.input_embeddings([group], torch.cat(forwarded_ids(group)))
    prompt_PH = whole_NH[first : len(group.prompt_ids_P)]
    rows = whole_NH[len(group.prompt_ids_P) :].split([n - 1 for n in group.lengths])
    small = GroupTensors(
        group.prompt_ids_P[first:],
        group.completion_ids_GT[:completions, :COMPLETION_TOKENS],
        group.mask_GT[:completions, :COMPLETION_TOKENS],
    )
    kept = [row[: n - 1] for row, n in zip(rows, small.lengths, strict=False)]
    embeds_NH = torch.cat([prompt_PH, *kept]).detach().requires_grad_()
    with _without_dropout(policy), policy.saved_on_host():
        packed, packed_gradient = _with_gradient(
            policy.packed_logprobs, small, embeds_NH, temperature, first
        )
        dense, dense_gradient = _row_by_row(policy, small, embeds_NH, temperature, first)
    if policy.sequence_group is not None:
        dist.all_reduce(packed_gradient, group=policy.sequence_group.group)
    difference = (packed_gradient - dense_gradient).norm() / dense_gradient.norm()
    return PrefixDifference(
        float((packed - dense).abs().max()), float(difference), len(small.prompt_ids_P), completions
    )


def _row_by_row(
    policy: Policy, group: GroupTensors, embeds_NH: Tensor, temperature: float, first: int
) -> tuple[Tensor, Tensor]:
    """The dense path a completion at a time; the prompt's gradients add up."""
    num_prompt = len(group.prompt_ids_P)
    start = num_prompt
    chosen: list[Tensor] = []
    total = torch.zeros_like(embeds_NH, dtype=torch.float32)
    for i, length in enumerate(group.lengths):
        row = GroupTensors(
            group.prompt_ids_P, group.completion_ids_GT[i : i + 1], group.mask_GT[i : i + 1]
        )
        own = slice(start, start + length - 1)
        start += length - 1
        row_NH = torch.cat([embeds_NH[:num_prompt], embeds_NH[own]]).detach().requires_grad_()
        counted = sum(len(logprobs) for logprobs in chosen)
        logprobs, gradient = _with_gradient(
            policy.dense_logprobs, row, row_NH, temperature, first, counted
        )
        total[:num_prompt] += gradient[:num_prompt]
        total[own] += gradient[num_prompt:]
        chosen.append(logprobs)
    return torch.cat(chosen), total


def _with_gradient(
    logprobs: Any, group: GroupTensors, embeds_NH: Tensor, temperature: float, first: int,
    counted: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities, and the inputs' gradient of a sum with a weight a token."""
    with torch.enable_grad():
        chosen_M, _ = logprobs([group], embeds_NH, temperature, first_position=first)
        weight_M = torch.cos(counted + torch.arange(len(chosen_M), device=chosen_M.device))
        (gradient,) = torch.autograd.grad((chosen_M * weight_M).sum(), embeds_NH)
    return chosen_M.detach(), gradient.float()


@contextmanager
def _without_dropout(policy: Policy) -> Iterator[None]:
    """Dropout off and nothing else: eval mode would switch gradient checkpointing off, too."""
    active = [m for m in policy.modules() if isinstance(m, nn.Dropout) and m.training]
    for module in active:
        module.eval()
    yield
    for module in active:
        module.train()

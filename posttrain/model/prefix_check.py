"""Is the packed path the dense path? Asked of the real model, weights and prompt of a run.

A small part of a group is computed both ways from the same input embeddings. Compared are its
log-probabilities and the gradient of the inputs: that gradient passes through every layer's
attention, and unlike a parameter's it is whole on every rank, whatever ZeRO has partitioned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.model.policy import GroupTensors, Policy

LOGPROB_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.25}
GRADIENT_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}


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
    """Both paths on the last `prompt_tokens` of the prompt and the first `completions`.

    Under ZeRO-3 all ranks call it together, with one number of completions.
    """
    with torch.no_grad():
        ids = [ids[: n - 1] for ids, n in zip(group.completion_ids_GT, group.lengths, strict=True)]
        whole = policy.input_embeddings([group], torch.cat([group.prompt_ids_P, *ids]))
    small = replace(
        group, prompt_ids_P=group.prompt_ids_P[-prompt_tokens:],
        completion_ids_GT=group.completion_ids_GT[:completions],
        mask_GT=group.mask_GT[:completions],
    )  # fmt: skip
    first = len(group.prompt_ids_P) - len(small.prompt_ids_P)
    end = len(group.prompt_ids_P) + sum(small.lengths) - len(small.lengths)
    embeds_NH = whole[first:end].detach().requires_grad_()
    trains = policy.training
    policy.eval()
    packed, packed_gradient = _with_gradient(policy.packed_logprobs, small, embeds_NH, temperature)
    dense, dense_gradient = _with_gradient(policy.dense_logprobs, small, embeds_NH, temperature)
    policy.train(trains)
    if policy.sequence_group is not None:
        dist.all_reduce(packed_gradient, group=policy.sequence_group.group)
    difference = (packed_gradient - dense_gradient).norm() / dense_gradient.norm()
    return PrefixDifference(
        float((packed - dense).abs().max()), float(difference), len(small.prompt_ids_P), completions
    )


def _with_gradient(
    logprobs: Any, group: GroupTensors, embeds_NH: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the inputs' gradient of a sum with a weight a token."""
    with torch.enable_grad():
        chosen_M, _ = logprobs([group], embeds_NH, temperature)
        weight_M = torch.cos(torch.arange(len(chosen_M), device=chosen_M.device))
        (gradient,) = torch.autograd.grad((chosen_M * weight_M).sum(), embeds_NH)
    return chosen_M.detach(), gradient.float()

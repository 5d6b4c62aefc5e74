"""Trainable weights as a stream of (canonical name, full tensor), whatever ZeRO made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from posttrain.model.checkpoint_keys import canonical_key


def gathered(parameters: Sequence[nn.Parameter], zero_stage: int) -> AbstractContextManager[Any]:
    """Full parameters inside the context; a collective under ZeRO-3."""
    if zero_stage != 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


class LearnerWeights:
    """A vLLM `WeightSource` over the policy's trainable weights.

    Iterating is a collective under ZeRO-3: all ranks iterate together, one tensor at a time.
    """

    def __init__(self, policy: Any, zero_stage: int) -> None:
        self._zero_stage = zero_stage
        self._parameters = {
            canonical_key(name): parameter
            for name, parameter in policy.core.named_parameters()
            if parameter.requires_grad and "lora_" not in name
        }

    @property
    def num_bytes(self) -> int:
        return sum(
            torch.Size(_full_shape(p)).numel() * p.element_size() for p in self._parameters.values()
        )

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(n, p.dtype, _full_shape(p)) for n, p in self._parameters.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._parameters.items():
            with gathered([parameter], self._zero_stage):
                # the receiver may hold several tensors while ZeRO-3 takes this one apart again
                full = parameter.detach()
                yield name, full.clone() if self._zero_stage == 3 else full


def full_weights(core: nn.Module, zero_stage: int, *, keep: bool) -> dict[str, torch.Tensor]:
    """All weights on the CPU under canonical names, gathered one by one; an adapter's stay out.

    Args:
        keep: False on ranks that only help to gather; they get an empty dict.
    """
    weights = {}
    for name, parameter in core.named_parameters():
        if "lora_" in name:
            continue
        name = name.replace(".base_layer.", ".")
        with gathered([parameter], zero_stage):
            if keep:
                weights[canonical_key(name)] = parameter.detach().cpu().clone().contiguous()
    return weights


def _full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

"""FlexAttention over the packed layout: a block mask made once a batch, lengths in buckets.

`torch.compile` makes one kernel for every length it meets, so lengths are rounded up to a bucket:
eight an octave, at most an eighth more. Only query, key and value are padded, inside the attention
call; every other layer sees the unpadded sequence, and padding has no block of keys to visit.

Source: FlexAttention (arXiv 2412.05496), section 3 on block sparsity.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from posttrain.model.shared_prefix import PackedLayout

BLOCK = 128
SMALLEST_BUCKET = 1_024
COMPILED_LENGTHS = 128  # kernels that torch.compile may keep; above it, it raises
_COMPILE_OPTIONS = inspect.signature(torch.compile).parameters  # recompile_limit is of torch 2.13


def bucket(num_tokens: int) -> int:
    """The length that `num_tokens` is rounded up to."""
    step = max(BLOCK, 2 ** (max(num_tokens, 1) - 1).bit_length() // 16)
    return max(SMALLEST_BUCKET, -(-num_tokens // step) * step)


def flex_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    """(1, heads, N, head_dim); as `sdpa_prefix_attention`."""
    num_tokens = query.shape[2]
    if "block_mask" not in layout.flex_state:
        layout.flex_state["block_mask"] = prefix_block_mask(layout, bucket(num_tokens))
    pad = (0, 0, 0, bucket(num_tokens) - num_tokens)
    attend = _compiled() if query.is_cuda else flex_attention
    output: Any = attend(
        F.pad(query, pad), F.pad(key, pad), F.pad(value, pad),
        block_mask=layout.flex_state["block_mask"], scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output[:, :, :num_tokens]


@cache
def _compiled() -> Any:
    """Whole or not at all: eager FlexAttention would make an (N, N) tensor of scores."""
    more: dict[str, Any] = (
        {"recompile_limit": COMPILED_LENGTHS} if "recompile_limit" in _COMPILE_OPTIONS else {}
    )
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, **more)


def prefix_block_mask(layout: PackedLayout, length: int) -> BlockMask:
    """Which 128 x 128 blocks hold something to attend to, and which are attended to in full.

    Evaluated a row of blocks at a time: exact, and never a (length x length) tensor.
    """
    pad = length - layout.num_tokens
    group_N = F.pad(layout.group_N, (0, pad), value=-1)
    segment_N = F.pad(layout.segment_N, (0, pad))

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        same_group = (group_N[query] == group_N[key]) & (group_N[key] >= 0)
        to_prompt_or_self = (segment_N[key] == 0) | (segment_N[key] == segment_N[query])
        return same_group & to_prompt_or_self & (query >= key)

    everywhere = torch.arange(length, device=layout.device)
    some_QK, all_QK = [], []
    for rows in everywhere.split(BLOCK):
        seen = visible(None, None, rows.unsqueeze(1), everywhere).view(BLOCK, -1, BLOCK)
        some_QK.append(seen.any(-1).any(0))
        all_QK.append(seen.all(-1).all(0))
    full = torch.stack(all_QK)
    partial = torch.stack(some_QK) & ~full
    return BlockMask.from_kv_blocks(
        *_indices(partial), *_indices(full),
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length),
    )  # fmt: skip


def _indices(blocks_QK: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, Q) counts and (1, 1, Q, K) column numbers, the marked ones first."""
    counts = blocks_QK.sum(-1, dtype=torch.int32)
    order = blocks_QK.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], order.to(torch.int32)[None, None].contiguous()

"""Attention over long contexts for vLLM on a CPU in float32.

vLLM's own CPU kernel adds up all keys of a query in one float32 chain. Over the 15,000 keys of
ten minutes of audio that leaves relative errors near 1e-4 in single outputs, ten to twenty times
those of PyTorch's kernel, and log-probabilities that differ from the learner's by 1e-4. GPUs sum
in tiles and are not affected, nor are short contexts: those stay with vLLM's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

LONG_CONTEXT_KEYS = 1_024
ROWS = 1_024
FEW_ROWS = 64


class LongContextCPUAttention(CPUAttentionBackendImpl):
    """vLLM's CPU attention, with PyTorch's kernel for float32 contexts of 1,024 keys and more."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: Any, output: Tensor, *scales: Tensor | None, **more: Any,
    ) -> Tensor:  # fmt: skip
        """Causal attention of every sequence's new tokens over all its cached ones.

        Args:
            query: [tokens, heads, head_size], sequence after sequence.
            kv_cache: [blocks, kv_heads, block_size, 2 * head_size], the new keys included.
            output: like `query`, written in place.
        """
        if not self._is_long(layer, query, attn_metadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales, **more
            )
        starts = attn_metadata.query_start_loc.tolist()
        lengths = attn_metadata.seq_lens.tolist()
        table = attn_metadata.block_table[: len(lengths)]
        decoding = [i for i in range(len(lengths)) if starts[i + 1] - starts[i] == 1]
        groups, others = _groups(table, lengths, decoding, kv_cache.shape[2])
        for numbers, num_blocks in groups:
            rows = [starts[i] for i in numbers]
            out_GHD = _attend_after_prefix(
                query[rows], kv_cache, table[numbers], [lengths[i] for i in numbers], num_blocks,
                self.scale,
            )  # fmt: skip
            output[rows] = out_GHD.view_as(output[rows])
        for i in others:
            keys_KTD, values_KTD = _cached(kv_cache, table[i], lengths[i])
            own = slice(starts[i], starts[i + 1])
            out_THD = _attend(query[own], keys_KTD, values_KTD, self.scale)
            output[own] = out_THD.view_as(output[own])
        return output

    def _is_long(self, layer: Any, query: Tensor, metadata: Any) -> bool:
        plain = self.sinks is None and self.alibi_slopes is None and not self.logits_soft_cap
        return (
            metadata is not None
            and metadata.causal
            and metadata.max_seq_len >= LONG_CONTEXT_KEYS
            and query.dtype == torch.float32
            and layer.isa == "vec"
            and plain
            and self.sliding_window == -1
        )


class LongContextCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return LongContextCPUAttention


def use_long_context_attention() -> None:
    """For the models that this process builds from now on."""
    path = f"{__name__}.{LongContextCPUBackend.__name__}"
    register_backend(AttentionBackendEnum.CPU_ATTN, path)


def _groups(
    table: Tensor, lengths: Sequence[int], decoding: Sequence[int], block_size: int
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Decoding sequences by their first blocks, which the completions of a group share.

    Returns:
        (sequences, leading full blocks that all of them have) of every group, one sequence or
        more; the sequences that are not decoding, or shorter than a block.
    """
    by_first: dict[int, list[int]] = {}
    for i in decoding:
        by_first.setdefault(int(table[i, 0]), []).append(i)
    groups: list[tuple[list[int], int]] = []
    for numbers in by_first.values():
        full_blocks = [lengths[i] // block_size for i in numbers]
        rows = table[numbers, : min(full_blocks)]
        num_shared = int((rows == rows[0]).all(0).long().cumprod(0).sum())
        if 2 * num_shared < min(full_blocks):  # a system prompt in common, not a clip
            groups += [([i], num) for i, num in zip(numbers, full_blocks, strict=True)]
        elif num_shared:
            groups.append((numbers, num_shared))
    grouped = {i for numbers, _ in groups for i in numbers}
    return groups, [i for i in range(len(lengths)) if i not in grouped]


def _cached(kv_cache: Tensor, blocks: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, each [kv_heads, num_keys, head_size]."""
    block_size = kv_cache.shape[2]
    keys_KTD, values_KTD = _of_blocks(kv_cache, blocks[: -(-num_keys // block_size)])
    return keys_KTD[:, :num_keys], values_KTD[:, :num_keys]


def _of_blocks(kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, [..., blocks] -> each [..., kv_heads, keys, head_size]."""
    keys, values = _stored(kv_cache[blocks.long()])
    keys, values = (
        part.transpose(-4, -3).flatten(-3, -2) for part in (keys.transpose(-2, -1), values)
    )
    return keys, values


def _stored(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of whole blocks as vLLM keeps them: keys transposed, then values.

    Args:
        cache: [..., kv_heads, block_size, 2 * head_size].

    Returns:
        Keys [..., kv_heads, head_size, block_size] and values [..., kv_heads, block_size,
        head_size].
    """
    block_size, head_size = cache.shape[-2], cache.shape[-1] // 2
    keys, values = cache.flatten(-2).unflatten(-1, (2, -1)).unbind(-2)
    return keys.unflatten(-1, (head_size, block_size)), values.unflatten(-1, (-1, head_size))


def _attend_after_prefix(
    query_GHD: Tensor, kv_cache: Tensor, table: Tensor, lengths: Sequence[int], num_blocks: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """One new token of each of G sequences that share their first blocks: [G, heads, head_size].

    The prefix is read once for all of them, where it lies; a block's share of the output is summed
    in float32, blocks and softmax in float64. What follows is read for each, in float64.
    """
    num_rows, heads, head_size = query_GHD.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    prefix = num_blocks * block_size
    last_block = -(-max(lengths) // block_size)
    keys_BKDT, values_BKTD = _stored(_whole_blocks(kv_cache, table[0, :num_blocks]))
    own_keys, own_values = (
        x.double() for x in _of_blocks(kv_cache, table[:, num_blocks:last_block])
    )
    query_GKRD = query_GHD.view(num_rows, kv_heads, heads // kv_heads, head_size) * scale
    query_KND = query_GKRD.transpose(0, 1).reshape(kv_heads, -1, head_size)
    scores_KNP = (query_KND @ keys_BKDT).permute(1, 2, 0, 3).flatten(-2).double()
    to_own = query_GKRD.double() @ own_keys.transpose(-2, -1)
    places = prefix + torch.arange(own_keys.shape[-2])
    unseen_GT = places >= torch.tensor(lengths).unsqueeze(1)
    to_own = to_own.masked_fill(unseen_GT[:, None, None], -torch.inf)
    weights = torch.cat([_split_rows(scores_KNP, num_rows), to_own], dim=-1).softmax(-1)
    weights_KNP = weights[..., :prefix].float().transpose(0, 1).reshape(kv_heads, -1, prefix)
    weights_BKNT = weights_KNP.unflatten(-1, (num_blocks, block_size)).permute(2, 0, 1, 3)
    out_KND = (weights_BKNT @ values_BKTD).sum(0, dtype=torch.float64)
    out = _split_rows(out_KND, num_rows) + weights[..., prefix:] @ own_values.nan_to_num()
    return out.reshape(num_rows, heads, head_size).float()


def _whole_blocks(kv_cache: Tensor, blocks: Tensor) -> Tensor:
    """These blocks of the cache in any order, which means nothing to a softmax.

    A view where they fill a stretch of the cache, as those of one prompt mostly do.
    """
    first, last = int(blocks.min()), int(blocks.max())
    if last - first + 1 == len(blocks):
        return kv_cache[first : last + 1]
    return kv_cache[blocks.long()]


def _split_rows(x_KNX: Tensor, num_rows: int) -> Tensor:
    """[kv_heads, G x R, x] -> [G, kv_heads, R, x]."""
    return x_KNX.unflatten(1, (num_rows, -1)).transpose(0, 1)


def _attend(query_THD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, scale: float) -> Tensor:
    """Attention of the last tokens over all keys, [tokens, heads, head_size].

    A few rows are summed in float64: for those PyTorch's kernel has one float32 chain, too. Rows
    after a cached prefix need a mask, which costs twice the time: they go in pieces.
    """
    offset = keys_KTD.shape[1] - len(query_THD)
    if len(query_THD) < FEW_ROWS:
        query_THD, keys_KTD, values_KTD = (x.double() for x in (query_THD, keys_KTD, values_KTD))
    if offset == 0:
        out_HTD = scaled_dot_product_attention(
            query_THD.transpose(0, 1)[None], keys_KTD[None], values_KTD[None],
            is_causal=True, scale=scale, enable_gqa=True,
        )[0]  # fmt: skip
        return out_HTD.transpose(0, 1).float()
    parts = []
    for start in range(0, len(query_THD), ROWS):
        rows_HTD = query_THD[start : start + ROWS].transpose(0, 1)
        first = offset + start
        seen = first + rows_HTD.shape[1]
        mask = torch.ones(seen - first, seen, dtype=torch.bool).tril(first)
        out_HTD = scaled_dot_product_attention(
            rows_HTD[None], keys_KTD[None, :, :seen], values_KTD[None, :, :seen],
            attn_mask=mask, scale=scale, enable_gqa=True,
        )[0]  # fmt: skip
        parts.append(out_HTD.transpose(0, 1))
    return torch.cat(parts).float()

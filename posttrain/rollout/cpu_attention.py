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
        shared, single = _shared_prefixes(table, lengths, decoding, kv_cache.shape[2])
        for numbers, num_blocks in shared:
            rows = [starts[i] for i in numbers]
            out_GHD = _attend_after_prefix(
                query[rows], kv_cache, table[numbers], [lengths[i] for i in numbers], num_blocks,
                self.scale,
            )  # fmt: skip
            output[rows] = out_GHD.view_as(output[rows])
        for i in single:
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


def _shared_prefixes(
    table: Tensor, lengths: Sequence[int], decoding: Sequence[int], block_size: int
) -> tuple[list[tuple[list[int], int]], list[int]]:
    """Decoding sequences whose first blocks are the same, as the completions of a group are.

    Returns:
        (sequences, leading blocks that they share) of every such group; all other sequences.
    """
    by_first: dict[int, list[int]] = {}
    for i in decoding:
        by_first.setdefault(int(table[i, 0]), []).append(i)
    shared = []
    single = set(range(len(lengths)))
    for numbers in by_first.values():
        full_blocks = min(lengths[i] for i in numbers) // block_size
        rows = table[numbers, :full_blocks]
        num_blocks = int((rows == rows[0]).all(0).long().cumprod(0).sum())
        if len(numbers) > 1 and num_blocks:
            shared.append((numbers, num_blocks))
            single -= set(numbers)
    return shared, sorted(single)


def _cached(kv_cache: Tensor, blocks: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, each [kv_heads, num_keys, head_size]."""
    block_size = kv_cache.shape[2]
    keys_KTD, values_KTD = _of_blocks(kv_cache, blocks[: -(-num_keys // block_size)])
    return keys_KTD[:, :num_keys], values_KTD[:, :num_keys]


def _of_blocks(kv_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, [..., blocks] -> each [..., kv_heads, keys, head_size].

    In a block vLLM keeps the keys transposed, [head_size, block_size], before the values.
    """
    kv_heads, block_size, head_size = *kv_cache.shape[1:3], kv_cache.shape[3] // 2
    *lead, num_blocks = blocks.shape
    both = kv_cache[blocks.long()].view(*blocks.shape, kv_heads, 2 * block_size, head_size)
    keys, values = both.chunk(2, dim=-2)
    keys = keys.reshape(*blocks.shape, kv_heads, head_size, block_size).transpose(-2, -1)
    keys, values = (
        part.transpose(-4, -3).reshape(*lead, kv_heads, num_blocks * block_size, head_size)
        for part in (keys, values)
    )
    return keys, values


def _attend_after_prefix(
    query_GHD: Tensor, kv_cache: Tensor, table: Tensor, lengths: Sequence[int], num_blocks: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """One new token of each of G sequences that share their first blocks: [G, heads, head_size].

    The prefix is read once for all of them, what follows it for each; in float64.
    """
    num_rows, heads, head_size = query_GHD.shape
    block_size = kv_cache.shape[2]
    prefix = num_blocks * block_size
    last_block = -(-max(lengths) // block_size)
    prefix_keys, prefix_values = (x.double() for x in _of_blocks(kv_cache, table[0, :num_blocks]))
    own_keys, own_values = (
        x.double() for x in _of_blocks(kv_cache, table[:, num_blocks:last_block])
    )
    kv_heads = prefix_keys.shape[0]
    query_GKRD = query_GHD.double().view(num_rows, kv_heads, heads // kv_heads, head_size) * scale
    query_KND = query_GKRD.transpose(0, 1).reshape(kv_heads, -1, head_size)
    to_prefix = _split_rows(query_KND @ prefix_keys.transpose(-2, -1), num_rows)
    to_own = query_GKRD @ own_keys.transpose(-2, -1)
    places = prefix + torch.arange(own_keys.shape[-2])
    unseen_GT = places >= torch.tensor(lengths).unsqueeze(1)
    to_own = to_own.masked_fill(unseen_GT[:, None, None], -torch.inf)
    weights = torch.cat([to_prefix, to_own], dim=-1).softmax(-1)
    weights_KNP = weights[..., :prefix].transpose(0, 1).reshape(kv_heads, -1, prefix)
    out = _split_rows(weights_KNP @ prefix_values, num_rows)
    out = out + weights[..., prefix:] @ own_values.nan_to_num()
    return out.reshape(num_rows, heads, head_size).float()


def _split_rows(x_KNX: Tensor, num_rows: int) -> Tensor:
    """[kv_heads, G x R, x] -> [G, kv_heads, R, x]."""
    return x_KNX.unflatten(1, (num_rows, -1)).transpose(0, 1)


def _attend(query_THD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, scale: float) -> Tensor:
    """Attention of the last tokens over all keys, [tokens, heads, head_size].

    A few rows are summed in float64: for those PyTorch's kernel has one float32 chain, too.
    """
    offset = keys_KTD.shape[1] - len(query_THD)
    if len(query_THD) < FEW_ROWS:
        query_THD, keys_KTD, values_KTD = (x.double() for x in (query_THD, keys_KTD, values_KTD))
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

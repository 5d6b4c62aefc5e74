"""Attention over long contexts for vLLM on a CPU in float32.

vLLM's own CPU kernel adds up all keys of a query in one float32 chain. Over the 15,000 keys of
ten minutes of audio that leaves relative errors near 1e-4 in single outputs, ten to twenty times
those of PyTorch's kernel, and log-probabilities that differ from the learner's by 1e-4. GPUs sum
in tiles and are not affected, nor are short contexts: those stay with vLLM's kernel.
"""

from __future__ import annotations

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
        sequences = zip(starts, starts[1:], lengths, attn_metadata.block_table, strict=False)
        for start, end, num_keys, blocks in sequences:
            keys_KTD, values_KTD = _cached(kv_cache, blocks, num_keys)
            out_THD = _attend(query[start:end], keys_KTD, values_KTD, self.scale)
            output[start:end] = out_THD.view_as(output[start:end])
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


def _cached(kv_cache: Tensor, blocks: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values, each [kv_heads, num_keys, head_size].

    In a block vLLM keeps the keys transposed, [head_size, block_size], before the values.
    """
    kv_heads, block_size = kv_cache.shape[1:3]
    used = blocks[: -(-num_keys // block_size)].long()
    blocks_NKSD = kv_cache[used].view(len(used), kv_heads, 2 * block_size, -1)
    keys, values = blocks_NKSD.chunk(2, dim=2)
    keys_NKSD = keys.reshape(len(used), kv_heads, -1, block_size).transpose(2, 3)
    keys_KTD, values_KTD = (
        part_NKSD.transpose(0, 1).reshape(kv_heads, -1, part_NKSD.shape[-1])[:, :num_keys]
        for part_NKSD in (keys_NKSD, values)
    )
    return keys_KTD, values_KTD


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

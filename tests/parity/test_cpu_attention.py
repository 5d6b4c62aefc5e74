"""Long-context attention on the CPU against float64, on vLLM's own cache layout."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from probes import answer_long_prompts

pytest.importorskip("vllm")
if torch.cuda.is_available():
    pytest.skip("vLLM is built without its CPU kernels", allow_module_level=True)

from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from posttrain.rollout import cpu_attention

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_KEYS = 6, 2, 32, 128, 2_500
SCALE = HEAD_SIZE**-0.5


@pytest.fixture(scope="module")
def cached() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [keys, kv_heads, size], as vLLM's kernel stores them in shuffled blocks."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    keys, values = (torch.randn(NUM_KEYS, KV_HEADS, HEAD_SIZE) * 2 for _ in range(2))
    num_blocks = -(-NUM_KEYS // BLOCK_SIZE)
    cache = torch.zeros(num_blocks + 3, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    blocks = torch.randperm(num_blocks + 3)[:num_blocks].int()
    slots = blocks.repeat_interleave(BLOCK_SIZE)[:NUM_KEYS] * BLOCK_SIZE
    slots = (slots + torch.arange(NUM_KEYS) % BLOCK_SIZE).long()
    halves = cache.view(len(cache), KV_HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, "vec", k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    return keys, values, cache, blocks


def test_cached_keys_are_read_back_in_order(cached) -> None:
    keys, values, cache, blocks = cached
    read_keys, read_values = cpu_attention._cached(cache, blocks, NUM_KEYS)
    assert torch.equal(read_keys, keys.transpose(0, 1))
    assert torch.equal(read_values, values.transpose(0, 1))


@pytest.mark.parametrize("num_rows", [1, 63, 64, 1_100, NUM_KEYS])
def test_attention_equals_float64(cached, num_rows: int) -> None:
    """Decoding, a prompt after a cached prefix, and a whole prompt in several pieces."""
    keys, values = (x.transpose(0, 1) for x in cached[:2])
    query_THD = torch.randn(num_rows, HEADS, HEAD_SIZE) * 2
    ours_THD = cpu_attention._attend(query_THD, keys, values, SCALE)
    group = HEADS // KV_HEADS
    scores_HTK = (
        torch.einsum("thd,hkd->htk", query_THD.double(), keys.double().repeat_interleave(group, 0))
        * SCALE
    )
    future = torch.ones(num_rows, NUM_KEYS, dtype=torch.bool).triu(NUM_KEYS - num_rows + 1)
    weights_HTK = scores_HTK.masked_fill(future, float("-inf")).softmax(-1)
    exact_THD = (weights_HTK @ values.double().repeat_interleave(group, 0)).transpose(0, 1)
    error = (ours_THD - exact_THD).abs().max() / exact_THD.abs().max()
    print(f"{num_rows} rows: largest error {error:.1e} of the largest output")
    assert error <= (1e-7 if num_rows < 64 else 5e-6), "few rows are summed in float64"


@pytest.mark.slow
def test_long_prompts_take_this_attention_and_none_is_cut(nano: str, tmp_path: Path) -> None:
    """Eight prompts of 1,500 audio tokens are more than the engine prefills at once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        completions, calls = pool.apply(answer_long_prompts, (nano, tmp_path))
    assert completions == [4] * 8
    assert calls > 0

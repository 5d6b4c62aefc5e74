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


@pytest.mark.parametrize("lengths", [(2_500, 2_305, 2_400), (2_433, 2_433), (2_432, 2_432)])
def test_siblings_read_their_prefix_once_and_equal_one_by_one(cached, lengths: tuple) -> None:
    """19 blocks; the first 18 or 19 are shared, or all there is. A stranger stays by himself."""
    _, _, cache, blocks = cached
    other = torch.arange(len(blocks), dtype=torch.int32)
    table = torch.stack([blocks] * len(lengths) + [other])
    starts = len(lengths)
    if max(lengths) > 2_432:
        table[1, 19] = other[-1]
    shared, single = cpu_attention._shared_prefixes(
        table, [*lengths, 300], range(starts + 1), BLOCK_SIZE
    )
    ((numbers, num_blocks),) = shared
    assert numbers == list(range(starts)) and single == [starts]
    assert num_blocks == min(lengths) // BLOCK_SIZE
    query_GHD = torch.randn(starts, HEADS, HEAD_SIZE) * 2
    together = cpu_attention._attend_after_prefix(
        query_GHD, cache, table[numbers], lengths, num_blocks, SCALE
    )
    for i, length in enumerate(lengths):
        keys, values = cpu_attention._cached(cache, table[i], length)
        alone = cpu_attention._attend(query_GHD[i : i + 1], keys, values, SCALE)[0]
        torch.testing.assert_close(together[i], alone, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_long_prompts_take_this_attention_and_none_is_cut(nano: str, tmp_path: Path) -> None:
    """Eight prompts of 1,500 audio tokens are more than the engine prefills at once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        completions, calls = pool.apply(answer_long_prompts, (nano, tmp_path))
    assert completions == [4] * 8
    assert calls > 0

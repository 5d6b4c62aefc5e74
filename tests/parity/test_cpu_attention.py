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
Cached = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def cached() -> Cached:
    """Keys and values [keys, kv_heads, size], as vLLM's kernel stores them in shuffled blocks."""
    num_blocks = -(-NUM_KEYS // BLOCK_SIZE)
    return stored_by_vllm(torch.randperm(num_blocks + 3)[:num_blocks].int())


def stored_by_vllm(blocks: torch.Tensor) -> Cached:
    current_platform.import_kernels()
    torch.manual_seed(0)
    keys, values = (torch.randn(NUM_KEYS, KV_HEADS, HEAD_SIZE) * 2 for _ in range(2))
    cache = torch.zeros(len(blocks) + 3, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
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


def exact_attention(
    query_THD: torch.Tensor, keys_KND: torch.Tensor, values_KND: torch.Tensor
) -> torch.Tensor:
    """Causal attention of the last tokens in float64, [tokens, heads, head_size]."""
    num_rows, num_keys = len(query_THD), keys_KND.shape[1]
    keys, values = (
        x.double().repeat_interleave(HEADS // KV_HEADS, 0) for x in (keys_KND, values_KND)
    )
    scores_HTN = torch.einsum("thd,hkd->htk", query_THD.double(), keys) * SCALE
    future = torch.ones(num_rows, num_keys, dtype=torch.bool).triu(num_keys - num_rows + 1)
    weights_HTN = scores_HTN.masked_fill(future, float("-inf")).softmax(-1)
    return (weights_HTN @ values).transpose(0, 1)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 1_100, NUM_KEYS])
def test_attention_equals_float64(cached, num_rows: int) -> None:
    """Decoding, a prompt after a cached prefix, in pieces, and a whole prompt at once."""
    keys, values = (x.transpose(0, 1) for x in cached[:2])
    query_THD = torch.randn(num_rows, HEADS, HEAD_SIZE) * 2
    ours_THD = cpu_attention._attend(query_THD, keys, values, SCALE)
    exact_THD = exact_attention(query_THD, keys, values)
    error = (ours_THD - exact_THD).abs().max() / exact_THD.abs().max()
    print(f"{num_rows} rows: largest error {error:.1e} of the largest output")
    assert error <= (1e-7 if num_rows < 64 else 5e-6), "few rows are summed in float64"


@pytest.mark.parametrize("lengths", [(2_500, 2_305, 2_400), (2_433, 2_433), (2_432, 2_432)])
def test_siblings_read_their_prefix_once_and_equal_one_by_one(cached, lengths: tuple) -> None:
    """19 blocks; the first 18 or 19 are shared, or all there is. A stranger stays by himself."""
    _, _, cache, blocks = cached
    other = torch.arange(len(blocks), dtype=torch.int32)
    table = torch.stack([blocks] * len(lengths) + [other, blocks])
    starts = len(lengths)
    if max(lengths) > 2_432:
        table[1, 19] = other[-1]
    groups, others = cpu_attention._groups(
        table, [*lengths, 300, 2_500], range(starts + 1), BLOCK_SIZE
    )
    (numbers, num_blocks), stranger = groups
    assert numbers == list(range(starts)) and stranger == ([starts], 2)
    assert others == [starts + 1], "it is not decoding"
    assert num_blocks == min(lengths) // BLOCK_SIZE
    query_GHD = torch.randn(starts, HEADS, HEAD_SIZE) * 2
    together = cpu_attention._attend_after_prefix(
        query_GHD, cache, table[numbers], lengths, num_blocks, SCALE
    )
    for i, length in enumerate(lengths):
        keys, values = cpu_attention._cached(cache, table[i], length)
        alone = cpu_attention._attend(query_GHD[i : i + 1], keys, values, SCALE)[0]
        assert (together[i] - alone).abs().max() <= 5e-6 * alone.abs().max(), "float32 in a block"


def test_a_common_system_prompt_makes_no_group() -> None:
    """The first of 4 and 5 blocks is the same; the third sequence is shorter than a block."""
    table = torch.tensor([[7, 1, 2, 3, 0], [7, 4, 5, 6, 8], [9, 0, 0, 0, 0]], dtype=torch.int32)
    groups, others = cpu_attention._groups(table, [530, 640, 100], range(3), BLOCK_SIZE)
    assert groups == [([0], 4), ([1], 5)] and others == [2]
    table[1, 1] = 1
    groups, _ = cpu_attention._groups(table, [530, 640, 100], range(3), BLOCK_SIZE)
    assert groups == [([0, 1], 2)], "half is as much as a clip"


@pytest.mark.parametrize("length", [128, 129, 2_432, NUM_KEYS])
@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_decoding_equals_float64_wherever_the_blocks_lie(order: str, length: int) -> None:
    """Falling is how vLLM hands out the blocks that a request before gave back."""
    num_blocks = -(-NUM_KEYS // BLOCK_SIZE)
    rising = torch.arange(1, num_blocks + 1, dtype=torch.int32)
    orders = {
        "rising": rising, "falling": rising.flip(0),
        "shuffled": torch.randperm(num_blocks + 3)[:num_blocks].int(),
    }  # fmt: skip
    blocks = orders[order]
    keys, values, cache, _ = stored_by_vllm(blocks)
    query_GHD = torch.randn(1, HEADS, HEAD_SIZE) * 2
    ours_HD = cpu_attention._attend_after_prefix(
        query_GHD, cache, blocks[None], [length], length // BLOCK_SIZE, SCALE
    )[0]
    exact_HD = exact_attention(
        query_GHD, keys[:length].transpose(0, 1), values[:length].transpose(0, 1)
    )[0]
    error = (ours_HD - exact_HD).abs().max() / exact_HD.abs().max()
    assert error <= 5e-6, "as exact as a prompt"


@pytest.mark.slow
def test_long_prompts_take_this_attention_and_none_is_cut(nano: str, tmp_path: Path) -> None:
    """Eight prompts of 1,500 audio tokens are more than the engine prefills at once."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        completions, calls = pool.apply(answer_long_prompts, (nano, tmp_path))
    assert completions == [4] * 8
    assert calls > 0

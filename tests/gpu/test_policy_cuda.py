"""The policy on a GPU against the same policy on the CPU; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from posttrain.model.flex_prefix import bucket, flex_prefix_attention
from posttrain.model.load import load_model
from posttrain.model.policy import GroupTensors, Policy, group_logprobs
from posttrain.model.shared_prefix import packed_layout, sdpa_prefix_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_logprobs_on_cuda_equal_those_on_cpu(nano: str, shared_prefix: bool) -> None:
    model = load_model(nano)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 300, (40,), generator=generator)
    ids = torch.randint(0, 300, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    results = []
    for device in ("cpu", "cuda"):
        policy = Policy(model, shared_prefix=shared_prefix).to(device)
        group = GroupTensors(prompt.to(device), (ids * mask).to(device), mask.to(device))
        with torch.no_grad():
            ((logprobs, _),) = group_logprobs(policy, [group], temperature=1.0)
        results.append(logprobs.cpu())
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_equals_sdpa_with_gradients(kv_heads: int) -> None:
    """Two batches of one bucket: the second must not be read with the first one's mask."""
    for prompts, completions in (([1_500, 70], [[40, 1, 90], [33, 60]]), ([1_490], [[60] * 5])):
        generator = torch.Generator().manual_seed(0)
        layout = packed_layout(prompts, completions, torch.device("cuda"))
        assert bucket(layout.num_tokens) == 1_792
        query, key, value = (
            torch.randn(1, heads, layout.num_tokens, 64, generator=generator)
            .cuda().requires_grad_()
            for heads in (4, kv_heads, kv_heads)
        )  # fmt: skip
        weights = torch.randn(query.shape, generator=generator).cuda()
        results = []
        for attend in (sdpa_prefix_attention, flex_prefix_attention):
            output = attend(query, key, value, layout, 0.125)
            gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
            results.append((output, *gradients))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)

"""The policy on a GPU against the same policy on the CPU; skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from posttrain.model.load import load_model
from posttrain.model.policy import GroupTensors, Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logprobs_on_cuda_equal_those_on_cpu(nano: str) -> None:
    model = load_model(nano)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 300, (40,), generator=generator)
    ids = torch.randint(0, 300, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    results = []
    for device in ("cpu", "cuda"):
        policy = Policy(model).to(device)
        group = GroupTensors(prompt.to(device), (ids * mask).to(device), mask.to(device))
        with torch.no_grad():
            ((logprobs, _),) = policy([group], temperature=1.0, num_chunks=3)
        results.append(logprobs.cpu())
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)

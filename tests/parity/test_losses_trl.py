"""Losses and corrections against TRL 1.16's own code on the same tensors, to 1e-6."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from posttrain.algorithm.importance import engine_importance_ratio
from posttrain.algorithm.losses import loss_denominator, policy_loss

B, T, MAX_LENGTH = 6, 9, 12


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 4, 1, 7, 5, 9]).unsqueeze(1)
    logprobs = -2 * torch.rand(B, T, generator=g)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.5 * torch.randn(B, T, generator=g),
        "ref": logprobs + 0.3 * torch.randn(B, T, generator=g),
        "sampled": logprobs + 0.2 * torch.randn(B, T, generator=g),
        "advantages": torch.randn(B, generator=g),
        "mask": (torch.arange(T) < lengths).long(),
    }


def trl_loss(data: dict[str, torch.Tensor], logprobs: torch.Tensor, **options: Any) -> torch.Tensor:
    """GRPOTrainer._compute_loss itself; only the model forward is replaced."""
    trainer: Any = object.__new__(GRPOTrainer)
    trainer.loss_type = options["loss_type"]
    trainer.importance_sampling_level = options["importance_sampling_level"]
    trainer.epsilon_low = options["epsilon"]
    trainer.epsilon_high = options["epsilon_high"]
    trainer.beta = options["beta"]
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer.use_vllm = options["ratio"] is not None
    trainer.vllm_importance_sampling_correction = options["ratio"] is not None
    trainer.max_completion_length = MAX_LENGTH
    trainer.current_gradient_accumulation_steps = 1
    trainer._entropy_bonus_enabled = False
    trainer.aux_loss_enabled = False
    trainer._metrics = {"train": _Anything(), "eval": _Anything()}
    trainer.model = SimpleNamespace(training=True)
    trainer.args = SimpleNamespace(
        delta=options["delta"], use_bias_correction_kl=options["use_bias_correction_kl"],
        steps_per_generation=1,
    )  # fmt: skip
    trainer.accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, **k: x
    )
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (
        logprobs, torch.zeros_like(logprobs), None,
    )  # fmt: skip
    empty = torch.zeros(B, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty,
        "completion_ids": torch.zeros(B, T, dtype=torch.long), "completion_mask": data["mask"],
        "advantages": data["advantages"], "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"], "importance_sampling_ratio": options["ratio"],
        "num_items_in_batch": data["mask"].sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, None, inputs)


class _Anything(dict):
    def __missing__(self, key: str) -> list:
        return self.setdefault(key, [])


def ours(data: dict[str, torch.Tensor], logprobs: torch.Tensor, **options: Any) -> torch.Tensor:
    tokens = int(data["mask"].sum())
    denominator = loss_denominator(
        options["loss_type"], num_sequences=B, num_tokens=tokens, num_rank_tokens=tokens,
        num_ranks=1, max_completion_length=MAX_LENGTH,
    )  # fmt: skip
    loss, _ = policy_loss(
        logprobs, data["old"], data["advantages"], data["mask"], denominator=denominator,
        loss_type=options["loss_type"],
        importance_sampling_level=options["importance_sampling_level"],
        epsilon=options["epsilon"], epsilon_high=options["epsilon_high"], delta=options["delta"],
        engine_ratio=options["ratio"], ref_logprobs_BT=data["ref"], beta=options["beta"],
        use_bias_correction_kl=options["use_bias_correction_kl"],
    )  # fmt: skip
    return loss


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_and_gradient_equal_trl(
    loss_type: str, level: str, beta: float, delta: float | None, corrected: bool
) -> None:
    data = tensors()
    ratio = None
    if corrected:
        ratio = engine_importance_ratio(
            data["old"], data["sampled"], data["mask"], mode="token_truncate", clip_min=None,
            clip_max=3.0,
        )  # fmt: skip
    options = dict(
        loss_type=loss_type, importance_sampling_level=level, epsilon=0.2, epsilon_high=0.28,
        delta=delta, beta=beta, ratio=ratio, use_bias_correction_kl=True,
    )  # fmt: skip
    results = []
    for function in (trl_loss, ours):
        logprobs = data["logprobs"].clone().requires_grad_(True)
        loss = function(data, logprobs, **options)
        loss.backward()
        results.append((loss.detach(), logprobs.grad))
    (theirs, their_grad), (mine, my_grad) = results
    assert abs(float(theirs - mine)) <= 1e-6
    torch.testing.assert_close(my_grad, their_grad, atol=1e-6, rtol=1e-5)


def trl_ratio(data: dict[str, torch.Tensor], mode: str, low: float | None) -> torch.Tensor:
    """The statements of TRL's own source that compute the ratio, run on our tensors."""
    source = inspect.getsource(GRPOTrainer)
    found = re.search(
        r"\n( +)per_token_logps_diff = \(old_per_token_logps - sampling.*?(?=\n +# Compute the "
        r"per-token log probabilities for the reference)", source, re.DOTALL,
    )  # fmt: skip
    assert found, "TRL's source changed: look at vllm_importance_sampling_ratio again"
    code = textwrap.dedent(found.group(0).strip("\n"))
    names = {
        "torch": torch, "math": math, "old_per_token_logps": data["old"],
        "sampling_per_token_logps": data["sampled"], "mask": data["mask"],
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=1.2,
        ),
    }  # fmt: skip
    exec(code, names)
    return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("low", [None, 0.8])
def test_correction_modes_equal_trl(mode: str, low: float | None) -> None:
    data = tensors(1)
    mine = engine_importance_ratio(
        data["old"], data["sampled"], data["mask"], mode=mode, clip_min=low, clip_max=1.2
    )
    torch.testing.assert_close(mine, trl_ratio(data, mode, low), atol=1e-6, rtol=1e-6)

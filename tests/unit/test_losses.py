"""Hand-worked losses and advantages."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.algorithm.advantages import decoupled_advantages, group_advantages
from posttrain.algorithm.distillation import reverse_kl_advantages
from posttrain.algorithm.importance import engine_importance_ratio
from posttrain.algorithm.kl import k3_kl
from posttrain.algorithm.losses import loss_denominator, policy_loss

LOG2 = math.log(2.0)


def loss_of(ratio: float, advantage: float, **options: object) -> float:
    """Loss of one token whose probability went from p to ratio * p."""
    loss, _ = policy_loss(
        torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([advantage]),
        torch.ones(1, 1), denominator=1.0, **options,
    )  # fmt: skip
    return float(loss)


def test_advantages_of_a_teacher_by_hand() -> None:
    """A token that the teacher likes better than the student does is pushed up."""
    student = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    advantages = reverse_kl_advantages(student, torch.tensor([[-0.5, -3.0]]), 0.5)
    assert advantages.tolist() == [[0.25, -0.5]] and not advantages.requires_grad


def test_clipping_by_hand() -> None:
    assert loss_of(1.1, 2.0) == pytest.approx(-2.2)
    assert loss_of(2.0, 2.0) == pytest.approx(-2.4)
    assert loss_of(2.0, 2.0, epsilon_high=0.5) == pytest.approx(-3.0)
    assert loss_of(2.0, -1.0) == pytest.approx(2.0)
    assert loss_of(9.0, -1.0, delta=4.0) == pytest.approx(4.0)
    assert loss_of(0.5, -1.0) == pytest.approx(0.8)


def test_cispo_by_hand() -> None:
    # -min(2, 1.5) * 3 * log 2
    assert loss_of(2.0, 3.0, loss_type="cispo", epsilon_high=1.5) == pytest.approx(-4.5 * LOG2)


def test_sequence_level_uses_the_mean_log_ratio() -> None:
    logprobs = torch.tensor([[math.log(1.2), 0.0, 5.0]])
    mask = torch.tensor([[1, 1, 0]])
    loss, _ = policy_loss(
        logprobs, torch.zeros(1, 3), torch.tensor([1.0]), mask, denominator=1.0,
        loss_type="grpo", importance_sampling_level="sequence",
    )  # fmt: skip
    assert float(loss) == pytest.approx(-math.sqrt(1.2))


def test_kl_by_hand() -> None:
    kl = k3_kl(torch.tensor([[0.0]]), torch.tensor([[LOG2]]))
    assert float(kl) == pytest.approx(2.0 - LOG2 - 1.0)
    loss, metrics = policy_loss(
        torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0.0]), torch.ones(1, 1),
        denominator=1.0, beta=0.5, ref_logprobs_BT=torch.full((1, 1), LOG2),
    )  # fmt: skip
    assert float(loss) == pytest.approx(0.5 * (1.0 - LOG2))
    assert float(metrics["kl"]) == pytest.approx(1.0 - LOG2)


def test_engine_ratio_modes_by_hand() -> None:
    learner = torch.tensor([[math.log(4.0), 0.0, 9.0]])
    sampled, mask = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])

    def ratio(mode: str) -> list:
        return engine_importance_ratio(
            learner, sampled, mask, mode=mode, clip_min=0.5, clip_max=3.0
        ).tolist()

    assert ratio("token_truncate") == [[3.0, 1.0, 1.0]]
    assert ratio("token_mask") == [[0.0, 1.0, 1.0]]
    assert ratio("sequence_truncate") == [[3.0]]
    assert ratio("sequence_mask") == [[0.0]]
    with pytest.raises(ValueError, match="mode"):
        ratio("token_drop")


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_micro_batches_add_up_to_the_whole_batch(loss_type: str) -> None:
    torch.manual_seed(0)
    logprobs, old = -torch.rand(4, 6), -torch.rand(4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    advantages = torch.randn(4)
    denominator = loss_denominator(
        loss_type, num_sequences=4, num_tokens=13, num_rank_tokens=13, num_ranks=1,
        max_completion_length=6,
    )  # fmt: skip

    def loss(rows: slice) -> float:
        return float(
            policy_loss(
                logprobs[rows], old[rows], advantages[rows], mask[rows],
                denominator=denominator, loss_type=loss_type,
            )[0]
        )  # fmt: skip

    assert loss(slice(0, 1)) + loss(slice(1, 4)) == pytest.approx(loss(slice(0, 4)), abs=1e-6)


def test_denominators() -> None:
    sizes = dict(num_sequences=8, num_tokens=100, num_rank_tokens=40, num_ranks=2,
                 max_completion_length=64)  # fmt: skip
    values = {k: loss_denominator(k, **sizes) for k in ("grpo", "dr_grpo", "dapo", "bnpo")}
    assert values == {"grpo": 8.0, "dr_grpo": 512.0, "dapo": 100.0, "bnpo": 80.0}
    with pytest.raises(ValueError, match="loss_type"):
        loss_denominator("ppo", **sizes)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    valid = torch.ones(2, 4, dtype=torch.bool)
    advantages, metrics = group_advantages(rewards, valid, "group")
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert advantages[0].tolist() == pytest.approx([expected, -expected, -expected, expected])
    assert advantages[1].tolist() == [0.0] * 4
    assert metrics["reward/zero_variance_groups"] == 0.5
    assert group_advantages(rewards, valid, "none")[0][0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_completions_without_a_reward_do_not_count() -> None:
    rewards = torch.tensor([[1.0, 0.0, 123.0]])
    valid = torch.tensor([[True, True, False]])
    advantages, _ = group_advantages(rewards, valid, "none")
    assert advantages.tolist() == [[0.5, -0.5, 0.0]]
    with pytest.raises(ValueError, match="max_completion_length"):
        group_advantages(rewards, torch.zeros(1, 3, dtype=torch.bool), "group")


def test_decoupled_advantages_equal_trl_and_a_hand_worked_case() -> None:
    """Two rewards of very different spread; TRL's lines for `normalize_then_sum`, written out."""
    rewards = torch.tensor(
        [[[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]], [[5.0, 0.0], [5.0, 1.0], [8.0, 5.0]]]
    )
    weights = torch.tensor([1.0, 0.5])
    advantages, metrics = decoupled_advantages(rewards, weights, torch.ones(2, 3, dtype=torch.bool))
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    total = (((rewards - mean) / (std + 1e-4)) * weights).sum(-1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    assert torch.allclose(advantages, expected, atol=1e-6)
    # first group by hand: (-1, 0, 1) and (-1, 1, 0) / 2 -> -1.5, 0.5, 1.0 before the batch's scale
    assert total[0].tolist() == pytest.approx([-1.5, 0.5, 1.0], abs=1e-3)
    assert metrics["reward/zero_variance_groups"] == 0.0


def test_decoupled_advantages_leave_out_what_does_not_count() -> None:
    nan = float("nan")
    rewards = torch.tensor([[[1.0, nan], [3.0, nan], [9.0, 9.0]]])
    valid = torch.tensor([[True, True, False]])
    advantages, _ = decoupled_advantages(rewards, torch.ones(2), valid)
    assert advantages[0, 2] == 0.0 and torch.isfinite(advantages).all()
    assert advantages[0, 0] == pytest.approx(-advantages[0, 1].item()) and advantages[0, 0] < 0

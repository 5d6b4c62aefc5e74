"""On-policy distillation: the teacher's opinion of every sampled token, as an advantage.

The student samples; the gradient of the sequence-level reverse KL(student || teacher), with each
token's own term only (discount 0), is that of a policy gradient whose advantage at token t is

    A_t = -(log p_student(t) - log p_teacher(t))

Source: "On-policy distillation" (Thinking Machines Lab, October 2025); MiniLLM (2306.08543), eq. 2;
GKD (2306.13649), section 3.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl_advantages(student_BT: Tensor, teacher_BT: Tensor, coefficient: float) -> Tensor:
    """(B, T) advantages of sampled tokens, nats times `coefficient`; no gradient.

    Args:
        student_BT: (B, T) log-probabilities of the policy that sampled.
        teacher_BT: (B, T) of the teacher, at the same temperature.
    """
    return coefficient * (teacher_BT - student_BT).detach()

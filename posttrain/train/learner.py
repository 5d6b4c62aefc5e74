"""One DeepSpeed rank: groups and advantages in, one optimizer step out.

    prepare (audio embeddings, tensors) -> forward packed groups -> policy_loss -> backward -> step

Every rank sees only its own micro-batches. Denominators are summed over ranks first, so the step's
gradient is that of the undivided batch. Ranks that share a sequence get the same micro-batches and
compute the same loss from their shares of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posttrain.algorithm.distillation import reverse_kl_advantages
from posttrain.algorithm.importance import engine_importance_ratio
from posttrain.algorithm.losses import loss_denominator, policy_loss
from posttrain.data.rows import Row
from posttrain.model.policy import GroupTensors, group_logprobs
from posttrain.train.deepspeed_config import deepspeed_config
from posttrain.train.optimizer_state import load_rank_state
from posttrain.train.policy_rank import PolicyRank
from posttrain.train.schedule import lr_factor
from posttrain.types import Group


@dataclass(frozen=True)
class ScoredGroup:
    """What the learner trains on.

    Attributes:
        advantages: (G,) one a completion.
        trained: (G,) False for completions that must not move the policy (truncated, unscorable).
    """

    row: Row
    group: Group
    advantages: tuple[float, ...]
    trained: tuple[bool, ...]

    def only(self, numbers: Sequence[int]) -> ScoredGroup:
        """The same prompt with some of the completions."""

        def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in numbers)

        group = replace(self.group, completions=chosen(self.group.completions))
        return ScoredGroup(self.row, group, chosen(self.advantages), chosen(self.trained))


class LearnerRank(PolicyRank):
    """A rank of GRPO."""

    def build(self, resume_dir: str | None = None) -> dict[str, int]:
        """Loads the policy (or a checkpoint of it), wraps it in DeepSpeed; returns sizes."""
        import deepspeed

        recipe = self.recipe
        resume = Path(resume_dir) if resume_dir else None
        sizes = self.load(resume)
        self.engine, *_ = deepspeed.initialize(
            model=self.policy,
            model_parameters=self.trainable(),
            config=deepspeed_config(recipe, self.device.type),
        )
        if recipe.algorithm.beta and not recipe.lora.enabled:
            self.reference = self.build_reference()
        if recipe.teacher.path is not None:
            self.teacher, self.teacher_audio = self.build_teacher()
        if resume:
            load_rank_state(self.engine, resume / "optimizer" / f"rank-{self.rank:05d}.safetensors")
        return sizes

    # --- one optimizer step -------------------------------------------------------------------

    def update(self, micro_batches: Sequence[Sequence[ScoredGroup]], step: int) -> dict[str, float]:
        """`num_iterations` optimizer steps on this rank's micro-batches.

        Returns:
            Metrics over all ranks, of the last iteration; those of `engine/` of the first.
            `train/skipped` is 1 when gradients of any were not finite and the weights were left
            alone.
        """
        batches = self._prepare(micro_batches)
        verified = self.verify(batches[0]["tensors"][0])
        self._fixed_logprobs(batches)
        self._set_learning_rate(step)
        passes = [
            self._summarise(self.accumulate(batches)) | self._step()
            for _ in range(self.recipe.algorithm.num_iterations)
        ]
        on_policy = {k: v for k, v in passes[0].items() if k.startswith("engine/")}
        skipped = {"train/skipped": max(metrics["train/skipped"] for metrics in passes)}
        return passes[-1] | on_policy | skipped | verified

    def _prepare(self, micro_batches: Sequence[Sequence[ScoredGroup]]) -> list[dict[str, Any]]:
        """Every micro-batch as lists, one entry a group."""
        batches = []
        for scored in micro_batches:
            items = [self._group_batch(one) for one in scored]
            batches.append({key: [item[key] for item in items] for key in items[0]})
        return batches

    def _group_batch(self, scored: ScoredGroup) -> dict[str, Any]:
        group, device = scored.group, self.device
        completions = group.completions
        longest = max(c.num_tokens for c in completions)
        ids_GT = torch.zeros(len(completions), longest, dtype=torch.long)
        sampled_GT = torch.zeros(len(completions), longest)
        mask_GT = torch.zeros(len(completions), longest, dtype=torch.bool)
        for i, completion in enumerate(completions):
            ids_GT[i, : completion.num_tokens] = torch.tensor(completion.token_ids)
            sampled_GT[i, : completion.num_tokens] = torch.tensor(completion.logprobs)
            mask_GT[i, : completion.num_tokens] = True
        trained_G1 = torch.tensor(scored.trained).unsqueeze(1)
        tensors = GroupTensors(
            torch.tensor(group.prompt_token_ids, device=device),
            ids_GT.to(device), mask_GT.to(device), **self.audio_inputs(scored.row, group),
        )  # fmt: skip
        teacher = None
        if self.recipe.teacher.path is not None:
            own, _ = self.teacher_audio.fields(scored.row.audio)
            teacher = GroupTensors(
                tensors.prompt_ids_P, tensors.completion_ids_GT, tensors.mask_GT, **own
            )
        return {
            "tensors": tensors,
            "teacher_tensors": teacher,
            "sampled": sampled_GT.to(device),
            "loss_mask": (mask_GT & trained_G1).to(device),
            "advantages": torch.tensor(scored.advantages, device=device),
        }

    def _forward(self, policy: Any, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
        temperature = self.recipe.sampling.temperature
        return group_logprobs(policy, batch["tensors"], temperature=temperature)

    @torch.no_grad()
    def _fixed_logprobs(self, batches: Sequence[dict[str, Any]]) -> None:
        """Old and reference log-probabilities, where the loss needs more than the live ones."""
        algorithm, temperature = self.recipe.algorithm, self.recipe.sampling.temperature
        stale_old = algorithm.num_iterations > 1 or self.recipe.lora.dropout > 0
        for batch in batches:
            batch["old"] = batch["ref"] = [None] * len(batch["tensors"])
            if stale_old:
                self.engine.eval()
                batch["old"] = [lp for lp, _ in self._forward(self.engine, batch)]
                self.engine.train()
            if self.recipe.teacher.path is not None:
                outputs = group_logprobs(
                    self.teacher, batch["teacher_tensors"], temperature=temperature
                )
                batch["teacher"] = [lp for lp, _ in outputs]
            if algorithm.beta:
                batch["ref"] = [
                    lp for lp, _ in self.reference_logprobs(batch["tensors"], temperature)
                ]

    def accumulate(self, batches: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Forward and backward over all micro-batches; returns sums of this rank."""
        denominator = self._denominator(batches)
        sums: dict[str, torch.Tensor] = {}
        for batch in batches:
            self.engine.set_gradient_accumulation_boundary(batch is batches[-1])
            outputs = self._forward(self.engine, batch)
            losses = []
            for i, (logprobs_GT, entropy_GT) in enumerate(outputs):
                loss, parts = self._group_loss(batch, i, logprobs_GT, denominator)
                losses.append(loss)
                mask = batch["loss_mask"][i]
                parts |= {"loss": loss.detach(), "entropy": (entropy_GT * mask).sum()}
                parts |= _engine_difference(logprobs_GT, batch, i)
                for key, value in parts.items():
                    combine = torch.maximum if key.startswith("max_") else torch.add
                    sums[key] = combine(sums[key], value) if key in sums else value
            # DeepSpeed averages gradients over ranks; the denominator already spans them. Ranks
            # that share a sequence have a part of its gradient each, so theirs add up as well
            self.engine.backward(torch.stack(losses).sum() * self.world_size, scale_wrt_gas=False)
            if batch is not batches[-1]:
                self.engine.step()
        return sums

    def _group_loss(
        self, batch: dict[str, Any], i: int, logprobs_GT: torch.Tensor, denominator: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        algorithm = self.recipe.algorithm
        old_GT = batch["old"][i] if batch["old"][i] is not None else logprobs_GT.detach()
        mask_GT = batch["loss_mask"][i]
        advantages = batch["advantages"][i]
        if self.recipe.teacher.path is not None:
            more_GT = reverse_kl_advantages(
                old_GT, batch["teacher"][i], self.recipe.teacher.kl_coef
            )
            advantages = advantages.unsqueeze(1) + more_GT
        ratio = None
        if algorithm.vllm_importance_sampling_correction:
            ratio = engine_importance_ratio(
                old_GT, batch["sampled"][i], mask_GT,
                mode=algorithm.vllm_importance_sampling_mode,
                clip_min=algorithm.vllm_importance_sampling_clip_min,
                clip_max=algorithm.vllm_importance_sampling_clip_max,
            )  # fmt: skip
        loss, parts = policy_loss(
            logprobs_GT, old_GT, advantages, mask_GT,
            denominator=denominator, loss_type=algorithm.loss_type,
            importance_sampling_level=algorithm.importance_sampling_level,
            epsilon=algorithm.epsilon, epsilon_high=algorithm.epsilon_high,
            delta=algorithm.delta, engine_ratio=ratio, ref_logprobs_BT=batch["ref"][i],
            beta=algorithm.beta, use_bias_correction_kl=algorithm.use_bias_correction_kl,
        )  # fmt: skip
        if self.recipe.teacher.path is not None:
            parts["teacher_kl"] = ((old_GT - batch["teacher"][i]) * mask_GT).sum()
        return loss, parts

    def _denominator(self, batches: Sequence[dict[str, Any]]) -> float:
        masks = [mask for batch in batches for mask in batch["loss_mask"]]
        num_tokens = sum(int(mask.sum()) for mask in masks)
        num_sequences = sum(len(mask) for mask in masks)
        total = torch.tensor([num_tokens, num_sequences], device=self.device)
        dist.all_reduce(total)
        total //= self.recipe.learner.sequence_parallel_size
        return loss_denominator(
            self.recipe.algorithm.loss_type,
            num_tokens=int(total[0]), num_sequences=int(total[1]), num_rank_tokens=num_tokens,
            num_ranks=self.num_sequences,
            max_completion_length=self.recipe.sampling.max_completion_length,
        )  # fmt: skip

    def _step(self) -> dict[str, float]:
        self.engine.step()
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        norm = self.engine.get_global_grad_norm()
        return {
            "train/grad_norm": float(norm) if norm is not None else math.nan,
            "train/learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "train/skipped": float(skipped),
        }

    def _set_learning_rate(self, step: int) -> None:
        """The schedule is a pure function of the step, so resuming needs no scheduler state."""
        rate = self.recipe.training.learning_rate * lr_factor(self.recipe, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    def _summarise(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        keys = sorted(k for k in sums if not k.startswith("max_"))
        added = torch.stack([sums[k].double() for k in keys])
        largest = sums["max_engine_diff"].double()
        dist.all_reduce(added)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        added /= self.recipe.learner.sequence_parallel_size
        total = dict(zip(keys, added.tolist(), strict=True))
        tokens = max(total["tokens"], 1.0)
        teacher = (
            {"train/teacher_kl": total["teacher_kl"] / tokens} if "teacher_kl" in total else {}
        )
        return teacher | {
            "train/loss": total["loss"],
            "train/entropy": total["entropy"] / tokens,
            "train/kl": total["kl"] / tokens,
            "train/clip_ratio": total["clipped"] / tokens,
            "train/tokens": total["tokens"],
            "engine/logprob_diff_mean": total["engine_diff"] / max(total["sampled_tokens"], 1.0),
            "engine/logprob_diff_max": float(largest),
        }


def _engine_difference(
    logprobs_GT: torch.Tensor, batch: dict[str, Any], i: int
) -> dict[str, torch.Tensor]:
    mask_GT = batch["tensors"][i].mask_GT
    live = batch["old"][i] if batch["old"][i] is not None else logprobs_GT.detach()
    difference = ((live - batch["sampled"][i]) * mask_GT).abs()
    return {
        "engine_diff": difference.sum(),
        "max_engine_diff": difference.max(),
        "sampled_tokens": mask_GT.sum().float(),
    }

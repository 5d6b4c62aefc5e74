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

from posttrain.algorithm.importance import engine_importance_ratio
from posttrain.algorithm.losses import loss_denominator, policy_loss
from posttrain.data.rows import Row
from posttrain.model.load import load_model, load_processor, save_checkpoint
from posttrain.model.lora import adapter_files, add_lora
from posttrain.model.policy import GroupTensors, Policy, freeze_audio
from posttrain.model.prefix_check import (
    COMPLETIONS,
    GRADIENT_TOLERANCES,
    LOGPROB_TOLERANCES,
    compare_with_dense,
)
from posttrain.model.sequence_parallel import sequence_group
from posttrain.rollout.rendezvous import meeting_point
from posttrain.schema import Recipe
from posttrain.train.audio_inputs import AudioInputs
from posttrain.train.deepspeed_config import deepspeed_config
from posttrain.train.optimizer_state import load_rank_state, save_rank_state
from posttrain.train.process_group import join_process_group
from posttrain.train.schedule import lr_factor
from posttrain.train.weights import LearnerWeights, full_weights, gathered
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


class LearnerRank:
    """Rank `rank` of `world_size`; made into a Ray actor by `LearnerGroup`."""

    def __init__(
        self, recipe: Recipe, rank: int, world_size: int, address: str, port: int, device: str
    ) -> None:
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        join_process_group(rank, world_size, address, port, device)
        if recipe.learner.threads_per_process:
            torch.set_num_threads(recipe.learner.threads_per_process)
        torch.manual_seed(recipe.seed + rank)
        degree = recipe.learner.sequence_parallel_size
        self.sequence_group = sequence_group(rank, world_size, degree)
        self.num_sequences = world_size // degree
        self.reference: Policy | None = None
        self._transfer: Any = None
        self._verified = recipe.shared_prefix.verify == "never" or not recipe.shared_prefix.enabled

    def build(self, resume_dir: str | None = None) -> dict[str, int]:
        """Loads the policy (or a checkpoint of it), wraps it in DeepSpeed; returns sizes."""
        import deepspeed

        recipe = self.recipe
        resume = Path(resume_dir) if resume_dir else None
        start = resume / "model" if resume and (resume / "model").exists() else recipe.model.path
        self.processor = load_processor(recipe.model.path)
        self.policy = self._build_policy(str(start), resume)
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        self.audio_inputs = AudioInputs(recipe, self.processor, self.device)
        self.engine, *_ = deepspeed.initialize(
            model=self.policy,
            model_parameters=trainable,
            config=deepspeed_config(recipe, self.device.type),
        )
        if recipe.algorithm.beta and not recipe.lora.enabled:
            self.reference = self._build_reference()
        if resume:
            load_rank_state(self.engine, resume / "optimizer" / f"rank-{self.rank:05d}.safetensors")
        self.weights = LearnerWeights(self.policy, recipe.learner.zero_stage)
        return {
            "num_trainable": sum(_full_numel(p) for p in trainable),
            "num_parameters": sum(_full_numel(p) for p in self.policy.parameters()),
        }

    def _build_policy(self, start: str, resume: Path | None) -> Policy:
        recipe = self.recipe
        model: Any = load_model(start, dtype=getattr(torch, recipe.model.dtype))
        if recipe.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze_audio(
            model,
            train_encoder=recipe.model.train_encoder,
            train_projector=recipe.model.train_projector,
        )
        if recipe.lora.enabled:
            lora = recipe.lora
            model = add_lora(
                model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout,
                target_modules=lora.target_modules,
            )  # fmt: skip
            if resume:
                model.load_adapter(str(resume / "adapter"), "default", is_trainable=True)
        return self._wrapped(model, activation_offload=recipe.model.activation_offload).train()

    def _wrapped(self, model: Any, **options: Any) -> Policy:
        policy = Policy(
            model, shared_prefix=self.recipe.shared_prefix.enabled,
            sequence_group=self.sequence_group, **options,
        )  # fmt: skip
        return policy.to(self.device)

    def _build_reference(self) -> Policy:
        """A frozen copy of the starting checkpoint; partitioned too under ZeRO-3."""
        import deepspeed

        model = load_model(self.recipe.model.path, dtype=getattr(torch, self.recipe.model.dtype))
        reference = self._wrapped(model.requires_grad_(False)).eval()
        if self.recipe.learner.zero_stage == 3:
            config = deepspeed_config(self.recipe, self.device.type, optimizer=False)
            engine, *_ = deepspeed.initialize(model=reference, config=config)
            return engine
        return reference

    # --- one optimizer step -------------------------------------------------------------------

    def update(self, micro_batches: Sequence[Sequence[ScoredGroup]], step: int) -> dict[str, float]:
        """`num_iterations` optimizer steps on this rank's micro-batches.

        Returns:
            Metrics over all ranks, of the last iteration; those of `engine/` of the first.
            `train/skipped` is 1 when gradients of any were not finite and the weights were left
            alone.
        """
        batches = self._prepare(micro_batches)
        verified = self._verify(batches[0]["tensors"][0])
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
        return {
            "tensors": tensors,
            "sampled": sampled_GT.to(device),
            "loss_mask": (mask_GT & trained_G1).to(device),
            "advantages": torch.tensor(scored.advantages, device=device),
        }

    def _verify(self, group: GroupTensors) -> dict[str, float]:
        """Once a process: the packed path against the dense one, on a part of a real group.

        Raises:
            RuntimeError: they differ by more than the tolerances.
        """
        if self._verified:
            return {}
        self._verified = True
        config, dtype = self.recipe.shared_prefix, self.recipe.model.dtype
        completions = torch.tensor(min(len(group.lengths), COMPLETIONS), device=self.device)
        dist.all_reduce(completions, op=dist.ReduceOp.MIN)
        found = compare_with_dense(
            self.policy, group, temperature=self.recipe.sampling.temperature,
            prompt_tokens=config.verify_tokens, completions=int(completions),
        )  # fmt: skip
        worst = torch.tensor([found.logprob, found.gradient], device=self.device)
        worst = worst.nan_to_num(nan=math.inf)  # a maximum over ranks may lose a NaN
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        logprob, gradient = worst.tolist()
        limits = (
            _given(config.logprob_tolerance, LOGPROB_TOLERANCES[dtype]),
            _given(config.gradient_tolerance, GRADIENT_TOLERANCES[dtype]),
        )
        if not (logprob <= limits[0] and gradient <= limits[1]):
            raise RuntimeError(
                f"shared_prefix.verify: packed and dense paths differ by {logprob:.3g} nats "
                f"(allowed {limits[0]:g}) and {gradient:.3g} of the gradient (allowed "
                f"{limits[1]:g}) on {found.prompt_tokens} prompt tokens and {found.completions} "
                "completions; train with shared_prefix.enabled=false and report it, or raise "
                "shared_prefix.logprob_tolerance or gradient_tolerance if your dtype explains it"
            )
        return {"shared_prefix/logprob_diff": logprob, "shared_prefix/gradient_diff": gradient}

    def _forward(self, policy: Any, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
        return policy(batch["tensors"], temperature=self.recipe.sampling.temperature)

    @torch.no_grad()
    def _fixed_logprobs(self, batches: Sequence[dict[str, Any]]) -> None:
        """Old and reference log-probabilities, where the loss needs more than the live ones."""
        algorithm = self.recipe.algorithm
        stale_old = algorithm.num_iterations > 1 or self.recipe.lora.dropout > 0
        for batch in batches:
            batch["old"] = batch["ref"] = [None] * len(batch["tensors"])
            if stale_old:
                self.engine.eval()
                batch["old"] = [lp for lp, _ in self._forward(self.engine, batch)]
                self.engine.train()
            if algorithm.beta:
                batch["ref"] = [lp for lp, _ in self._reference_forward(batch)]

    def _reference_forward(self, batch: dict[str, Any]) -> list[tuple[Any, Any]]:
        if self.reference is not None:
            return self._forward(self.reference, batch)
        adapter_model: Any = self.policy.model
        with adapter_model.disable_adapter():
            return self._forward(self.engine, batch)

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
        ratio = None
        if algorithm.vllm_importance_sampling_correction:
            ratio = engine_importance_ratio(
                old_GT, batch["sampled"][i], mask_GT,
                mode=algorithm.vllm_importance_sampling_mode,
                clip_min=algorithm.vllm_importance_sampling_clip_min,
                clip_max=algorithm.vllm_importance_sampling_clip_max,
            )  # fmt: skip
        return policy_loss(
            logprobs_GT, old_GT, batch["advantages"][i], mask_GT,
            denominator=denominator, loss_type=algorithm.loss_type,
            importance_sampling_level=algorithm.importance_sampling_level,
            epsilon=algorithm.epsilon, epsilon_high=algorithm.epsilon_high,
            delta=algorithm.delta, engine_ratio=ratio, ref_logprobs_BT=batch["ref"][i],
            beta=algorithm.beta, use_bias_correction_kl=algorithm.use_bias_correction_kl,
        )  # fmt: skip

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
        return {
            "train/loss": total["loss"],
            "train/entropy": total["entropy"] / tokens,
            "train/kl": total["kl"] / tokens,
            "train/clip_ratio": total["clipped"] / tokens,
            "train/tokens": total["tokens"],
            "engine/logprob_diff_mean": total["engine_diff"] / max(total["sampled_tokens"], 1.0),
            "engine/logprob_diff_max": float(largest),
        }

    # --- weights out, state in and out ----------------------------------------------------------

    def connect_transfer(
        self, client: Any, address: str, port: int, world_size: int, backend: str
    ) -> None:
        """Joins the inference workers' weight-transfer group; rank 0 is the sender."""
        from posttrain.rollout.weight_sync import trainer_transfer

        self._transfer = trainer_transfer(
            self.weights, client, rank=self.rank, address=address, port=port,
            world_size=world_size, backend=backend,
        )  # fmt: skip

    def send_weights(self) -> int:
        """Sends trainable weights to the inference workers; returns bytes."""
        self._transfer.send_weights()
        return self.weights.num_bytes

    def trainable_weights(self) -> dict[str, torch.Tensor] | None:
        """Canonical trainable weights on the CPU, from rank 0; every rank must call."""
        weights = {}
        for name, tensor in self.weights:
            if self.rank == 0:
                weights[name] = tensor.cpu().clone()
        return weights if self.rank == 0 else None

    def adapter(self) -> dict[str, bytes] | None:
        """The LoRA adapter's files, from rank 0; every rank must call."""
        named = {n: p for n, p in self.policy.model.named_parameters() if "lora_" in n}
        with gathered(list(named.values()), self.recipe.learner.zero_stage):
            tensors = {n: p.detach().cpu().clone() for n, p in named.items()}
        return adapter_files(self.policy.model, tensors) if self.rank == 0 else None

    def save(self, folder: str) -> None:
        """Writes model (canonical keys) or adapter, and this rank's optimizer state."""
        out = Path(folder)
        (out / "optimizer").mkdir(parents=True, exist_ok=True)
        save_rank_state(self.engine, out / "optimizer" / f"rank-{self.rank:05d}.safetensors")
        if self.recipe.lora.enabled:
            files = self.adapter()
            if files is not None:
                (out / "adapter").mkdir(exist_ok=True)
                for name, content in files.items():
                    (out / "adapter" / name).write_bytes(content)
            return
        core = self.policy.core
        weights = full_weights(core, self.recipe.learner.zero_stage, keep=self.rank == 0)
        if self.rank == 0:
            save_checkpoint(core, self.processor, out / "model", weights)

    def meeting_point(self) -> tuple[str, int]:
        return meeting_point()


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


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _full_numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))

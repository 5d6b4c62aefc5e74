"""What every training rank is: a process group member that holds the policy and hands it on.

checkpoint --> policy (LoRA or full) --> DeepSpeed engine          a subclass trains it
                                             |--> weights or adapter to the inference workers
                                             +--> checkpoint: canonical safetensors, no pickle
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posttrain.model.load import load_model, load_processor, save_checkpoint
from posttrain.model.lora import adapter_files, add_lora
from posttrain.model.policy import GroupTensors, Policy, choose_trainable, group_logprobs
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
from posttrain.train.optimizer_state import save_rank_state
from posttrain.train.process_group import join_process_group
from posttrain.train.weights import LearnerWeights, full_weights, gathered


class PolicyRank:
    """Rank `rank` of `world_size`; subclasses are made into Ray actors by `LearnerGroup`."""

    engine: Any
    policy_class: type[Policy] = Policy

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

    def load(self, resume: Path | None) -> dict[str, int]:
        """Loads policy, processor and audio inputs; returns sizes. The engine comes after it."""
        recipe = self.recipe
        start = resume / "model" if resume and (resume / "model").exists() else recipe.model.path
        self.processor = load_processor(recipe.model.path)
        self.policy = self._build_policy(str(start), resume)
        self.audio_inputs = AudioInputs(recipe, self.processor, self.device)
        self.weights = LearnerWeights(self.policy, recipe.learner.zero_stage)
        return {
            "num_trainable": sum(_full_numel(p) for p in self.trainable()),
            "num_parameters": sum(_full_numel(p) for p in self.policy.parameters()),
        }

    def trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def _build_policy(self, start: str, resume: Path | None) -> Policy:
        recipe = self.recipe
        model: Any = load_model(start, dtype=getattr(torch, recipe.model.dtype))
        if recipe.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        core = model
        if recipe.lora.enabled:
            lora = recipe.lora
            model = add_lora(
                model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout,
                target_modules=lora.target_modules,
            )  # fmt: skip
            if resume:
                model.load_adapter(str(resume / "adapter"), "default", is_trainable=True)
        choose_trainable(
            core,
            train_encoder=recipe.model.train_encoder,
            train_projector=recipe.model.train_projector,
            train_embeddings=recipe.model.train_embeddings,
        )
        return self._wrapped(model, activation_offload=recipe.model.activation_offload).train()

    def _wrapped(self, model: Any, **options: Any) -> Policy:
        policy = self.policy_class(
            model, shared_prefix=self.recipe.shared_prefix.enabled,
            sequence_group=self.sequence_group, **options,
        )  # fmt: skip
        return policy.to(self.device)

    def build_reference(self) -> Policy:
        """A frozen copy of the starting checkpoint."""
        return self._frozen(self.recipe.model.path)

    def _frozen(self, path: str) -> Policy:
        """A checkpoint that does not train; partitioned too under ZeRO-3."""
        import deepspeed

        model = load_model(path, dtype=getattr(torch, self.recipe.model.dtype))
        reference = self._wrapped(model.requires_grad_(False)).eval()
        if self.recipe.learner.zero_stage == 3:
            config = deepspeed_config(self.recipe, self.device.type, optimizer=False)
            engine, *_ = deepspeed.initialize(model=reference, config=config)
            return engine
        return reference

    def build_teacher(self) -> tuple[Policy, AudioInputs]:
        """The frozen teacher, and how it hears: its encoder is its own.

        Raises:
            ValueError: its tokens are not the student's.
        """
        path = str(self.recipe.teacher.path)
        processor = load_processor(path)
        if processor.tokenizer.get_vocab() != self.processor.tokenizer.get_vocab():
            raise ValueError(
                f"teacher.path={path}: other tokens than {self.recipe.model.path}; their "
                "log-probabilities cannot be compared: take a teacher with the same tokenizer"
            )
        frozen = replace(self.recipe.model, path=path, train_encoder=False, train_projector=False)
        recipe = replace(self.recipe, model=frozen)
        return self._frozen(path), AudioInputs(recipe, processor, self.device)

    def reference_logprobs(
        self, groups: Sequence[GroupTensors], temperature: float
    ) -> list[tuple[Any, Any]]:
        """Of the starting checkpoint: a copy of it, or the policy with its adapter switched off."""
        if self.reference is not None:
            return group_logprobs(self.reference, groups, temperature=temperature)
        adapter_model: Any = self.policy.model
        with adapter_model.disable_adapter():
            return group_logprobs(self.engine, groups, temperature=temperature)

    def verify(self, group: GroupTensors) -> dict[str, float]:
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
        """Writes adapter, model (canonical keys) or both, and this rank's optimizer state.

        Beside an adapter stands a model only where more than the adapter trains.
        """
        out, recipe = Path(folder), self.recipe
        (out / "optimizer").mkdir(parents=True, exist_ok=True)
        save_rank_state(self.engine, out / "optimizer" / f"rank-{self.rank:05d}.safetensors")
        if recipe.lora.enabled:
            files = self.adapter()
            if files is not None:
                (out / "adapter").mkdir(exist_ok=True)
                for name, content in files.items():
                    (out / "adapter" / name).write_bytes(content)
            if not recipe.model.trains_beside_adapter:
                return
        core = self.policy.core
        weights = full_weights(core, recipe.learner.zero_stage, keep=self.rank == 0)
        if self.rank == 0:
            save_checkpoint(core, self.processor, out / "model", weights)

    def meeting_point(self) -> tuple[str, int]:
        return meeting_point()


def _full_numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value

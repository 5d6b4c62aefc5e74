"""A supervised recipe in the words of transformers' Trainer, TRL and accelerate."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import PartialState
from trl import SFTConfig

from posttrain.schema import Recipe
from posttrain.train.deepspeed_config import deepspeed_config


def tell_accelerate(device: torch.device) -> None:
    """Trainer asks accelerate who is there; on CPUs it would find one process and no DeepSpeed."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "TOKENIZERS_PARALLELISM": "false"}
    if device.type == "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState(backend="gloo" if device.type == "cpu" else "nccl")


def trainer_arguments(recipe: Recipe, device: str, folder: Path, *, resumed: bool) -> SFTConfig:
    """One epoch of `training.max_steps`; Trainer itself shows and reports nothing."""
    training, learner = recipe.training, recipe.learner
    per_device = training.per_device_train_batch_size
    accumulation = training.prompts_per_step // (learner.num_processes * per_device)
    config = deepspeed_config(recipe, device) | {
        "train_micro_batch_size_per_gpu": per_device,
        "gradient_accumulation_steps": accumulation,
    }
    return SFTConfig(
        str(folder),
        max_steps=training.max_steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        bf16=recipe.model.dtype == "bfloat16",
        deepspeed=config,
        gradient_checkpointing=False,  # the policy's layers have it switched on already
        eval_strategy="steps",
        eval_steps=training.eval_steps or training.max_steps,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=training.save_steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        accelerator_config={"use_configured_state": True},
        logging_nan_inf_filter=False,
        average_tokens_across_devices=True,
    )

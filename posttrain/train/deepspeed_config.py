"""The DeepSpeed configuration that a recipe asks for. No torch."""

from __future__ import annotations

from typing import Any

from posttrain.schema import Recipe


def deepspeed_config(recipe: Recipe, device: str, *, optimizer: bool = True) -> dict[str, Any]:
    """A dict for `deepspeed.initialize`.

    The number of micro-batches changes from step to step, so the learner says itself which is the
    last (`set_gradient_accumulation_boundary`).

    Args:
        device: "cuda" or "cpu". torch's AdamW is used on both: it needs no compiler, and keeps
            its step count where `optimizer_state` saves it.
        optimizer: False for the frozen reference.
    """
    training, learner = recipe.training, recipe.learner
    bfloat16 = recipe.model.dtype == "bfloat16"
    zero: dict[str, Any] = {"stage": learner.zero_stage, "overlap_comm": device == "cuda"}
    if learner.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if learner.cpu_offload and optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16, "check_grad_overflow": bfloat16},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if optimizer:
        config["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": [training.adam_beta1, training.adam_beta2],
                "weight_decay": training.weight_decay,
                "torch_adam": True,
            },
        }
    return config

"""LoRA on the language model alone.

The audio encoder has q_proj, k_proj and v_proj of its own, so targets are chosen by module path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save as safetensors_bytes
from torch import nn


def target_pattern(target_modules: Sequence[str]) -> str:
    """A pattern that matches whole module paths below the language model, and nothing else."""
    names = "|".join(re.escape(name) for name in target_modules)
    return rf".*language_model\..*\.({names})"


def add_lora(
    model: nn.Module, *, r: int, alpha: int, dropout: float, target_modules: Sequence[str]
) -> PeftModel:
    """Wraps the model; only the adapter trains.

    Raises:
        ValueError: `target_modules` match nothing in the language model.
    """
    pattern = target_pattern(target_modules)
    if not any(re.fullmatch(pattern, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"lora.target_modules={list(target_modules)}: no such linear in the language model"
        )
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def merge_adapter(base: str, adapter: str | Path, out_dir: Path, dtype: torch.dtype) -> None:
    """Writes the base checkpoint with the adapter added in: in float32, stored as `dtype`."""
    from posttrain.model.load import load_model, load_processor, save_checkpoint

    model: Any = PeftModel.from_pretrained(load_model(base), str(adapter))
    partial = out_dir.with_name(f".{os.getpid()}.{out_dir.name}.partial")
    save_checkpoint(model.merge_and_unload().to(dtype), load_processor(base), partial)
    try:
        partial.rename(out_dir)
    except OSError:  # another process was first: the same bytes
        if not out_dir.is_dir():
            raise
        shutil.rmtree(partial)


def adapter_files(
    model: PeftModel, tensors: dict[str, torch.Tensor] | None = None
) -> dict[str, bytes]:
    """The adapter as PEFT writes it: file name -> content.

    Args:
        tensors: full parameters by their name in `model` (ZeRO-3 passes gathered ones).
    """
    state = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return {
        "adapter_model.safetensors": safetensors_bytes(state, metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(config, indent=1, default=str).encode(),
    }

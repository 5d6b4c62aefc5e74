"""Reads and writes checkpoints: the policy, its processor, canonical keys.

Only safetensors, never pickle; never remote code.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, MusicFlamingoForConditionalGeneration

from posttrain.model.checkpoint_keys import canonical_key, split_ignored

log = logging.getLogger(__name__)

MODEL_TYPE = "musicflamingo"
SHARD_BYTES = 5 * 2**30


def check_architecture(path: str | Path) -> None:
    """Refuses a checkpoint that is not of AF-Next's architecture.

    Raises:
        ValueError: names the checkpoint, its `model_type` and the one needed.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"model.path {str(path)!r}: no readable checkpoint there "
            f"({str(error).splitlines()[0]}); give a folder or a Hub id"
        ) from error
    if config.model_type != MODEL_TYPE:
        raise ValueError(
            f"model.path {str(path)!r}: architecture {config.model_type!r}; "
            f"posttrain trains {MODEL_TYPE!r} (Audio Flamingo Next)"
        )


def load_processor(path: str | Path) -> Any:
    """The checkpoint's own processor (tokenizer, feature extractor, chat template)."""
    return AutoProcessor.from_pretrained(path, trust_remote_code=False)


def audio_limit_s(processor: Any, asked_s: float | None) -> float:
    """Longest clip in seconds: the recipe's limit, else the processor's.

    Raises:
        ValueError: the recipe asks for more than the processor keeps; it would cut the rest off.
    """
    limit_s = float(processor.max_audio_len)
    if asked_s is not None and asked_s > limit_s:
        raise ValueError(
            f"model.max_audio_len_s={asked_s:g}: the checkpoint's processor cuts audio at its "
            f"max_audio_len of {limit_s:g} s; lower the key, or correct processor_config.json"
        )
    return limit_s if asked_s is None else asked_s


def load_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> MusicFlamingoForConditionalGeneration:
    """The policy in eval mode.

    A key in the checkpoint that no module takes is an error, `avg_embed_norm` excepted, which is
    reported; so is a module that the checkpoint leaves out.
    """
    check_architecture(path)
    model, info = MusicFlamingoForConditionalGeneration.from_pretrained(
        path, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True
    )
    unexpected, ignored = split_ignored(info["unexpected_keys"])
    if ignored:
        log.info("checkpoint %s: ignored by name: %s", path, ignored)
    if unexpected or info["missing_keys"]:
        raise ValueError(
            f"model.path {str(path)!r}: unexpected weights {sorted(unexpected)[:5]}, "
            f"missing weights {sorted(info['missing_keys'])[:5]}; not a whole AF-Next checkpoint"
        )
    return model.to(device).eval()


def canonical_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Detached CPU weights under canonical names."""
    return {
        canonical_key(name): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }


def save_checkpoint(
    model: Any,
    processor: Any,
    out_dir: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes config, generation config, processor and sharded safetensors with canonical keys.

    Args:
        weights: canonical name -> tensor; taken from `model` when None (ZeRO-3 passes gathered
            weights).
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = canonical_state_dict(model) if weights is None else weights
    config = model.config.to_dict() | {"architectures": ["MusicFlamingoForConditionalGeneration"]}
    type(model.config).from_dict(config).save_pretrained(out_dir)
    model.generation_config.save_pretrained(out_dir)
    if processor is not None:
        processor.save_pretrained(out_dir)
    _save_shards(weights, out_dir)


def _save_shards(weights: dict[str, torch.Tensor], out_dir: Path) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes
    for old in out_dir.glob("model*.safetensors*"):
        old.unlink()
    if len(shards) == 1:
        _save_readable(shards[0], out_dir / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save_readable(shard, out_dir / name)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _save_readable(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Read by whom config.json is: that file follows the umask, safetensors' own does not."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod((path.parent / "config.json").stat().st_mode)

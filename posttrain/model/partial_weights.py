"""Some weights of a checkpoint without the rest: a 7B checkpoint's encoder is 1.3 GB, not 16."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from posttrain.model.checkpoint_keys import canonical_key, split_ignored

AUDIO_TOWER = "audio_tower."
PROJECTOR = "multi_modal_projector."
TOKEN_EMBEDDINGS = "language_model.model.embed_tokens.weight"


def read_weights(checkpoint: str | Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Weights whose canonical key starts with one of `prefixes`, from safetensors alone."""
    index = cached_file(
        str(checkpoint), "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False
    )
    if index is None:
        names = ["model.safetensors"]
    else:
        shards = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({shards[key] for key in _wanted(shards, prefixes)})
    weights: dict[str, Tensor] = {}
    for name in names:
        with safe_open(cached_file(str(checkpoint), name), framework="pt") as file:
            for key in _wanted(file.keys(), prefixes):
                weights[canonical_key(key)] = file.get_tensor(key)
    return weights


def without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those below `prefix`, named as the module itself names them."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _wanted(keys: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    kept, _ = split_ignored(keys)
    return [key for key in kept if canonical_key(key).startswith(tuple(prefixes))]

"""The model that a path means: a checkpoint, a Hub id, a run, or one checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from posttrain.model.lora import merge_adapter


def model_of(path: str) -> str:
    """A whole checkpoint's folder or Hub id; an adapter is merged into its base once, beside it.

    Raises:
        ValueError: a run without a checkpoint, or a checkpoint outside a run.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return path
    if (folder / "summary.json").exists() and _kind(folder) == "ladder":
        stages = json.loads((folder / "summary.json").read_text())["stages"]
        return str(stages[-1]["model"])
    if (folder / "checkpoints").is_dir():
        steps = sorted((folder / "checkpoints").glob("step-*"))
        if not steps:
            raise ValueError(f"{path}: a run without a checkpoint; run it to its end first")
        return checkpoint_model(folder, steps[-1])
    if folder.parent.name == "checkpoints":
        return checkpoint_model(folder.parent.parent, folder)
    raise ValueError(f"{path}: neither a checkpoint (config.json) nor a run (checkpoints/)")


def run_of(path: str) -> Path | None:
    """The run that a path belongs to: itself, or the one around its checkpoint."""
    for folder in (Path(path), *Path(path).absolute().parents[:3]):
        if (folder / "recipe.yaml").exists():
            return folder
    return None


def checkpoint_model(run: Path, checkpoint: Path) -> str:
    """Of a run's checkpoint, merged as `RUN/merged/STEP` where it is an adapter."""
    recipe = OmegaConf.load(run / "recipe.yaml")
    base = str(recipe.model.path)
    if (checkpoint / "model").exists():
        base = str((checkpoint / "model").resolve())
    if not (checkpoint / "adapter").exists():
        return base
    merged = run / "merged" / checkpoint.name
    if not merged.exists():
        merged.parent.mkdir(exist_ok=True)
        merge_adapter(base, checkpoint / "adapter", merged, getattr(torch, recipe.model.dtype))
    return str(merged.resolve())


def _kind(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text()).get("kind", ""))

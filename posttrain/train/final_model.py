"""The model that a path means: a checkpoint, a Hub id, a run, or one checkpoint of a run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf

from posttrain.model.lora import merge_adapter


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of a run.

    Attributes:
        is_last: the run's summary and gates speak of it.
    """

    run: Path
    folder: Path
    is_last: bool

    @property
    def has_adapter(self) -> bool:
        return (self.folder / "adapter").is_dir()


def checkpoint_of(path: str) -> RunCheckpoint | None:
    """The checkpoint that a path of a run means; None for what is no part of a run.

    A run means its last checkpoint, a ladder its last stage's; `checkpoints/STEP`, its `model/`,
    and what was merged from it (`merged/STEP`) mean that step.

    Raises:
        ValueError: a run without a checkpoint.
    """
    given = Path(path)
    run = run_of(path)
    if run is None:
        return None
    if given.absolute() == run.absolute():
        if (run / "stages").is_dir():
            stages = json.loads((run / "summary.json").read_text())["stages"]
            return checkpoint_of(str(stages[-1]["model"]))
        name = None
    else:
        parts = given.absolute().relative_to(run.absolute()).parts
        name = next((part for part in parts if part.startswith("step-")), None)
        if name is None:
            return None  # something else that lies there
    steps = sorted((run / "checkpoints").glob("step-*"))
    if not steps:
        raise ValueError(f"{path}: a run without a checkpoint; run it to its end first")
    folder = run / "checkpoints" / (name or steps[-1].name)
    return RunCheckpoint(run, folder, folder == steps[-1])


def model_of(path: str) -> str:
    """A whole checkpoint's folder or Hub id; an adapter is merged into its base once.

    Raises:
        ValueError: a folder that is neither a checkpoint nor of a run.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return path
    checkpoint = checkpoint_of(path)
    if checkpoint is None:
        raise ValueError(f"{path}: neither a checkpoint (config.json) nor a run (checkpoints/)")
    recipe = OmegaConf.load(checkpoint.run / "recipe.yaml")
    base = str(recipe.model.path)
    if (checkpoint.folder / "model").exists():
        base = str((checkpoint.folder / "model").resolve())
    if not checkpoint.has_adapter:
        return base
    merged = checkpoint.run / "merged" / checkpoint.folder.name
    if not merged.exists():
        merged.parent.mkdir(exist_ok=True)
        dtype = getattr(torch, recipe.model.dtype)
        merge_adapter(base, checkpoint.folder / "adapter", merged, dtype)
    return str(merged.resolve())


def run_of(path: str) -> Path | None:
    """The run that a path lies in: itself, or the one around its checkpoint; None for Hub ids."""
    if not Path(path).exists():
        return None
    for folder in (Path(path), *Path(path).absolute().parents[:3]):
        if (folder / "recipe.yaml").exists():
            return folder
    return None


def weights_digest(path: str) -> dict[str, str] | None:
    """File name -> SHA-256 of every file of weights; None for a Hub id."""
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with file.open("rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found or None

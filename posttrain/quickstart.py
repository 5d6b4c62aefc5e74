"""`make quickstart`: runs the nano recipe anew in runs/quickstart, moving an older run aside."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from posttrain.config import load_recipe

RUN_NAME = "quickstart"


def move_aside(folder: Path) -> Path | None:
    """Renames an older run to the first free NAME-old-N; returns where it went."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def gpu_layout(count: int) -> list[str]:
    """Overrides that fit two learners and one worker onto `count` GPUs."""
    if count == 1:
        return ["learner.device=cpu", "rollout.device=cuda"]
    if count == 2:
        return ["learner.num_processes=1", "learner.device=cuda", "rollout.device=cuda"]
    return []


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    overrides = [f"seed={args.seed}", f"run_name={RUN_NAME}", *gpu_layout(num_gpus())]
    recipe = load_recipe(args.recipe, overrides)
    moved = move_aside(Path(recipe.output_dir) / RUN_NAME)
    if moved:
        print(f"an older run was moved to {moved}")
    from posttrain.train.kinds import run_recipe

    folder = run_recipe(recipe)
    print(f"run folder: {folder}   (metrics: tensorboard --logdir {folder}/tensorboard)")


if __name__ == "__main__":
    main()

"""Which function runs which kind of recipe."""

from __future__ import annotations

from pathlib import Path

from posttrain.schema import Recipe


def run_recipe(recipe: Recipe) -> Path:
    """Runs, or continues, a recipe; returns the run folder.

    Raises:
        GateFailed: the run is done and a gate was not passed.
    """
    resolve_paths(recipe)
    if recipe.kind == "reward":
        from posttrain.train.reward_grounding import train_reward as train
    elif recipe.kind == "distill":
        from posttrain.train.distill import train
    elif recipe.kind == "ladder":
        from posttrain.train.ladder import climb as train
    elif recipe.kind in ("sft", "dpo"):
        from posttrain.train.supervised import train
    else:
        from posttrain.train.grpo import train
    return train(recipe)


def resolve_paths(recipe: Recipe) -> None:
    """Makes local paths absolute: processes of a cluster start in folders of their own."""
    for section, key in ((recipe.model, "path"), (recipe.teacher, "path"),
                         (recipe.chains, "teacher")):  # fmt: skip
        path = getattr(section, key)
        if path is not None and Path(path).exists():
            setattr(section, key, str(Path(path).resolve()))
    data = recipe.data
    for sources in (data.train, data.replay, data.held_out, data.reported, data.held_out_pairs):
        for source in sources.values():
            source.path = str(Path(source.path).resolve())

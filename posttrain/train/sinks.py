"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from posttrain.schema import Recipe


class TensorBoardSink:
    def __init__(self, recipe: Recipe, path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Reads WANDB_API_KEY from the environment; the project is `posttrain`.

    A resumed run goes on under the id that its folder keeps; another run of the same name does not.
    """

    def __init__(self, recipe: Recipe, path: Path) -> None:
        import wandb

        kept = path / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project="posttrain", name=path.name, dir=str(path), config=asdict(recipe),
            id=kept.read_text(), resume="allow",
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    def __init__(self, recipe: Recipe, path: Path) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project="posttrain", name=path.name, config=asdict(recipe), resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


SINKS = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "trackio": TrackioSink}

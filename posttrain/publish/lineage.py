"""Where a checkpoint comes from: the runs between it and its base, and what they learned from."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain.data.rows import read_records
from posttrain.train.final_model import RunCheckpoint, checkpoint_of

LONGEST = 32  # stages
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Stage:
    """One run of the lineage.

    Attributes:
        recipe: resolved, as a plain mapping.
        summary: of the finished run; {} where it is not finished, or where the checkpoint is not
            the run's last: scores and gates do not speak of it.
    """

    folder: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    checkpoint: RunCheckpoint

    @property
    def failed_gates(self) -> list[str]:
        """One line for each gate of the recipe that was not passed, or never judged."""
        judged = {gate["name"]: gate for gate in self.summary.get("gates", ())}
        lines = []
        for name in self.recipe.get("gates") or {}:
            gate = judged.get(name)
            if gate is None:
                lines.append(f"{name}: not judged on this checkpoint")
            elif not gate["passed"]:
                lines.append(f"{name}: {'; '.join(gate['broken'])}")
        return lines


def lineage(path: str) -> tuple[str, list[Stage]]:
    """(base checkpoint, the runs after it, first one first) of a run or checkpoint.

    Raises:
        ValueError: runs that start from each other, or from a folder that is not there any more.
    """
    stages: list[Stage] = []
    while (checkpoint := checkpoint_of(path)) is not None:
        run = checkpoint.run
        if any(stage.folder == run for stage in stages) or len(stages) == LONGEST:
            raise ValueError(f"{run}: the runs that lead to it form a circle")
        recipe = OmegaConf.to_container(OmegaConf.load(run / "recipe.yaml"), resolve=True)
        assert isinstance(recipe, dict)
        summary = _json(run / "summary.json") if checkpoint.is_last else {}
        environment = _json(run / "environment.json")
        stages.insert(0, Stage(run, recipe, summary, environment, checkpoint))  # type: ignore[arg-type]
        path = str(environment.get("started_from") or recipe["model"]["path"])
        if not Path(path).exists() and not HUB_ID.fullmatch(path):
            raise ValueError(
                f"{run}: started from {path}, which is not there; its own runs and gates cannot be "
                "read: bring the folder back, or publish from the directory that the run started in"
            )
    return path, stages


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


@dataclass(frozen=True)
class DataFacts:
    """What a file of rows or pairs holds; `missing`: the file is not there any more."""

    name: str
    path: str
    rows: int = 0
    hours: float = 0.0
    licences: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    missing: bool = False


def data_facts(stage: Stage) -> list[DataFacts]:
    """Of all training and replay sources of a run."""
    data = stage.recipe["data"]
    files = {
        f"{kind}.{name}": source["path"]
        for kind in ("train", "replay")
        for name, source in (data.get(kind) or {}).items()
    }
    if (chains := stage.folder / "chains" / "rows.jsonl").exists():
        files["chains kept"] = str(chains)
    return [_facts(name, Path(path)) for name, path in files.items()]


def _facts(name: str, path: Path) -> DataFacts:
    if not path.exists():
        return DataFacts(name, str(path), missing=True)
    rows, seconds = 0, {}
    found: dict[str, Counter[str]] = {k: Counter() for k in ("licence", "language", "source")}
    for _, record in read_records(path):
        rows += 1
        if record.get("audio"):
            seconds[str(record["audio"])] = float(record.get("duration_s") or 0.0)
        for key, counter in found.items():
            if record.get(key):
                counter[str(record[key])] += 1
    licences, languages, sources = (tuple(sorted(found[k])) for k in found)
    hours = sum(seconds.values()) / 3600
    return DataFacts(name, str(path), rows, hours, licences, languages, sources)

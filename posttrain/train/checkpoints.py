"""Checkpoints of a run: filled under another name, renamed into place, the oldest removed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: its folder, the steps done, and the policy version."""

    path: Path
    step: int
    policy_version: int


class Checkpoints:
    """`RUN/checkpoints/step-NNNNNN`.

    Args:
        run_dir: of the run.
        limit: how many are kept; None: all.
    """

    def __init__(self, run_dir: Path, limit: int | None) -> None:
        self.folder, self.limit = run_dir / "checkpoints", limit

    def begin(self, step: int) -> Path:
        """An empty folder to fill; `finish` makes it count."""
        partial = self.partial(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def partial(self, step: int) -> Path:
        return self.folder / f".step-{step:06d}.partial"

    def finish(self, step: int, policy_version: int) -> Checkpoint:
        """Renames the folder into place (atomic) and removes what exceeds the limit."""
        partial = self.partial(step)
        state = {"step": step, "policy_version": policy_version}
        (partial / "state.json").write_text(json.dumps(state) + "\n")
        final = self.folder / f"step-{step:06d}"
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in sorted(self.folder.glob("step-*"))[: -self.limit if self.limit else 0]:
            shutil.rmtree(old)
        return Checkpoint(final, step, policy_version)

    def latest(self) -> Checkpoint | None:
        folders = sorted(self.folder.glob("step-*"))
        if not folders:
            return None
        state = json.loads((folders[-1] / "state.json").read_text())
        return Checkpoint(folders[-1], state["step"], state["policy_version"])

"""What tests import by name, in Ray workers, too: tests/ is on their path (see conftest)."""

from __future__ import annotations

from pathlib import Path

from posttrain.config import load_recipe
from posttrain.data.rows import Row
from posttrain.train import grpo
from posttrain.train.learner import LearnerRank, ScoredGroup
from posttrain.train.run_folder import RunFolder
from posttrain.types import Completion


def run(recipe_file: Path, *overrides: str) -> RunFolder:
    recipe = load_recipe(recipe_file, list(overrides))
    folder = grpo.train(recipe)
    finished = object.__new__(RunFolder)
    finished.path = folder
    return finished


def answer_long_prompts(checkpoint: str, folder: Path) -> tuple[list[int], int]:
    """Completions of eight groups, a minute of noise each; calls of the long-context attention."""
    from posttrain.rollout import cpu_attention, parity
    from posttrain.rollout.settings import EngineSettings
    from posttrain.rollout.vllm_engine import VllmEngine
    from posttrain.types import SamplingSettings

    calls, attend = [], cpu_attention._attend

    def counted(*arguments: object) -> object:
        calls.append(1)
        return attend(*arguments)

    cpu_attention._attend = counted
    engine = VllmEngine(EngineSettings(checkpoint, dtype="float32", max_model_len=2_048))
    groups = engine.generate(
        parity._requests((60.0,) * 8, folder, seed=0), SamplingSettings(1.0, 8, 4)
    )
    return [len(group.completions) for group in groups], len(calls)


class ProbeRank(LearnerRank):
    """A learner that also shows its gradients and weights."""

    def gradients_and_update(
        self, micro_batches: list[list[ScoredGroup]]
    ) -> tuple[dict, dict, dict]:
        from deepspeed.utils import safe_get_full_grad

        before = dict(self.trainable_weights() or {})
        batches = self._prepare(micro_batches)
        self._fixed_logprobs(batches)
        self._set_learning_rate(0)
        self.accumulate(batches)
        names = [n for n, p in self.policy.named_parameters() if p.requires_grad]
        parameters = dict(self.policy.named_parameters())
        gradients = {n: safe_get_full_grad(parameters[n]).cpu().clone() for n in names}
        self._step()
        return gradients, before, dict(self.trainable_weights() or {})


def moody(row: Row, completion: Completion, every: int) -> float:
    """A reward that raises on some completions, as a user's might."""
    if len(completion.text) % every == 0:
        raise KeyError("unlucky length")
    return float(len(completion.text) % 3)

"""`posttrain parity`: do vLLM and transformers compute the same policy?

random clips -> vLLM samples a completion -> transformers scores the same tokens -> compare
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from posttrain.data.audio import AUDIO_TOKENS_PER_S, SAMPLE_RATE_HZ, write_audio
from posttrain.rollout.settings import EngineSettings
from posttrain.types import PromptRequest, SamplingSettings

DEFAULT_CLIPS_S = (3.0, 41.0, 95.5, 600.0)
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.25}
PROMPT = "Identify the relevant events first, then answer."
COMPLETION_TOKENS = 24
MARGIN_TOKENS = 512


@dataclass(frozen=True)
class ParityReport:
    """Prompt ids equal on all clips, and the largest |log-probability difference| (nats)."""

    prompt_ids_equal: bool
    max_abs_logprob_diff: float
    clips_s: tuple[float, ...]
    tolerance: float

    @property
    def within_tolerance(self) -> bool:
        return self.prompt_ids_equal and self.max_abs_logprob_diff <= self.tolerance

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_ids_equal": self.prompt_ids_equal,
            "max_abs_logprob_diff": self.max_abs_logprob_diff,
            "clips_s": list(self.clips_s),
        }

    def to_text(self) -> str:
        verdict = "ok" if self.within_tolerance else "DIFFERENT"
        return (
            f"clips: {', '.join(f'{s:g} s' for s in self.clips_s)}\n"
            f"prompt ids equal: {self.prompt_ids_equal}\n"
            f"largest |log-probability difference|: {self.max_abs_logprob_diff:.3g} "
            f"(tolerance {self.tolerance:g}): {verdict}"
        )


def measure_parity(
    checkpoint: str, *, clips_s: Sequence[float] = DEFAULT_CLIPS_S, dtype: str = "float32",
    tolerance: float | None = None, seed: int = 0,
) -> ParityReport:  # fmt: skip
    """Samples with vLLM on random clips and scores the same tokens with transformers.

    Args:
        clips_s: lengths in seconds.
        tolerance: largest difference allowed; default 1e-5 in float32, 0.25 in bfloat16.

    Raises:
        ValueError: no AF-Next checkpoint; a clip longer than the processor takes.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # pages of warnings otherwise
    from posttrain.rollout.transformers_engine import TransformersEngine
    from posttrain.rollout.vllm_engine import VllmEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EngineSettings(
        checkpoint, device=device, dtype=dtype, seed=seed, gpu_memory_utilization=0.5,
        max_model_len=_model_len(max(clips_s)),
    )  # fmt: skip
    vllm = VllmEngine(settings)
    reference = TransformersEngine(settings)
    ids_equal, largest = True, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for request in _requests(clips_s, Path(folder), seed):
            (group,) = vllm.generate([request], SamplingSettings(1.0, COMPLETION_TOKENS))
            completion = group.completions[0]
            expanded = reference.inputs(request)["input_ids"][0].tolist()
            ids_equal &= tuple(expanded) == group.prompt_token_ids
            scored = reference.score(request, completion.token_ids)
            difference = np.abs(np.subtract(scored, completion.logprobs))
            largest = max(largest, float(difference.max()))
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    return ParityReport(ids_equal, largest, tuple(clips_s), limit)


def _model_len(longest_s: float) -> int:
    """Tokens of the longest clip, and room for text."""
    return int(longest_s * AUDIO_TOKENS_PER_S) + MARGIN_TOKENS


def _requests(clips_s: Sequence[float], folder: Path, seed: int) -> list[PromptRequest]:
    generator = np.random.default_rng(seed)
    requests = []
    for i, seconds in enumerate(clips_s):
        samples = 0.1 * generator.standard_normal(round(seconds * SAMPLE_RATE_HZ))
        path = folder / f"clip-{i}.wav"
        write_audio(path, samples.astype(np.float32))
        messages = ({"role": "user", "content": PROMPT},)
        requests.append(PromptRequest(f"parity-{i}", f"parity-{i}", messages, str(path), seed + i))
    return requests

"""What tests import by name, in Ray workers, too: tests/ is on their path (see conftest)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from posttrain.config import load_recipe
from posttrain.data.audio import load_audio
from posttrain.data.chat import encode
from posttrain.data.rows import Row
from posttrain.model.load import load_processor
from posttrain.model.policy import Policy
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


def plain_sum(model: Any, nano: str, audio: str, prompt: Any, text: str) -> tuple[float, int]:
    """(log-probability of the answer, its tokens) by transformers alone."""
    processor = load_processor(nano)
    inputs = encode(processor, prompt, load_audio(audio))
    answer = processor.tokenizer(f"{text}<|im_end|>", add_special_tokens=False, return_tensors="pt")
    ids = answer["input_ids"]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    with torch.no_grad():
        logprobs = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, ids[0].unsqueeze(1)).sum()), ids.shape[1]


class BytesThroughRay:
    """Counts what the controller hands to Ray and gets back, a GRPO step at a time.

    Every request, answer and update passes through the controller, so nothing escapes.

    Attributes:
        steps: bytes of every step.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._bytes = 0

    def __enter__(self) -> BytesThroughRay:
        from ray._private.serialization import SerializationContext

        self._context = SerializationContext
        self._kept = (
            SerializationContext.serialize, SerializationContext.deserialize_objects,
            grpo.GrpoLoop.step,
        )  # fmt: skip
        serialize, deserialize, step = self._kept

        def counted_out(context: object, value: object) -> object:
            result = serialize(context, value)
            self._bytes += result.total_bytes
            return result

        def counted_in(context: object, objects: list, *rest: object) -> object:
            for one in objects:
                parts = (getattr(one, "data", None), getattr(one, "metadata", None))
                self._bytes += sum(len(part) for part in parts if part is not None)
            return deserialize(context, objects, *rest)

        def counted_step(loop: grpo.GrpoLoop, number: int) -> None:
            before = self._bytes
            step(loop, number)
            self.steps.append(self._bytes - before)

        SerializationContext.serialize = counted_out
        SerializationContext.deserialize_objects = counted_in
        grpo.GrpoLoop.step = counted_step  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self._context.serialize, self._context.deserialize_objects = self._kept[:2]
        grpo.GrpoLoop.step = self._kept[2]  # type: ignore[method-assign]


class ProbeRank(LearnerRank):
    """A learner that also shows its log-probabilities, gradients and weights."""

    def _build_policy(self, start: str, resume: Path | None) -> Policy:
        """A fresh adapter does nothing and has no gradient in lora_A: give it weights."""
        policy = super()._build_policy(start, resume)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        return policy

    @torch.no_grad()
    def logprobs(self, micro_batches: list[list[ScoredGroup]]) -> list[torch.Tensor]:
        """(T,) of every completion, in the order given."""
        outputs = []
        for batch in self._prepare(micro_batches):
            pairs = zip(self._forward(self.engine, batch), batch["tensors"], strict=True)
            for (logprobs_GT, _), tensors in pairs:
                outputs += [
                    row[:n].cpu().clone()
                    for row, n in zip(logprobs_GT, tensors.lengths, strict=True)
                ]
        return outputs

    def gradients_and_update(
        self, micro_batches: list[list[ScoredGroup]]
    ) -> tuple[dict, dict, dict]:
        from deepspeed.utils import safe_get_full_grad

        before = dict(self.trainable_weights() or {})
        batches = self._prepare(micro_batches)
        self.verify(batches[0]["tensors"][0])
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


class PlainAudio:
    """The part of `AudioInputs` that an objective uses, with log-mel windows."""

    def __init__(self, nano: str) -> None:
        self.processor = load_processor(nano)

    def fields(self, audio: str | None) -> tuple[dict, int | None]:
        if audio is None:
            return {}, None
        batch = encode(self.processor, ({"role": "user", "content": ""},), load_audio(audio))
        ids = batch.pop("input_ids")[0]
        return batch, int((ids == self.processor.audio_token_id).sum())

"""The `Engine` on transformers: slow, dependency-light, for debugging and machines without vLLM."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.data.audio import load_audio
from posttrain.data.chat import encode
from posttrain.model.checkpoint_keys import module_key
from posttrain.model.load import audio_limit_s, load_model, load_processor
from posttrain.rollout.settings import EngineSettings
from posttrain.types import Completion, Group, PromptRequest, SamplingSettings, token_runs


class TransformersEngine:
    """Samples token by token with a key-value cache; one prompt, G completions at a time."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.policy_version = 0
        self.processor = load_processor(settings.checkpoint)
        self.device = torch.device(settings.device)
        dtype = getattr(torch, settings.dtype)
        self.model: Any = load_model(settings.checkpoint, dtype=dtype, device=self.device)
        self.eos_id = self.processor.tokenizer.eos_token_id

    def generate(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> list[Group]:
        return [self._generate_group(request, settings) for request in requests]

    def inputs(self, request: PromptRequest) -> dict[str, torch.Tensor]:
        waveform = None
        if request.audio_path is not None:
            limit_s = audio_limit_s(self.processor, self.settings.max_audio_len_s)
            waveform = load_audio(request.audio_path, max_duration_s=limit_s)
        inputs = encode(self.processor, request.messages, waveform)
        return {key: value.to(self.device) for key, value in inputs.items()}

    @torch.no_grad()
    def _generate_group(self, request: PromptRequest, settings: SamplingSettings) -> Group:
        inputs = self.inputs(request)
        greedy = settings.temperature == 0
        count = 1 if greedy else settings.num_completions
        generators = [torch.Generator().manual_seed(request.seed + i) for i in range(count)]
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(count)
        logits = output.logits[:, -1].expand(count, -1)
        ids: list[list[int]] = [[] for _ in range(count)]
        logprobs: list[list[float]] = [[] for _ in range(count)]
        open_rows = set(range(count))
        for _ in range(settings.max_tokens):
            scaled = logits.float().cpu() / (1.0 if greedy else settings.temperature)
            all_logprobs = scaled.log_softmax(-1)
            picked = self._pick(all_logprobs, generators, greedy)
            for i in sorted(open_rows):
                ids[i].append(picked[i])
                logprobs[i].append(float(all_logprobs[i, picked[i]]))
            open_rows -= {i for i in open_rows if picked[i] == self.eos_id}
            if not open_rows:
                break
            step = torch.tensor(picked, device=self.device).unsqueeze(1)
            output = self.model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1]
        completions = tuple(self._completion(*pair) for pair in zip(ids, logprobs, strict=True))
        prompt = token_runs(inputs["input_ids"][0].tolist())
        return Group(request.group_id, request.prompt_id, prompt, completions)

    def _pick(
        self, all_logprobs: torch.Tensor, generators: list[torch.Generator], greedy: bool
    ) -> list[int]:
        if greedy:
            return all_logprobs.argmax(-1).tolist()
        return [
            int(torch.multinomial(row.exp(), 1, generator=generator))
            for row, generator in zip(all_logprobs, generators, strict=True)
        ]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        reason = "stop" if ids and ids[-1] == self.eos_id else "length"
        return Completion(tuple(ids), tuple(logprobs), text, reason, self.policy_version)

    @torch.no_grad()
    def score(self, request: PromptRequest, token_ids: Sequence[int]) -> list[float]:
        inputs = self.inputs(request)
        tokens = torch.tensor([list(token_ids)], device=self.device)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
        logits = self.model(**inputs, logits_to_keep=len(token_ids) + 1).logits[0, :-1]
        chosen = logits.float().log_softmax(-1).gather(1, tokens[0].unsqueeze(1))
        return chosen.squeeze(1).tolist()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies canonical weights into the model; a strange name is an error."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights.items():
            parameters[module_key(name)].copy_(tensor)

    def load_adapter(self, files: Mapping[str, bytes], policy_version: int) -> None:
        from peft import PeftModel

        base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.model = PeftModel.from_pretrained(base, folder).eval()
        self.policy_version = policy_version

    def set_policy_version(self, policy_version: int) -> None:
        self.policy_version = policy_version

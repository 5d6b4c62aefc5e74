"""The `Engine` on vLLM: one engine in this process, its weights replaced between batches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors

from posttrain.data.audio import load_audio
from posttrain.data.chat import drop_tokenless_tail, render
from posttrain.model.audio_embeddings import AudioEmbeddings
from posttrain.model.load import audio_limit_s, check_architecture, load_processor
from posttrain.rollout.settings import STORED_AUDIO, EngineSettings
from posttrain.types import Completion, Group, PromptRequest, SamplingSettings, token_runs

PROBE_TEXT = "Identify the relevant events first, then answer."
CPU_MAX_BATCHED_TOKENS = 8_192
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # sizes that vLLM allocates


def set_vllm_environment(settings: EngineSettings) -> None:
    """Variables that vLLM reads at import; set in the worker, never in the user's shell."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if settings.tensor_parallel_size == 1:
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if settings.device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


class VllmEngine:
    """vLLM behind the `Engine` protocol.

    Raises:
        ValueError: checkpoint of another architecture; audio that cannot be read.
    """

    def __init__(self, settings: EngineSettings) -> None:
        set_vllm_environment(settings)
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        check_architecture(settings.checkpoint)
        self.settings = settings
        self.policy_version = 0
        self._adapter: Any = None
        self._proven_names: frozenset[str] | None = None
        self._adapter_dir = Path(tempfile.mkdtemp(prefix="posttrain-adapter-"))
        self.processor = load_processor(settings.checkpoint)
        store = settings.audio_store
        self.audio = AudioEmbeddings(store, settings.device) if store else None
        if settings.device == "cpu" and settings.threads:
            torch.set_num_threads(settings.threads)
        self.llm = LLM(
            model=settings.checkpoint,
            dtype=settings.dtype,
            seed=settings.seed,
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            enable_prefix_caching=True,
            enforce_eager=settings.device == "cpu",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            enable_lora=settings.max_lora_rank is not None,
            **self._arguments_by_settings(),
            weight_transfer_config=WeightTransferConfig(backend=settings.transfer_backend),
        )

    def _arguments_by_settings(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        audio = {"count": 1}
        if self.settings.max_lora_rank is not None:
            rank = next(r for r in LORA_RANKS if r >= self.settings.max_lora_rank)
            arguments |= {"max_lora_rank": rank, "max_loras": 2}
        if self.settings.tensor_parallel_size > 1:
            arguments["distributed_executor_backend"] = "mp"
        if self.settings.audio_store is not None:
            arguments["enable_mm_embeds"] = True
            arguments["hf_overrides"] = {STORED_AUDIO: self.settings.audio_store.kind.value}
        if self.settings.device == "cpu":
            # a seeded prompt that is prefilled in pieces fails on CPU: its generator has no offset
            arguments["enable_chunked_prefill"] = False
            longest = self.settings.max_model_len or CPU_MAX_BATCHED_TOKENS
            arguments["max_num_batched_tokens"] = max(longest, CPU_MAX_BATCHED_TOKENS)
            arguments["skip_mm_profiling"] = True
            # the silence that vLLM warms up with: one window instead of half an hour
            audio["length"] = self.processor.feature_extractor.n_samples
        arguments["limit_mm_per_prompt"] = {"audio": audio}
        return arguments

    def generate(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> list[Group]:
        """All groups of one batch, in the order asked."""
        from vllm import SamplingParams

        prompts = [self._prompt(request) for request in requests]
        greedy = settings.temperature == 0
        params = [
            SamplingParams(
                n=1 if greedy else settings.num_completions,
                temperature=settings.temperature,
                max_tokens=settings.max_tokens,
                seed=None if greedy else request.seed,
                logprobs=0,
            )
            for request in requests
        ]
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
        return [
            Group(
                group_id=request.group_id,
                prompt_id=request.prompt_id,
                prompt_runs=token_runs(output.prompt_token_ids),
                completions=tuple(self._completion(one) for one in output.outputs),
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _prompt(self, request: PromptRequest) -> dict[str, Any]:
        path = request.audio_path
        has_audio = path is not None
        prompt: dict[str, Any] = {
            "prompt": render(self.processor, request.messages, has_audio=has_audio)
        }
        if path is not None and self.audio is not None:
            key, audio = self.audio(path)
            prompt["multi_modal_data"] = {"audio": {"audio_embeds": [audio]}}
            prompt["multi_modal_uuids"] = {"audio": [key]}
        elif path is not None:
            limit_s = audio_limit_s(self.processor, self.settings.max_audio_len_s)
            waveform = load_audio(path, max_duration_s=limit_s)
            prompt["multi_modal_data"] = {"audio": drop_tokenless_tail(waveform, self.processor)}
        return prompt

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        logprobs = tuple(
            step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)
        )
        return Completion(ids, logprobs, output.text, output.finish_reason, self.policy_version)

    def score(self, request: PromptRequest, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each of `token_ids` after the prompt, at temperature 1."""
        return self._score(request, token_ids, self._adapter)

    def _score(self, request: PromptRequest, token_ids: Sequence[int], adapter: Any) -> list[float]:
        from vllm import SamplingParams

        prompt = self._prompt(request)
        tokenizer = self.processor.tokenizer
        prompt_ids = tokenizer.encode(prompt.pop("prompt"), add_special_tokens=False)
        prompt["prompt_token_ids"] = [*prompt_ids, *token_ids]
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = self.llm.generate([prompt], [params], use_tqdm=False, lora_request=adapter)
        last = output.prompt_logprobs[-len(token_ids) :]
        return [step[token].logprob for step, token in zip(last, token_ids, strict=True)]

    def load_adapter(self, files: Mapping[str, bytes], policy_version: int) -> None:
        """Serves a PEFT adapter under a new name: the prefix cache is keyed on the name.

        Raises:
            RuntimeError: vLLM would load the adapter and ignore it.
        """
        tensors = load_safetensors(files["adapter_model.safetensors"])
        if frozenset(tensors) != self._proven_names:
            self._prove_adapter_acts(files, tensors)
        previous = self._adapter
        self._adapter = self._add_adapter(files, f"policy-{policy_version}", policy_version + 2)
        if previous is not None and previous.lora_int_id != self._adapter.lora_int_id:
            self._remove_adapter(previous)
        self.policy_version = policy_version

    def _prove_adapter_acts(
        self, files: Mapping[str, bytes], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Every adapter of a run has the same module names, so the first set of names is tried
        with large weights: the answer must change. A real first update may drown in bfloat16."""
        loud = {
            name: torch.full_like(tensor, 0.1) if "lora_B" in name else tensor
            for name, tensor in tensors.items()
        }
        loud_files = dict(files) | {"adapter_model.safetensors": dump_safetensors(loud)}
        adapter = self._add_adapter(loud_files, "proof", 1)
        probe = PromptRequest("probe", "probe", ({"role": "user", "content": PROBE_TEXT},), None, 0)
        ids = self.processor.tokenizer.encode(PROBE_TEXT, add_special_tokens=False)
        if self._score(probe, ids, adapter) == self._score(probe, ids, None):
            raise RuntimeError(
                "vLLM loads the LoRA adapter and ignores it: its module names do not reach "
                "vLLM's; check hf_to_vllm_mapper in posttrain/rollout/vllm_afnext.py"
            )
        self._remove_adapter(adapter)
        self._proven_names = frozenset(tensors)

    def _add_adapter(self, files: Mapping[str, bytes], name: str, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        folder = self._adapter_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for file_name, content in files.items():
            (folder / file_name).write_bytes(content)
        adapter = LoRARequest(name, number, str(folder))
        self.llm.llm_engine.add_lora(adapter)
        return adapter

    def _remove_adapter(self, adapter: Any) -> None:
        self.llm.llm_engine.remove_lora(adapter.lora_int_id)
        shutil.rmtree(adapter.lora_path, ignore_errors=True)

    def transfer_rpc(self, method: str, *arguments: Any) -> None:
        """Forwards a call of vLLM's weight-transfer protocol to every worker of this engine."""
        self.llm.collective_rpc(method, args=arguments)

    def set_policy_version(self, policy_version: int) -> None:
        """After new weights: every cached key, value and encoder output is stale."""
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.policy_version = policy_version

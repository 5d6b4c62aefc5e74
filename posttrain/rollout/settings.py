"""What an inference worker needs to know; plain data, sent to the worker's process."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.model.audio_embeddings import AudioStoreSettings

STORED_AUDIO = "posttrain_stored_audio"
"""Key in vLLM's copy of the model config: what `audio_embeds` hold, a `StoredAudio`."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides an engine.

    Attributes:
        device: "cuda" or "cpu".
        max_model_len: prompt and completion, tokens; None: the checkpoint's limit.
        max_audio_len_s: longest clip, seconds; None: the processor's limit.
        max_lora_rank: None when no adapter will be served.
        threads: CPU threads of the engine; None: all.
        transfer_backend: of full weight syncs: "nccl" when learner and engine are both on GPUs.
        audio_store: where encoded clips are kept; None: the engine encodes waveforms itself.
    """

    checkpoint: str
    engine: str = "vllm"
    device: str = "cpu"
    dtype: str = "bfloat16"
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    cpu_kv_cache_gib: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_audio_len_s: float | None = None
    max_lora_rank: int | None = None
    threads: int | None = None
    transfer_backend: str = "gloo"
    audio_store: AudioStoreSettings | None = None

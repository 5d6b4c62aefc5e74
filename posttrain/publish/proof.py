"""What a published folder must show before it counts: the same model, in both libraries.

source --logits--> equal? <--logits-- folder, read again by transformers
folder --vLLM--> samples --transformers--> the same log-probabilities; an answer about a clip
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio
from posttrain.data.chat import encode
from posttrain.model.load import load_model, load_processor
from posttrain.rollout.parity import ParityReport, measure_parity

PROOF_S = 30.0  # of a clip: a long one's logits would fill a GPU


@dataclass(frozen=True)
class Example:
    """A question about a clip, and what the published model said."""

    question: str
    audio: Path
    answer: str = ""


@dataclass(frozen=True)
class Proof:
    """What was found; all of it held, or there would be no proof."""

    logits_compared: int
    parity: ParityReport
    example: Example


def logits_of(path: str, question: str, audio: Path, dtype: torch.dtype) -> torch.Tensor:
    """(T, V) float32 logits of a question about the first `PROOF_S` of a clip, on the CPU.

    The model is freed again.
    """
    processor = load_processor(path)
    model: Any = load_model(path, dtype=dtype, device=_device())
    inputs = _inputs(processor, model, question, audio)
    with torch.no_grad():
        logits = model(**inputs).logits[0].cpu().float()
    del model, inputs
    free_memory()
    return logits


def prove(
    folder: Path,
    expected_TV: torch.Tensor,
    example: Example,
    dtype: str,
    clips_s: tuple[float, ...],
) -> Proof:
    """Reads the folder again and compares.

    Args:
        expected_TV: `logits_of` the model that was to be published.
        clips_s: lengths for `parity`.

    Raises:
        RuntimeError: what differs, and by how much.
    """
    found_TV = logits_of(str(folder), example.question, example.audio, getattr(torch, dtype))
    if not torch.equal(found_TV, expected_TV):
        difference = float((found_TV - expected_TV).abs().max())
        raise RuntimeError(f"{folder}: logits differ from the source's by up to {difference:.3g}")
    answer = answer_of(str(folder), example.question, example.audio, getattr(torch, dtype))
    report = measure_parity(str(folder), clips_s=clips_s, dtype=dtype)  # last: vLLM keeps memory
    if not report.within_tolerance:
        raise RuntimeError(f"{folder}: vLLM and transformers differ:\n{report.to_text()}")
    return Proof(found_TV.numel(), report, Example(example.question, example.audio, answer))


def answer_of(path: str, question: str, audio: Path, dtype: torch.dtype) -> str:
    """A greedy answer of at most 256 tokens, by transformers."""
    processor = load_processor(path)
    model: Any = load_model(path, dtype=dtype, device=_device())
    inputs = _inputs(processor, model, question, audio)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if not text.strip():
        raise RuntimeError(f"{path}: says nothing about {audio}")
    del model, inputs
    free_memory()
    return str(text)


def free_memory() -> None:
    """Of models that nothing refers to any more, so that an engine finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _inputs(processor: Any, model: Any, question: str, audio: Path) -> dict[str, Any]:
    waveform = load_audio(audio)[: round(PROOF_S * SAMPLE_RATE_HZ)]
    encoded = encode(processor, [{"role": "user", "content": question}], waveform)
    dtype = next(model.parameters()).dtype
    return {
        name: (
            value.to(model.device, dtype) if value.is_floating_point() else value.to(model.device)
        )
        for name, value in encoded.items()
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

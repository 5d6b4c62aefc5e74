"""Rollouts: a vLLM worker with stored embeddings and prefix cache against transformers' `generate`.

    python -m benchmarks.rollout --json

Two processes answer the same prompts in turns. vLLM is the engine of a rollout worker: audio
embeddings from the store, one prefill a group, caches emptied before every turn as after a weight
sync. transformers is one cached `generate` of the G completions of each prompt as one batch, audio
encoded inside, as `num_return_sequences` does it. Both sample from the same checkpoint until the
model ends its answer; tokens are counted up to that end.

Prints medians, and:
    prefill_tokens_computed   that vLLM ran, counted in its scheduler, of prefill_tokens_asked
    encode_s                  once a clip, on the first turn of a run; not in the other figures
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.sides import Side

QUESTION = "Identify the relevant events first, then answer."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="checkpoints/af-next-nano")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--side", choices=("vllm", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    figures = compare(options)
    text = "\n".join(f"{name:26} {value}" for name, value in figures.items())
    print(json.dumps(figures) if options.json else text)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Lets both sides take turns; the first turn of each only warms up."""
    with tempfile.TemporaryDirectory() as folder:
        write_clips(options, Path(folder))
        names = ("vllm", "transformers")
        sides = {name: Side("benchmarks.rollout", name, folder) for name in names}
        first = {name: side.ask("turn") for name, side in sides.items()}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name, side in sides.items():
                turns[name].append(side.ask("turn"))
        for side in sides.values():
            side.end()
    rate = {
        name: statistics.median(turn["tokens"] / turn["seconds"] for turn in turns[name])
        for name in names
    }
    last = turns["vllm"][-1]
    return {
        "minutes": options.minutes, "prompts": options.prompts, "group_size": options.group_size,
        "repeats": options.repeats,
        "vllm_tokens_per_s": round(rate["vllm"], 1),
        "transformers_tokens_per_s": round(rate["transformers"], 1),
        "speedup": round(rate["vllm"] / rate["transformers"], 2),
        "prefill_tokens_computed": last["prefilled"],
        "prefill_tokens_asked": last["prompt_tokens"] * options.group_size,
        "encode_s": round(first["vllm"]["encode_s"], 3),
    }  # fmt: skip


def write_clips(options: argparse.Namespace, folder: Path) -> None:
    import numpy as np

    from posttrain.data.audio import SAMPLE_RATE_HZ, write_audio

    for i in range(options.prompts):
        samples = round(options.minutes * 60 * SAMPLE_RATE_HZ)
        noise = np.random.default_rng(i).standard_normal(samples, dtype=np.float32)
        write_audio(folder / f"clip-{i}.wav", 0.1 * noise)


def serve(options: argparse.Namespace) -> None:
    """One side: answers all prompts each time it is asked."""
    turn = VllmTurn(options) if options.side == "vllm" else TransformersTurn(options)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


class VllmTurn:
    def __init__(self, options: argparse.Namespace) -> None:
        from posttrain.model.audio_embeddings import AudioStoreSettings, StoredAudio
        from posttrain.rollout.settings import EngineSettings
        from posttrain.rollout.vllm_engine import VllmEngine
        from posttrain.types import PromptRequest, SamplingSettings

        store = AudioStoreSettings(
            options.checkpoint, StoredAudio.EMBEDDINGS, "float32", f"{options.out}/store"
        )
        room = int(options.minutes * 60 * 25) + options.completion_tokens + 128
        self.engine = VllmEngine(
            EngineSettings(
                options.checkpoint, dtype="float32", max_model_len=room, audio_store=store,
                threads=options.threads,
            )
        )  # fmt: skip
        self.sampling = SamplingSettings(1.0, options.completion_tokens, options.group_size)
        messages = ({"role": "user", "content": QUESTION},)
        self.requests = [
            PromptRequest(f"{i}", f"{i}", messages, f"{options.out}/clip-{i}.wav", i)
            for i in range(options.prompts)
        ]
        self.scheduled, self.version = 0, 0
        scheduler = self.engine.llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def counted(*arguments: Any) -> Any:
            output = schedule(*arguments)
            self.scheduled += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted

    def __call__(self) -> dict[str, Any]:
        started = time.perf_counter()
        assert self.engine.audio is not None
        for request in self.requests:
            self.engine.audio(str(request.audio_path))
        encode_s = time.perf_counter() - started
        self.version += 1
        self.engine.set_policy_version(self.version)
        self.scheduled = 0
        started = time.perf_counter()
        groups = self.engine.generate(self.requests, self.sampling)
        seconds = time.perf_counter() - started
        counts = [c.num_tokens for group in groups for c in group.completions]
        # a sequence's first token comes out of its prefill, every later one is scheduled by itself
        prefilled = self.scheduled - (sum(counts) - len(counts))
        prompt_tokens = sum(group.num_prompt_tokens for group in groups)
        return {
            "seconds": seconds, "tokens": sum(counts), "encode_s": encode_s,
            "prefilled": prefilled, "prompt_tokens": prompt_tokens,
        }  # fmt: skip


class TransformersTurn:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from transformers.utils import logging

        from posttrain.data.audio import load_audio
        from posttrain.data.chat import encode
        from posttrain.model.load import load_model, load_processor

        logging.set_verbosity_error()
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.options = options
        self.model: Any = load_model(options.checkpoint)
        processor = load_processor(options.checkpoint)
        self.eos = processor.tokenizer.eos_token_id
        messages = [{"role": "user", "content": QUESTION}]
        self.inputs = [
            encode(processor, messages, load_audio(f"{options.out}/clip-{i}.wav"))
            for i in range(options.prompts)
        ]

    def __call__(self) -> dict[str, Any]:
        started = time.perf_counter()
        tokens = 0
        for inputs in self.inputs:
            output = self.model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                num_return_sequences=self.options.group_size,
                max_new_tokens=self.options.completion_tokens,
            )  # fmt: skip
            answers = output[:, inputs["input_ids"].shape[1] :]
            ended = (answers == self.eos).cumsum(1) - (answers == self.eos).int()
            tokens += int((ended == 0).sum())
        return {"seconds": time.perf_counter() - started, "tokens": tokens}


if __name__ == "__main__":
    main()

"""One GRPO update of AF-Next at its real size, random weights, LoRA, on one GPU.

    python -m benchmarks.gpu_grpo_step                      (about 20 minutes on 80 GB)
    python -m benchmarks.gpu_grpo_step --minutes 30 --no-dense

Needs torch, transformers and peft, and no checkpoint. For every length of audio: the packed path,
and beside it the dense one (one row at a time, clip encoded for each) where it fits. Both encode
inside the step, checkpoint their gradients and use the same log-probability code.

`peak_flops_share` is model FLOPs over what the card can do in bf16 in that time. Model FLOPs are
those of the language model's forward pass (posttrain/model/flops.py) twice, since with LoRA the
backward pass computes gradients of activations but not of the frozen matrices; attention's
backward pass counts 2.5 times its forward one. The encoder and what gradient checkpointing computes
again are not counted, so the share is of useful work. The card's figure is its data sheet's dense
bf16 rate; for a card that is not listed it is null.

Prints one JSON object; every length's figures go to stderr as soon as they are known.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MusicFlamingoConfig, MusicFlamingoForConditionalGeneration

from posttrain.algorithm.losses import policy_loss
from posttrain.model.flops import attended_pairs, forward_flops
from posttrain.model.lora import add_lora
from posttrain.model.policy import GroupTensors, Policy, choose_trainable, group_logprobs

CONFIG = Path(__file__).parent / "af_next_config.json"
LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BF16_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
}  # fmt: skip
TEXT_TOKENS = 24
Measure = Callable[[argparse.Namespace, Any, Any, float], dict[str, Any]]
Step = Callable[[Policy, list[GroupTensors]], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 5.0, 10.0, 30.0])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--offload", action="store_true", help="activations in host memory")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a smoke test of this file, on CPU too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_grpo_step: no GPU here; --device cpu --tiny tries the code")
    report(options, measure, group_size=options.group_size)


def report(options: argparse.Namespace, measure: Measure, **facts: Any) -> None:
    """Every length of audio in turn, then all figures as one JSON object."""
    model, config = build(options)
    results = []
    for minutes in options.minutes:
        results.append(measure(options, model, config, minutes))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    figures = {
        "device": device_name(options.device), "torch": torch.__version__, **facts,
        "completion_tokens": options.completion_tokens, "lora_r": options.lora_r,
        "repeats": options.repeats, "offload": options.offload, "results": results,
    }  # fmt: skip
    print(json.dumps(figures))


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model with LoRA in bfloat16 (float32 on CPU), and its config."""
    values = json.loads(CONFIG.read_text())
    if options.tiny:
        values["audio_config"] |= {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }  # fmt: skip
        values["text_config"] |= {
            "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2,
        }  # fmt: skip
    config = MusicFlamingoConfig(**values)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if options.device == "cuda" else torch.float32)
    with torch.device(options.device):
        model = MusicFlamingoForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    choose_trainable(model, train_encoder=False, train_projector=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lora = add_lora(model, r=options.lora_r, alpha=32, dropout=0.0, target_modules=LANGUAGE_LINEARS)
    for parameter in lora.parameters():  # peft makes adapters float32; DeepSpeed trains bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.to(next(model.parameters()).dtype)
    return lora.to(options.device).train(), config


def measure(options: argparse.Namespace, model: Any, config: Any, minutes: float) -> dict[str, Any]:
    """Figures of one length of audio."""
    group = random_group(options, config, minutes)
    result: dict[str, Any] = {"minutes": minutes, "prompt_tokens": len(group.prompt_ids_P)}
    flops = update_flops(config.text_config, group)
    result["shared"], shared = timed(options, model, [group], step, flops, shared_prefix=True)
    if options.no_dense:
        return result
    rows = [one_of(group, i) for i in range(options.group_size)]
    flops = sum(update_flops(config.text_config, row) for row in rows)
    result["dense"], dense = timed(options, model, rows, step, flops, shared_prefix=False)
    return result | compared(result["shared"], result["dense"], shared, dense)


def compared(
    shared: dict[str, Any], dense: dict[str, Any], shared_logprobs: Any, dense_logprobs: Any
) -> dict[str, float]:
    """Ratios and differences, where both sides fitted."""
    if shared_logprobs is None or dense_logprobs is None:
        return {}
    differences = (shared_logprobs - dense_logprobs).abs()
    return {
        "speedup": round(dense["step_s"] / shared["step_s"], 2),
        "ideal": round(dense["tokens"] / shared["tokens"], 2),
        "mean_logprob_diff": float(differences.mean()),
        "max_logprob_diff": float(differences.max()),
    }


def one_of(group: GroupTensors, index: int) -> GroupTensors:
    """A group of one of its completions, with the clip."""
    return GroupTensors(
        group.prompt_ids_P, group.completion_ids_GT[index : index + 1],
        group.mask_GT[index : index + 1], group.input_features, group.input_features_mask,
    )  # fmt: skip


def random_group(options: argparse.Namespace, config: Any, minutes: float) -> GroupTensors:
    """Noise for audio, random ids for text; the placeholders as the processor would lay them."""
    windows = round(minutes * 60 / 30 + 0.499)
    frames = 2 * config.audio_config.max_source_positions
    features = torch.randn(windows, config.audio_config.num_mel_bins, frames)
    audio = torch.full((windows * frames // 4,), config.audio_token_id)
    bos, eos = (torch.tensor([i]) for i in (config.audio_bos_token_id, config.audio_eos_token_id))
    text = torch.randint(0, 1_000, (TEXT_TOKENS,))
    shape = (options.group_size, options.completion_tokens)
    return GroupTensors(
        torch.cat([text, bos, audio, eos, text]).to(options.device),
        torch.randint(0, 1_000, shape).to(options.device),
        torch.ones(shape, dtype=torch.bool, device=options.device),
        features, torch.ones(windows, frames, dtype=torch.long),
    )  # fmt: skip


def timed(
    options: argparse.Namespace, model: Any, groups: list[GroupTensors], step: Step, flops: float,
    *, shared_prefix: bool,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Figures and log-probabilities; a word and None where memory does not suffice.

    Args:
        flops: useful operations of a step.
    """
    policy = Policy(model, shared_prefix=shared_prefix, activation_offload=options.offload)
    on_gpu = options.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(options.repeats + 1):  # the first compiles
            started = time.perf_counter()
            logprobs = step(policy, groups)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except torch.cuda.OutOfMemoryError:
        policy.zero_grad(set_to_none=True)
        return {"step_s": None, "note": "out of memory"}, None
    step_s = statistics.median(seconds[1:])
    tokens = sum(len(g.prompt_ids_P) + sum(g.lengths) - len(g.lengths) for g in groups)
    peak = BF16_FLOPS.get(device_name(options.device))
    figures = {
        "step_s": round(step_s, 3), "first_s": round(seconds[0], 3), "tokens": tokens,
        "tokens_per_s": round(tokens / step_s),
        "peak_flops_share": round(flops / step_s / peak, 4) if peak else None,
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
    }  # fmt: skip
    return figures, logprobs


def step(policy: Policy, groups: list[GroupTensors]) -> torch.Tensor:
    """Forward, policy loss and backward of one group, however it is cut."""
    policy.zero_grad(set_to_none=True)
    denominator = float(sum(group.mask_GT.numel() for group in groups))
    outputs = []
    for group in groups:
        ((logprobs_GT, _),) = group_logprobs(policy, [group], temperature=1.0)
        advantages = torch.ones(len(logprobs_GT), device=logprobs_GT.device)
        loss, _ = policy_loss(
            logprobs_GT, logprobs_GT.detach(), advantages, group.mask_GT, denominator=denominator
        )
        loss.backward()
        outputs.append(logprobs_GT.detach())
    return torch.cat(outputs)


def update_flops(config: Any, group: GroupTensors, forwards: int = 1) -> float:
    """Useful operations of so many forward passes and one backward; see the top of the file."""
    lengths = [length - 1 for length in group.lengths]
    pairs = attended_pairs(len(group.prompt_ids_P), lengths)
    tokens = len(group.prompt_ids_P) + sum(lengths)
    matrices = forward_flops(config, tokens, 0, sum(group.lengths))
    return (forwards + 1.0) * matrices + (forwards + 2.5) * forward_flops(config, 0, pairs)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()

"""One GRPO update, prompt shared against prompt repeated: time, peak memory, exactness.

    python -m benchmarks.grpo_step --minutes 5 --group-size 8 --completion-tokens 128 --json

Two processes hold the same randomly initialised AF-Next (256 wide, 4 layers, frozen encoder, the
language model trains) and the same noise clip, and take turns: dense, shared, dense, shared ...
Dense is written fairly: one row at a time, so that it too has one row's activations; encoder under
no_grad; the same log-probability code and number of threads. Both encode the clip inside the step,
dense once a row as toolkits do today, shared once. Peak memory is each process's own.

Prints medians, and:
    ideal              tokens forwarded, dense / shared
    fraction_of_ideal  speedup / ideal
    peak_rss_ratio     peak memory, shared / dense
    max_logprob_diff   nats;  max_rel_grad_diff  over parameters, |difference| / |dense gradient|
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.sides import Side

VOCAB_SIZE = 580
TEMPERATURE = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", default="checkpoints/af-next-nano")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--side", choices=("dense", "shared"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    figures = compare(options)
    print(json.dumps(figures) if options.json else as_text(figures))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Lets both sides take turns; returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side("benchmarks.grpo_step", name, f"{folder}/{name}.safetensors")
            for name in ("dense", "shared")
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, side in sides.items():
                times[name].append(side.ask("step")["seconds"])
        ends = {name: side.ask("finish") for name, side in sides.items()}
        for side in sides.values():
            side.end()
        differences = exactness(Path(folder))
    dense_s, shared_s = (statistics.median(times[name]) for name in ("dense", "shared"))
    tokens = {name: end["tokens"] for name, end in ends.items()}
    ideal = tokens["dense"] / tokens["shared"]
    return {
        "minutes": options.minutes, "group_size": options.group_size,
        "completion_tokens": options.completion_tokens, "repeats": options.repeats,
        "prompt_tokens": ends["dense"]["prompt_tokens"],
        "dense_s": round(dense_s, 3), "shared_s": round(shared_s, 3),
        "speedup": round(dense_s / shared_s, 2), "ideal": round(ideal, 2),
        "fraction_of_ideal": round(dense_s / shared_s / ideal, 3),
        "dense_peak_mib": ends["dense"]["peak_mib"], "shared_peak_mib": ends["shared"]["peak_mib"],
        "peak_rss_ratio": round(ends["shared"]["peak_mib"] / ends["dense"]["peak_mib"], 3),
        **differences,
    }  # fmt: skip


def exactness(folder: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    dense, shared = (load_file(folder / f"{name}.safetensors") for name in ("dense", "shared"))
    gradients = [name for name in dense if name != "logprobs"]
    relative = [float((shared[n] - dense[n]).norm() / dense[n].norm()) for n in gradients]
    return {
        "max_logprob_diff": float((shared["logprobs"] - dense["logprobs"]).abs().max()),
        "max_rel_grad_diff": max(relative),
    }


def serve(options: argparse.Namespace) -> None:
    """One side: a step each time it is asked, tensors and peak memory at the end."""
    import torch
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    work = Work(options)
    for line in sys.stdin:
        if line.strip() == "step":
            started = time.perf_counter()
            work.step()
            print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
            continue
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        save_file(work.results(), options.out)
        end = {"peak_mib": peak_mib, "tokens": work.num_tokens, "prompt_tokens": work.num_prompt}
        print(json.dumps(end), flush=True)
        return


class Work:
    """Model, clip and group; the same on both sides."""

    def __init__(self, options: argparse.Namespace) -> None:
        import numpy as np
        import torch

        from posttrain.data.audio import SAMPLE_RATE_HZ
        from posttrain.data.chat import encode
        from posttrain.model.load import load_processor
        from posttrain.model.nano import NanoSize, build_config, build_model
        from posttrain.model.policy import GroupTensors, Policy, choose_trainable

        torch.manual_seed(0)
        processor = load_processor(options.processor)
        size = NanoSize(
            width=options.width, layers=options.layers, heads=options.width // 32,
            kv_heads=max(1, options.width // 128), intermediate=4 * options.width,
        )  # fmt: skip
        model = build_model(build_config(processor.tokenizer, size)).train()
        choose_trainable(model, train_encoder=False, train_projector=False)
        self.shared = options.side == "shared"
        self.policy = Policy(model, shared_prefix=self.shared)
        samples = round(options.minutes * 60 * SAMPLE_RATE_HZ)
        clip = 0.1 * np.random.default_rng(0).standard_normal(samples, dtype=np.float32)
        question = [{"role": "user", "content": "When is seven heard?"}]
        batch = encode(processor, question, clip)
        shape = (options.group_size, options.completion_tokens)
        ids_GT = torch.randint(0, VOCAB_SIZE // 2, shape)
        self.advantages_G = torch.randn(options.group_size)
        whole = GroupTensors(
            batch["input_ids"][0], ids_GT, torch.ones(shape, dtype=torch.bool),
            batch["input_features"], batch["input_features_mask"],
        )  # fmt: skip
        rows = range(options.group_size)
        self.parts = [slice(None)] if self.shared else [slice(i, i + 1) for i in rows]
        self.groups = [
            GroupTensors(
                whole.prompt_ids_P, ids_GT[part], whole.mask_GT[part],
                whole.input_features, whole.input_features_mask,
            )
            for part in self.parts
        ]  # fmt: skip
        self.num_prompt = len(whole.prompt_ids_P)
        forwarded = options.completion_tokens - 1
        self.num_tokens = sum(
            self.num_prompt + len(group.completion_ids_GT) * forwarded for group in self.groups
        )

    def step(self) -> None:
        """Forward, policy loss and backward of the whole group."""
        import torch

        from posttrain.algorithm.losses import policy_loss
        from posttrain.model.policy import group_logprobs

        self.policy.zero_grad(set_to_none=True)
        denominator = float(sum(group.mask_GT.numel() for group in self.groups))
        logprobs = []
        for part, group in zip(self.parts, self.groups, strict=True):
            ((logprobs_GT, _),) = group_logprobs(self.policy, [group], temperature=TEMPERATURE)
            loss, _ = policy_loss(
                logprobs_GT, logprobs_GT.detach(), self.advantages_G[part], group.mask_GT,
                denominator=denominator,
            )  # fmt: skip
            loss.backward()
            logprobs.append(logprobs_GT.detach())
        self.logprobs_GT = torch.cat(logprobs)

    def results(self) -> dict[str, Any]:
        named = self.policy.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None}
        return {"logprobs": self.logprobs_GT, **gradients}


def as_text(figures: dict[str, Any]) -> str:
    return "\n".join(f"{name:20} {value}" for name, value in figures.items())


if __name__ == "__main__":
    main()

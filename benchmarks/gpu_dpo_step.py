"""One DPO update of AF-Next at its real size, random weights, LoRA, on one GPU.

    python -m benchmarks.gpu_dpo_step                      (about 12 minutes on 80 GB)

Several rejected answers about one clip, as `data_recipes.timestamp_pairs` makes them. Shared: the
objective's own layout, all answers behind the clip, the chosen one once. Dense: one pair at a time,
clip and chosen answer repeated in every sequence, as in trainers that know pairs only. Both compute
the reference's log-probabilities (the model without its adapter) inside the step and take the same
loss; model, adapter and timing are those of `benchmarks.gpu_grpo_step`.

Prints one JSON object; every length's figures go to stderr as soon as they are known.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu_grpo_step import (
    compared,
    one_of,
    random_group,
    report,
    timed,
    update_flops,
)
from posttrain.data.pairs import Pair
from posttrain.data.rows import Row
from posttrain.model.policy import GroupTensors, Policy, group_logprobs
from posttrain.schema import DpoConfig
from posttrain.train.audio_inputs import AudioInputs
from posttrain.train.objectives import Batch, DpoObjective, Logprobs
from posttrain.types import Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 10.0, 30.0])
    parser.add_argument("--pairs", type=int, default=5, help="rejected answers a clip")
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--offload", action="store_true", help="activations in host memory")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a smoke test of this file, on CPU too")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_dpo_step: no GPU here; --device cpu --tiny tries the code")
    options.group_size = options.pairs + 1
    report(options, measure, pairs=options.pairs)


def measure(options: argparse.Namespace, model: Any, config: Any, minutes: float) -> dict[str, Any]:
    """Figures of one length of audio."""
    group = random_group(options, config, minutes)
    objective = DpoObjective([], {}, DpoConfig(), options.pairs, cast(AudioInputs, None))
    row = Row("noise", (), None, None, Task.CHAT)
    pairs = [Pair(row, f"rejected {i}") for i in range(options.pairs)]

    def update(policy: Policy, batch: Batch) -> Logprobs:
        """Reference, loss and backward pass of a batch; the policy's log-probabilities."""
        outputs = []

        def forward(groups: Sequence[GroupTensors]) -> Logprobs:
            outputs.extend(group_logprobs(policy, groups, temperature=1.0))
            return outputs

        def reference(groups: Sequence[GroupTensors]) -> Logprobs:
            with model.disable_adapter():
                return group_logprobs(policy, groups, temperature=1.0)

        loss, _ = objective.loss(batch, forward, reference, float(options.pairs))
        loss.backward()
        return [(logprobs.detach(), entropy) for logprobs, entropy in outputs]

    def shared_step(policy: Policy, groups: list[GroupTensors]) -> Tensor:
        policy.zero_grad(set_to_none=True)
        places = [((0, 0), (0, i + 1)) for i in range(options.pairs)]
        ((logprobs_GT, _),) = update(policy, Batch(groups, options.pairs, (pairs, places)))
        return logprobs_GT

    def dense_step(policy: Policy, groups: list[GroupTensors]) -> Tensor:
        policy.zero_grad(set_to_none=True)
        rejected = []
        for i, pair in enumerate(pairs):
            batch = Batch(groups[2 * i : 2 * i + 2], 1, ([pair], [((0, 0), (1, 0))]))
            (chosen_1T, _), (rejected_1T, _) = update(policy, batch)
            rejected.append(rejected_1T)
        return torch.cat([chosen_1T, *rejected])

    rows = [one_of(group, answer) for i in range(options.pairs) for answer in (0, i + 1)]
    figures: dict[str, Any] = {"minutes": minutes, "prompt_tokens": len(group.prompt_ids_P)}
    # the policy's forward pass and the reference's
    flops = [
        sum(update_flops(config.text_config, g, forwards=2) for g in side)
        for side in ([group], rows)
    ]
    figures["shared"], shared = timed(
        options, model, [group], shared_step, flops[0], shared_prefix=True
    )
    figures["dense"], dense = timed(options, model, rows, dense_step, flops[1], shared_prefix=False)
    return figures | compared(figures["shared"], figures["dense"], shared, dense)


if __name__ == "__main__":
    main()

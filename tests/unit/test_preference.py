"""DPO: pairs on disk, their loss by hand and against TRL, both answers behind one prompt."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from probes import PlainAudio, plain_sum
from trl import DPOTrainer

from data_recipes.timestamp_pairs import make_pairs, pack_minutes
from posttrain.algorithm.preference import preference_loss, ranked_wrong
from posttrain.data.pairs import Pair, read_pairs, write_pairs
from posttrain.data.rows import Event, Row, read_rows
from posttrain.model.load import load_model
from posttrain.model.policy import Policy, group_logprobs
from posttrain.schema import DpoConfig
from posttrain.train.objectives import DpoObjective, bundled
from posttrain.types import Task
from reward_models.timestamps import parse_spans

LENGTHS = torch.tensor([[4.0, 2.0, 7.0], [5.0, 3.0, 1.0]])


def loss_of(values: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict]:
    """values: chosen, rejected, their references; (4, B)."""
    return preference_loss(
        *values, chosen_lengths_B=LENGTHS[0], rejected_lengths_B=LENGTHS[1],
        weights_B=torch.ones(3), denominator=3.0, **options,
    )  # fmt: skip


def test_sigmoid_by_hand() -> None:
    values = torch.tensor([[-4.0], [-6.0], [-5.0], [-5.0]])
    loss, metrics = preference_loss(
        *values, chosen_lengths_B=torch.tensor([2.0]), rejected_lengths_B=torch.tensor([2.0]),
        weights_B=torch.tensor([2.0]), denominator=4.0, beta=0.5, sft_weight=0.1,
    )  # fmt: skip
    # s = (-4 + 5) - (-6 + 5) = 2; log(1 + e^-1) = 0.3133; sft: 4 nats over 2 tokens
    assert float(loss) == pytest.approx((2 * 0.3132617 + 0.1 * 2.0) / 4, abs=1e-6)
    assert float(metrics["rewards/margins"]) == pytest.approx(1.0)


def test_a_pair_is_ranked_by_log_probability_a_token() -> None:
    """-6 over 4 tokens is better than -4 over 2; equals count as wrong."""
    values = torch.tensor([[-6.0, -6.0, -3.0], [-4.0, -5.0, -3.0]])
    wrong = ranked_wrong(*values, torch.tensor([4.0, 4.0, 3.0]), torch.tensor([2.0, 4.0, 3.0]))
    assert wrong.tolist() == [False, True, True]


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_losses_equal_trl(loss_type: str, beta: float) -> None:
    generator = torch.Generator().manual_seed(3)
    longest = int(LENGTHS.max())
    lengths = LENGTHS.flatten().unsqueeze(1)  # chosen, then rejected
    mask = (torch.arange(longest) < lengths).long()
    logprobs, reference = (
        -2 * torch.rand(6, longest, generator=generator) * mask for _ in range(2)
    )
    sums = torch.stack([x.sum(1) for x in (logprobs, reference)])
    values = torch.stack([sums[0, :3], sums[0, 3:], sums[1, :3], sums[1, 3:]])
    ours, _ = loss_of(values, loss_type=loss_type, beta=beta)
    assert float(ours) == pytest.approx(
        trl_loss(logprobs, reference, mask, loss_type, beta), abs=1e-6
    )


def trl_loss(
    logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, loss_type: str, beta: float
) -> float:
    """DPOTrainer._compute_loss itself; only the model's forward pass is replaced."""
    trainer: Any = object.__new__(DPOTrainer)
    answers = iter((logprobs, reference))

    def model(**inputs: Any) -> SimpleNamespace:
        values = next(answers)
        zeros = torch.zeros_like(values)
        return SimpleNamespace(
            log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    gather = SimpleNamespace(
        device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
    )
    trainer.__dict__ |= {
        "accelerator": gather, "aux_loss_enabled": False, "ld_alpha": None, "beta": beta,
        "precompute_ref_logps": False, "ref_model": model, "f_divergence_type": "reverse_kl",
        "loss_types": [loss_type], "loss_weights": [1.0], "use_weighting": False, "_tp_size": 1,
        "_total_train_tokens": 0, "label_smoothing": 0.0,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "_metrics": {"train": _Lists(), "eval": _Lists()},
    }  # fmt: skip
    policy: Any = torch.nn.Identity().eval()
    policy.is_gradient_checkpointing = False
    object.__setattr__(trainer, "model", policy)
    # a first position that no loss looks at: TRL shifts its masks by one
    whole = torch.nn.functional.pad(mask, (1, 0))
    inputs = {
        "completion_mask": whole, "input_ids": torch.zeros_like(whole),
        "attention_mask": torch.ones_like(whole),
    }  # fmt: skip
    return float(trainer._compute_loss(model, inputs, False))


class _Lists(dict):
    def __missing__(self, key: str) -> list:
        self[key] = []
        return self[key]


@pytest.fixture
def pairs(noise_clip: str, tmp_path: Path) -> list[Pair]:
    row = Row("a", ({"role": "user", "content": "When is may heard?"},), noise_clip, 2.5,
              Task.GROUNDING, (Event(1.0, 1.4, "may"),), "may", " may <t>1.0-1.4</t>")  # fmt: skip
    other = tmp_path / "other.wav"
    other.write_bytes(Path(noise_clip).read_bytes())
    return [
        Pair(row, " may <t>2.0-2.4</t>", None, "shifted", 1.0),
        Pair(row, row.answer, str(other), "audio", 2.0),
    ]


def test_pairs_on_the_packed_path_equal_plain_forwards(pairs: list[Pair], nano: str) -> None:
    """Each answer by itself through transformers, summed, into the loss."""
    config = DpoConfig(beta=0.3, sft_weight=0.2)
    objective = DpoObjective(pairs, {}, config, 16, PlainAudio(nano))  # type: ignore[arg-type]
    assert objective.num_bundles() == 1, "both pairs are about one clip"
    batch = objective.collate([0])
    assert [len(g.completion_ids_GT) for g in batch.groups] == [2, 1], "each answer once"
    policy, before = Policy(load_model(nano)), Policy(load_model(nano))
    with torch.no_grad():
        for parameter in policy.core.lm_head.parameters():
            parameter.mul_(1.1)
    now, old = (partial(group_logprobs, model, temperature=1.0) for model in (policy, before))
    loss, metrics = objective.loss(batch, now, old, 2.0)
    sums = {}
    for name, model in (("now", policy.core), ("ref", before.core)):
        model.lm_head.__class__ = torch.nn.Linear
        sums[name] = [
            [plain_sum(model, nano, pair.row.audio, pair.row.prompt, text)
             for text in (pair.row.answer, pair.rejected)]
            for pair in pairs
        ]  # fmt: skip
    expected = 0.0
    for pair, now, ref in zip(pairs, sums["now"], sums["ref"], strict=True):
        margin = (now[0][0] - ref[0][0]) - (now[1][0] - ref[1][0])
        nll = -now[0][0] / now[0][1]
        expected += (pair.weight * math.log1p(math.exp(-0.3 * margin)) + 0.2 * nll) / 2
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    for pair, sums_now in zip(pairs, sums["now"], strict=True):
        (chosen, chosen_length), (rejected, rejected_length) = sums_now
        wrong = chosen / chosen_length <= rejected / rejected_length
        share = objective.means({n: float(v) for n, v in metrics.items()}, 2.0)
        assert share[f"ranked_wrong_{pair.kind}"] == float(wrong)
        assert 0 <= share["ranked_wrong"] <= 1 and not any("of kind" in name for name in share)


def test_a_bundle_of_pairs_has_two_clips_at_most_and_no_pair_twice(pairs: list[Pair]) -> None:
    same, other = pairs
    late, none = replace(same, rejected=" may <t>9.0-9.4</t>"), replace(same, rejected=" nothing")
    third = replace(other, rejected_audio="third.wav")
    bundles = bundled([same, other, late, third, other, none], 16)
    assert bundles == [(same, other, late), (third,), (other, none)]
    assert bundled([same, late, other], 2) == [(same, late), (other,)]
    assert bundled([same, other, same, late], 16) == [(same, other), (same, late)]


def test_pairs_survive_the_disk(pairs: list[Pair], tmp_path: Path) -> None:
    pairs = [Pair(pairs[0].row, pairs[0].rejected, None, "shifted", 1.5)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


def test_the_chosen_answer_counts_whatever_the_prompts_form(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "perhaps"}]
    record = {"id": "p", "messages": talk, "task": "chat", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    (pair,) = read_pairs(tmp_path / "pairs.jsonl")
    assert pair.row.answer == "yes" and pair.row.prompt == (talk[0],)


def test_pairs_about_choices_and_unlabelled_clips_survive_too(
    noise_clip: str, tmp_path: Path
) -> None:
    ask = ({"role": "user", "content": "Which? (A) may (B) six"},)
    choice = Row("c", ask, noise_clip, 2.5, Task.CHOICE, answer="A", choices=("may", "six"))
    unlabelled = Row("u", ask, noise_clip, 2.5, Task.GROUNDING, answer="<t>1.0-1.4</t>")
    pairs = [Pair(choice, "B"), Pair(unlabelled, "<t>2.0-2.4</t>")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_audio": {"path": "x"}}, "rejected_audio is .*; give a path"),
        ({"rejected": ""}, "pairs.jsonl:1: `rejected` is ''"),
        ({"rejected": "yes"}, "the same text; drop the pair"),
        ({"weight": 0}, "weight is 0; a number above 0"),
        ({"chosen": None}, "`chosen` is None"),
        ({"rejected": ["no"]}, r"`rejected` is \['no'\]"),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, change: dict, message: str) -> None:
    record = {"id": "p", "prompt": "Is it?", "task": "chat", "chosen": "yes", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record | change) + "\n")
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.jsonl")


def test_spoilt_answers_are_spoilt_in_their_way(timelines: Path) -> None:
    rows = [r for r in read_rows(timelines / "train.jsonl") if r.task.value != "absent"]
    pairs = make_pairs(rows, seed=1)
    kinds = {pair.kind for pair in pairs}
    assert {"shifted", "dropped", "packed", "invented", "audio", "swapped"} <= kinds
    assert pairs == make_pairs(rows, seed=1), "the same pairs for the same seed"
    for pair in pairs:
        spans = [
            parse_spans(text, pair.row.duration_s, form="grounding").valid_spans
            for text in (pair.row.answer, pair.rejected)
        ]
        if pair.kind == "audio":
            assert pair.rejected == pair.row.answer and pair.rejected_audio != pair.row.audio
        elif pair.kind == "dropped":
            assert len(spans[1]) == len(spans[0]) - 1 and pair.weight == 2.0
        elif pair.kind == "invented":
            assert len(spans[1]) == len(spans[0]) + 1
        elif pair.kind == "packed":
            start_s = pair.row.target_spans[0][0]
            assert f"<t>{pack_minutes(start_s)}-" in pair.rejected
        assert pair.kind == "audio" or pair.rejected != pair.row.answer


def test_packed_minutes_of_a_time() -> None:
    assert [pack_minutes(s) for s in (63.4, 9.96, 0.0, 119.96)] == [
        "1.034",
        "0.100",
        "0.000",
        "2.000",
    ]

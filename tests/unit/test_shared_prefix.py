"""The packed path against transformers and the dense path: values, gradients, who sees whom."""

from __future__ import annotations

import pytest
import torch

from posttrain.data.chat import encode
from posttrain.model import shared_prefix
from posttrain.model.flex_prefix import bucket, flex_prefix_attention, prefix_block_mask
from posttrain.model.load import load_model, load_processor
from posttrain.model.lora import add_lora
from posttrain.model.policy import GroupTensors, Policy, group_logprobs
from posttrain.model.prefix_check import (
    GRADIENT_TOLERANCES,
    LOGPROB_TOLERANCES,
    compare_with_dense,
)
from posttrain.model.shared_prefix import PackedLayout, packed_layout, sdpa_prefix_attention

QUESTION = [{"role": "user", "content": "When is seven heard?"}]
LENGTHS = (7, 1, 12)


def clip(seconds: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(seconds * 16_000), generator=generator)


def group(processor: object, seconds: float, lengths: tuple[int, ...], seed: int = 0):  # type: ignore[no-untyped-def]
    batch = encode(processor, QUESTION, clip(seconds, seed).numpy() if seconds else None)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return GroupTensors(
        batch["input_ids"][0], ids * mask, mask, batch.get("input_features"),
        batch.get("input_features_mask"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def processor(nano: str) -> object:
    return load_processor(nano)


@pytest.fixture(scope="module")
def groups(processor: object) -> list[GroupTensors]:
    """Two clips of different lengths and one prompt without audio."""
    return [
        group(processor, 23.0, LENGTHS), group(processor, 0.0, (3, 4), 1),
        group(processor, 11.5, (2, 9, 5, 1), 2),
    ]  # fmt: skip


def gradients(policy: Policy, groups: list[GroupTensors]) -> tuple[list, dict]:
    """Outputs, and gradients of a loss with a weight of its own for every token."""
    policy.zero_grad()
    outputs = group_logprobs(policy, groups, temperature=0.7)
    generator = torch.Generator().manual_seed(3)
    loss = sum((lp * torch.randn(lp.shape, generator=generator)).sum() for lp, _ in outputs)
    loss.backward()  # type: ignore[union-attr]
    named = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return [(lp.detach(), entropy) for lp, entropy in outputs], named


def relative_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys() and one
    norms = [(one[n] - other[n]).norm() / other[n].norm().clamp(min=1e-12) for n in other]
    return float(max(norms))


@pytest.mark.parametrize("packed", [True, False])
def test_logprobs_equal_plain_transformers(
    nano: str, groups: list[GroupTensors], packed: bool
) -> None:
    plain = load_model(nano)
    policy = Policy(load_model(nano), shared_prefix=packed)
    with torch.no_grad():
        outputs = group_logprobs(policy, groups, temperature=0.7)
        for inputs, (logprobs, entropy) in zip(groups, outputs, strict=True):
            for i, length in enumerate(inputs.lengths):
                ids = inputs.completion_ids_GT[i, :length]
                audio = {
                    "input_features": inputs.input_features,
                    "input_features_mask": inputs.input_features_mask,
                }
                logits = plain(
                    input_ids=torch.cat([inputs.prompt_ids_P, ids]).unsqueeze(0),
                    **(audio if inputs.has_audio else {}),
                ).logits[0, -length - 1 : -1]
                expected = (logits / 0.7).log_softmax(-1)
                chosen = expected.gather(1, ids.unsqueeze(1)).squeeze(1)
                torch.testing.assert_close(logprobs[i, :length], chosen, atol=1e-5, rtol=1e-5)
                assert float(logprobs[i, length:].abs().sum()) == 0.0
                plain_entropy = -(expected.exp() * expected).sum(-1)
                torch.testing.assert_close(entropy[i, :length], plain_entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["full", "lora", "checkpointing", "offload", "encoder"])
def test_gradients_equal_the_dense_path(
    nano: str, groups: list[GroupTensors], variant: str
) -> None:
    results = []
    for packed in (True, False):
        model = load_model(nano)
        model.model.audio_tower.requires_grad_(variant == "encoder")
        if variant in ("checkpointing", "offload"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if variant == "lora":
            torch.manual_seed(0)
            model = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "up_proj"])
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        policy = Policy(
            model, shared_prefix=packed, activation_offload=variant == "offload"
        ).train()
        results.append(gradients(policy, groups))
    (shared, packed_gradients), (dense, dense_gradients) = results
    for (one, _), (other, _) in zip(shared, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert any("audio_tower" in n for n in packed_gradients) == (variant == "encoder")
    assert any("lora_A" in n for n in packed_gradients) == (variant == "lora")
    assert relative_difference(packed_gradients, dense_gradients) <= 1e-4


@pytest.mark.parametrize("trains", ["projector", "encoder", "nothing"])
def test_parts_that_train_are_called_without_audio_too(
    nano: str, groups: list[GroupTensors], trains: str
) -> None:
    """Under ZeRO a rank whose micro-batch has no clip must keep the others company."""
    model = load_model(nano)
    core = model.model
    core.audio_tower.requires_grad_(trains == "encoder")
    core.multi_modal_projector.requires_grad_(trains != "nothing")
    silent = [groups[1]]
    expected, _ = gradients(Policy(load_model(nano)), silent)
    outputs, named = gradients(Policy(model), silent)
    torch.testing.assert_close(outputs[0][0], expected[0][0], atol=0, rtol=0)
    called = {name.split(".")[2] for name in named if "audio_tower" in name or "projector" in name}
    everything = {"audio_tower", "multi_modal_projector"}
    wanted = {"projector": {"multi_modal_projector"}, "encoder": everything, "nothing": set()}
    assert called == wanted[trains]
    assert all(float(g.abs().max()) == 0 for n, g in named.items() if "projector" in n)


def test_the_check_keeps_checkpointing_and_offload(
    nano: str, groups: list[GroupTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is a training step's: layers are computed twice, and only their inputs kept."""
    model = load_model(nano)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, activation_offload=True).train()
    calls = []
    layer = model.model.language_model.layers[1].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    offloaded = []
    save_on_cpu = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(
        torch.autograd.graph, "save_on_cpu", lambda **o: offloaded.append(1) or save_on_cpu(**o)
    )
    found = compare_with_dense(policy, groups[0], temperature=1.0, prompt_tokens=200, completions=2)
    assert (found.prompt_tokens, found.completions) == (200, 2)
    assert found.logprob <= 1e-4 and found.gradient <= 1e-4
    assert len(calls) == 2 * 3, "one packed and two dense rows, each again in its backward pass"
    assert offloaded and policy.training
    assert policy.core.model.language_model.layers[0].training


def test_the_check_sees_a_leak(
    nano: str, groups: list[GroupTensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain causal attention over the packed sequence, as other integrations fall back to."""

    def plain_causal(query, key, value, layout, scaling):  # type: ignore[no-untyped-def]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )

    monkeypatch.setattr(shared_prefix, "sdpa_prefix_attention", plain_causal)
    found = compare_with_dense(
        Policy(load_model(nano)), groups[0], temperature=1.0, prompt_tokens=200, completions=3
    )
    assert found.logprob > max(LOGPROB_TOLERANCES.values())
    assert found.gradient > max(GRADIENT_TOLERANCES.values())


def test_a_completion_sees_neither_siblings_nor_other_groups(
    nano: str, processor: object, groups: list[GroupTensors]
) -> None:
    """Other tokens elsewhere change nothing; its own earlier tokens and its prompt do."""
    policy = Policy(load_model(nano))

    def first_completion(changed: list[GroupTensors]) -> torch.Tensor:
        with torch.no_grad():
            return group_logprobs(policy, changed, temperature=1.0)[0][0][0]

    start = first_completion(groups)
    sibling = group(processor, 23.0, LENGTHS)
    sibling.completion_ids_GT[2] = (sibling.completion_ids_GT[2] + 1) % 300
    other_group = group(processor, 11.5, (2, 9, 5, 1), seed=9)
    torch.testing.assert_close(
        first_completion([sibling, groups[1], other_group]), start, atol=1e-6, rtol=0
    )
    own = group(processor, 23.0, LENGTHS)
    own.completion_ids_GT[0, 2] = (own.completion_ids_GT[0, 2] + 1) % 300
    moved = first_completion([own, *groups[1:]])
    torch.testing.assert_close(moved[:2], start[:2], atol=1e-6, rtol=0)
    assert float((moved[3:7] - start[3:7]).abs().min()) > 1e-6
    other_clip = group(processor, 23.0, LENGTHS, seed=5)
    other_clip.completion_ids_GT = groups[0].completion_ids_GT
    assert float((first_completion([other_clip])[:7] - start[:7]).abs().min()) > 1e-6


def test_a_sampled_sound_token_stays_a_token(nano: str, processor: object) -> None:
    """Only placeholders of the prompt hold audio."""
    inputs = group(processor, 5.0, (6,))
    inputs.completion_ids_GT[0, 2] = load_model(nano).config.audio_token_id
    outputs = []
    for packed in (True, False):
        policy = Policy(load_model(nano), shared_prefix=packed)
        with torch.no_grad():
            outputs.append(group_logprobs(policy, [inputs], temperature=1.0))
    torch.testing.assert_close(outputs[0][0][0], outputs[1][0][0], atol=1e-5, rtol=1e-5)


def test_positions_and_segments_by_hand() -> None:
    layout = packed_layout([3, 2], [[3, 1, 2], [2]], torch.device("cpu"))
    assert layout.num_tokens == 9
    assert layout.position_N.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert layout.segment_N.tolist() == [0, 0, 0, 1, 1, 3, 0, 0, 1]
    assert layout.group_N.tolist() == [0] * 6 + [1] * 3
    with pytest.raises(ValueError, match="at least one"):
        packed_layout([3], [[2, 0]], torch.device("cpu"))


def visible_by_hand(layout: PackedLayout) -> torch.Tensor:
    """(N, N) who attends to whom, token by token."""
    n = layout.num_tokens
    seen = torch.zeros(n, n, dtype=torch.bool)
    for span in layout.spans:
        starts = [span.completions_start + sum(span.lengths[:i]) for i in range(len(span.lengths))]
        for q in range(span.start, span.completions_start):
            seen[q, span.start : q + 1] = True
        for start, length in zip(starts, span.lengths, strict=True):
            for q in range(start, start + length):
                seen[q, span.start : span.completions_start] = True
                seen[q, start : q + 1] = True
    return seen


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_both_kernels_follow_the_layout(kv_heads: int) -> None:
    layout = packed_layout([150, 70], [[40, 1, 90], [33, 60]], torch.device("cpu"))
    n = layout.num_tokens
    seen = visible_by_hand(layout)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, 16, generator=generator, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    repeated = [x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value)]
    scores = (query @ repeated[0].transpose(-1, -2)) * 0.25
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ repeated[1]
    weights = torch.randn(expected.shape, generator=generator)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    output = sdpa_prefix_attention(query, key, value, layout, 0.25)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    actual = torch.autograd.grad((output * weights).sum(), (query, key, value))
    for one, other in zip(actual, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # FlexAttention has no backward pass on CPU; tests/gpu has its gradients
        flex = flex_prefix_attention(query, key, value, layout, 0.25)
    torch.testing.assert_close(flex, expected, atol=1e-5, rtol=1e-4)


def test_block_mask_marks_full_and_partial_blocks() -> None:
    layout = packed_layout([700, 300], [[200, 129], [150]], torch.device("cpu"))
    mask = prefix_block_mask(layout, bucket(layout.num_tokens))
    n = layout.num_tokens
    seen = torch.nn.functional.pad(visible_by_hand(layout), (0, mask.shape[-1] - n) * 2)
    blocks = seen.view(-1, 128, seen.shape[1] // 128, 128).transpose(1, 2).flatten(2)
    full = blocks.all(-1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(-1))
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks[0, 0].tolist() == full.sum(-1).tolist()


def test_lengths_fall_into_few_buckets() -> None:
    for n in (1, 1_024, 1_025, 7_532, 45_026, 53_218):
        assert n <= bucket(n) <= max(1_024, n * 1.125 + 128)
        assert bucket(n) % 128 == 0 and bucket(bucket(n)) == bucket(n)
    assert len({bucket(n) for n in range(1_024, 65_537, 16)}) <= 50

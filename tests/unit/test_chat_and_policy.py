"""Masks on expanded ids, and the policy's log-probabilities against plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.data.chat import assistant_mask, drop_tokenless_tail, encode, render
from posttrain.model.load import load_model, load_processor
from posttrain.model.logprobs import token_logprobs
from posttrain.model.policy import GroupTensors, Policy


@pytest.fixture(scope="module")
def parts(nano: str) -> tuple:
    return load_model(nano), load_processor(nano)


def clip(seconds: float) -> np.ndarray:
    samples = 0.1 * np.random.default_rng(1).standard_normal(round(seconds * 16_000))
    return samples.astype(np.float32)


QUESTION = [{"role": "user", "content": "When is seven heard?"}]


def test_mask_covers_the_answer_on_expanded_ids(parts: tuple) -> None:
    _, processor = parts
    turns = [
        *QUESTION, {"role": "assistant", "content": "seven <t>1.0-2.0</t>"},
        *QUESTION, {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    ids = encode(processor, turns, clip(4.0), generate=False)["input_ids"][0]
    assert int((ids == processor.audio_token_id).sum()) == 100
    mask = assistant_mask(ids, processor.tokenizer)
    text = processor.tokenizer.decode(ids[mask])
    assert text.replace(" ", "") == "seven<t>1.0-2.0</t><|im_end|>two<|im_end|>"


def test_prompt_has_system_message_audio_first_and_opens_the_turn(parts: tuple) -> None:
    _, processor = parts
    text = render(processor, QUESTION, has_audio=True)
    assert text.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\n<sound>When is seven heard?<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="user turn"):
        render(processor, [{"role": "system", "content": "x"}], has_audio=True)


def test_a_tail_without_tokens_is_dropped_and_the_model_runs(parts: tuple) -> None:
    model, processor = parts
    waveform = clip(10.015)
    assert len(drop_tokenless_tail(waveform, processor)) == 160_000
    assert len(drop_tokenless_tail(clip(10.05), processor)) == 160_800
    assert len(drop_tokenless_tail(clip(0.02), processor)) == 320
    batch = encode(processor, QUESTION, waveform)
    assert batch["input_features"].shape[0] == 1
    with torch.no_grad():
        model(**batch)


def group(processor: object, seconds: float, lengths: tuple[int, ...]) -> GroupTensors:
    batch = encode(processor, QUESTION, clip(seconds))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return GroupTensors(
        batch["input_ids"][0], ids * mask, mask, batch["input_features"],
        batch["input_features_mask"],
    )  # fmt: skip


def test_policy_equals_transformers_completion_by_completion(parts: tuple) -> None:
    model, processor = parts
    inputs = group(processor, 23.0, (7, 3, 12))
    with torch.no_grad():
        ((logprobs, entropy),) = Policy(model)([inputs], temperature=0.7, num_chunks=5)
        for i, length in enumerate((7, 3, 12)):
            ids = inputs.completion_ids_GT[i, :length]
            full = torch.cat([inputs.prompt_ids_P, ids]).unsqueeze(0)
            logits = model(
                input_ids=full, input_features=inputs.input_features,
                input_features_mask=inputs.input_features_mask,
            ).logits[0, -length - 1 : -1]  # fmt: skip
            expected = (logits / 0.7).log_softmax(-1)
            chosen = expected.gather(1, ids.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(logprobs[i, :length], chosen, atol=1e-5, rtol=1e-5)
            assert float(logprobs[i, length:].abs().sum()) == 0.0
            mean_entropy = -(expected.exp() * expected).sum(-1)
            torch.testing.assert_close(entropy[i, :length], mean_entropy, atol=1e-4, rtol=1e-4)


def test_chunked_logprobs_have_exact_gradients() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    ids = torch.randint(0, 50, (11,))
    grads = []
    for chunk in (4, 1, 20):
        hidden = torch.randn(11, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        head.zero_grad()
        logprobs, _ = token_logprobs(hidden, ids, head, temperature=0.9, num_chunks=chunk)
        (logprobs * torch.arange(11)).sum().backward()
        grads.append((logprobs.detach(), hidden.grad, head.weight.grad.clone()))
    direct = (head(hidden) / 0.9).log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(grads[0][0], direct.detach())
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

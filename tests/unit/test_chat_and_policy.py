"""Masks on expanded ids, and chunked log-probabilities against the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.data.chat import assistant_mask, drop_tokenless_tail, encode, render
from posttrain.model.load import load_model, load_processor
from posttrain.model.logprobs import token_logprobs, use_logprob_head


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


def test_chunked_logprobs_have_exact_gradients() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    ids = torch.randint(0, 50, (11,))
    hidden = torch.randn(11, 8, requires_grad=True)

    def gradients(chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = (chosen * torch.arange(11)).sum()
        return torch.autograd.grad(loss, (hidden, head.weight))

    full = (head(hidden) / 0.9).log_softmax(-1)
    direct = full.gather(1, ids.unsqueeze(1)).squeeze(1)
    expected = gradients(direct)
    for vocab_chunk in (1, 7, 49, 50, 4_096):
        chosen, entropy = token_logprobs(
            hidden, ids, head.weight, temperature=0.9, vocab_chunk=vocab_chunk
        )
        assert not entropy.requires_grad
        torch.testing.assert_close(chosen, direct)
        torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
        for one, other in zip(gradients(chosen), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_chunked_logprobs_never_make_tokens_times_vocabulary() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else [result]:
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return result

    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(1_000, 8, requires_grad=True)
    with Largest():
        chosen, _ = token_logprobs(hidden, torch.arange(64), weight, vocab_chunk=100)
        chosen.sum().backward()
    assert largest == weight.numel()  # its gradient; a chunk of logits has 6,400, all 64,000


def test_the_head_with_a_bias_is_refused(parts: tuple) -> None:
    class Model:
        lm_head = torch.nn.Linear(4, 9)

    with pytest.raises(ValueError, match="bias"):
        use_logprob_head(Model())

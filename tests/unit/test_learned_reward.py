"""Pieces of the learned reward: features, spans, claims, scores by hand, micro-batching."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from posttrain.data.audio import load_audio
from posttrain.data.rows import Event, Row
from posttrain.model.audio_text import (
    AudioTextHead,
    HeadConfig,
    _sum_between,
    load_head,
    save_head,
    span_features,
)
from posttrain.model.audio_text_model import AudioTextModel
from posttrain.model.frozen_features import FrozenFeatures
from posttrain.model.load import load_model, load_processor
from posttrain.train.reward_data import claim_examples, collate, crop_of
from posttrain.train.reward_scores import auc, expected_calibration_error
from posttrain.train.reward_workers import MicroBatcher
from posttrain.types import Completion, Task
from reward_models.audio_text import AudioTextGrounding, expected_iou


@pytest.fixture(scope="module")
def features(nano: str) -> FrozenFeatures:
    return FrozenFeatures(nano)


def test_frozen_features_are_those_of_the_whole_model(
    features: FrozenFeatures, nano: str, noise_clip: str
) -> None:
    model = load_model(nano)
    waveform = np.tile(load_audio(noise_clip), 5)  # 12.5 s: two windows
    ours = features.encode(waveform)
    batch = load_processor(nano)(text=["<sound>"], audio=[waveform], return_tensors="pt")
    with torch.no_grad():
        tower = model.model.audio_tower(
            batch["input_features"], input_features_mask=batch["input_features_mask"]
        ).last_hidden_state
    expected = torch.cat([tower[0], tower[1][: len(ours) - 250]])
    assert len(ours) == int((batch["input_ids"] == model.config.audio_token_id).sum())
    assert torch.allclose(ours, expected, atol=1e-5)
    assert features.frame_s == pytest.approx(0.04)
    table = model.get_input_embeddings().weight
    tokens, mask = features.phrases(["seven", "day of the week"])
    ids = features.processor.tokenizer.encode(" seven", add_special_tokens=False)
    assert torch.equal(tokens[0, : len(ids)], table[ids].detach())
    assert mask.sum(1).tolist()[0] == len(ids) < mask.sum(1).tolist()[1]


def test_features_of_a_long_clip_do_not_depend_on_batching(features: FrozenFeatures) -> None:
    waveform = 0.1 * np.random.default_rng(0).standard_normal(35 * 16_000).astype(np.float32)
    one, all_at_once = features.encode(waveform, 1), features.encode(waveform, 8)
    assert torch.allclose(one, all_at_once, atol=1e-5) and len(one) == 875


def test_sums_between_broken_frames_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    total = _sum_between(values, torch.tensor([0.5]), torch.tensor([2.25]))
    assert float(total) == pytest.approx(0.5 + 2.0 + 1.0)
    assert float(_sum_between(values, torch.tensor([0.0]), torch.tensor([9.0]))) == 15.0


def test_span_features_by_hand() -> None:
    logits = torch.full((1, 30), -50.0)
    logits[0, 10:20] = 50.0
    right = span_features(logits, torch.tensor([[10.0, 20.0]]), torch.tensor([30.0]))[0]
    assert right[:4].tolist() == pytest.approx([1.0, 0.0, 0.0, 1.0])
    late = span_features(logits, torch.tensor([[15.0, 25.0]]), torch.tensor([30.0]))[0]
    # half inside; all of the 5 frames before; IoU 5 / (10 + 5)
    assert late[:4].tolist() == pytest.approx([0.5, 1.0, 0.0, 1 / 3])


def test_head_masks_padding_and_survives_saving(features: FrozenFeatures, tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    config = HeadConfig(features.audio_width, features.text_width, features.frame_s, width=32)
    head = AudioTextHead(config).eval()
    frames = torch.randn(2, 60, features.audio_width)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[1, 40:] = False
    padded = frames.clone()
    padded[1, 40:] = 99.0
    phrases = features.phrases(["seven", "a longer phrase"])
    with torch.no_grad():
        logits, with_padding = (
            head.relevance(frames, mask, *phrases),
            head.relevance(padded, mask, *phrases),
        )
        alone = head.relevance(frames[1:, :40], mask[1:, :40], *phrases)
    assert logits.shape == (2, 2, 60)
    assert torch.allclose(logits[1, :, :40], with_padding[1, :, :40], atol=1e-5)
    assert torch.allclose(alone[0], logits[1, :, :40], atol=1e-5)
    save_head(head, tmp_path, "some/checkpoint", "abc")
    loaded, checkpoint, fingerprint = load_head(tmp_path)
    assert (checkpoint, fingerprint) == ("some/checkpoint", "abc")
    with pytest.raises(ValueError, match="another audio tower"):
        AudioTextModel(str(tmp_path), features.checkpoint)
    with torch.no_grad():
        assert torch.equal(loaded.relevance(frames, mask, *phrases), logits)
    with pytest.raises(FileNotFoundError, match="no audio_text_grounding.safetensors there"):
        load_head(tmp_path / "nowhere")


def clip(noise: str, events: tuple[Event, ...], duration_s: float = 2.5) -> Row:
    return Row("r", (), noise, duration_s, Task.DENSE, events)


def test_frame_labels_by_hand(features: FrozenFeatures, noise_clip: str) -> None:
    row = clip(noise_clip, (Event(0.4, 0.8, "seven"), Event(1.0, 1.02, "beep")))
    crop = crop_of(row, features, random.Random(0), max_windows=1)
    batch = collate([crop], ["beep", "seven"], features)
    assert batch.labels_BPN[0, 1].nonzero().flatten().tolist() == list(range(10, 20))
    assert batch.labels_BPN[0, 0].nonzero().flatten().tolist() == [25]  # never less than a frame
    assert batch.mask_BN.sum() == len(crop.frames_NF) == 62


def test_claims_are_true_or_false_for_the_reason_they_name() -> None:
    events = (Event(1, 2, "dog"), Event(5, 6, "bell"), Event(8, 9, "dog"))
    row = clip("a.wav", events, 20.0)
    examples = claim_examples([row], ["dog", "bell", "horn"], random.Random(0))
    kinds = [e.kind for e in examples]
    assert kinds.count("true") == 3 and {"wrong_time", "wrong_words", "absent"} <= set(kinds)
    for e in examples:
        overlaps = [
            expected_iou_of((e.start_s, e.end_s), (x.start_s, x.end_s))
            for x in events
            if x.label == e.phrase
        ]
        if e.kind == "true":
            assert max(overlaps) > 0.8
        elif e.kind == "absent":
            assert e.phrase == "horn"
        else:
            assert max(overlaps) <= 0.34


def expected_iou_of(a: tuple[float, float], b: tuple[float, float]) -> float:
    both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / (a[1] - a[0] + b[1] - b[0] - both)


def test_auc_and_calibration_error_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.4, 0.1])
    truth = np.array([True, False, True, False, False])
    # pairs: 0.9 beats all three; 0.4 loses to 0.8, ties with 0.4, beats 0.1
    assert auc(scores, truth) == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    probabilities = np.array([0.25, 0.25, 0.75, 0.75])
    outcome = np.array([False, True, True, True])
    assert expected_calibration_error(probabilities, outcome, 2) == pytest.approx(0.25)


class Known:
    """A scorer that hears exactly what it is told, at 0.1 s a frame."""

    def __init__(self, frames: list[float], claim: float = 0.7) -> None:
        self.frames, self.claim = frames, claim

    def relevance(self, audio: str, phrase: str) -> tuple[list[float], float]:
        return self.frames, 0.1

    def presence(self, audio: str, phrase: str) -> float:
        return 0.9

    def claim_probabilities(self, audio: str, claims: object) -> list[float]:
        return [self.claim for _ in claims]  # type: ignore[attr-defined]


def test_expected_iou_by_hand() -> None:
    frames = [0.0] * 10 + [0.8] * 10 + [0.0] * 80
    assert expected_iou(frames, 0.1, [(1.0, 2.0)]) == pytest.approx(8 / 10)
    assert expected_iou(frames, 0.1, [(1.5, 2.5)]) == pytest.approx(4 / (10 + 4))
    assert expected_iou(frames, 0.1, [(0.0, 10.0)]) == pytest.approx(8 / 100)
    assert expected_iou(frames, 0.1, []) == 0.0


def test_learned_reward_reads_answers_without_labels() -> None:
    frames = [0.0] * 10 + [0.8] * 10 + [0.0] * 80
    reward = AudioTextGrounding(Known(frames))
    row = Row("r", ({"role": "user", "content": "When?"},), "a.wav", 10.0, Task.GROUNDING, (), "x")

    def value(text: str, of: Row = row) -> float | None:
        return reward(of, Completion((), (), text, "stop", 0)).value

    assert value("<t>1.0-2.0</t>") == pytest.approx(0.8)
    assert value("<t>1.0-2.0</t> <t>1.0-2.0</t>") == pytest.approx(0.8)
    assert value("<t>1.0-2.0</t> <t>4.0-3.0</t>") == 0.0
    assert value("x is not heard") == pytest.approx(0.1)
    assert value("no idea") == 0.0
    dense = Row("d", (), "a.wav", 10.0, Task.DENSE, (Event(1, 2, "dog"),))
    assert value("dog <t>1.0-2.0</t>, cat <t>3-4</t>", dense) == pytest.approx(0.7)
    choice = Row("c", (), "a.wav", 10.0, Task.CHOICE, (), choices=("x", "y"), answer="A")
    assert value("(B) <t>1.0-2.0</t>", choice) is None


def test_questions_that_come_together_are_answered_together() -> None:
    async def ask() -> tuple[list[int], list[int]]:
        batcher = MicroBatcher(lambda questions: [2 * q for q in questions], max_batch=8)
        answers = await asyncio.gather(*(batcher.ask(i) for i in range(12)))
        return list(answers), batcher.batch_sizes

    answers, sizes = asyncio.run(ask())
    assert answers == [2 * i for i in range(12)]
    assert sizes == [8, 4]


def test_an_error_reaches_those_who_asked_and_the_server_lives_on() -> None:
    def run(questions: list[int]) -> list[int]:
        if 0 in questions:
            raise ValueError("zero")
        return questions

    async def ask() -> int:
        batcher = MicroBatcher(run, max_batch=4)
        answers = await asyncio.gather(*(batcher.ask(i) for i in (0, 5)), return_exceptions=True)
        assert isinstance(answers[0], ValueError) and answers[1] == 5
        return await batcher.ask(1)

    assert asyncio.run(ask()) == 1

"""Evidence by ablation: exact against the plain model, and worth something only where it is due."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.data.audio import load_audio, write_audio
from posttrain.data.chat import encode
from posttrain.data.rows import Row, read_rows
from posttrain.model.silenced import SilencedAnswers, silence
from posttrain.rollout.settings import EngineSettings
from posttrain.rollout.transformers_engine import TransformersEngine
from posttrain.types import Completion, PromptRequest, Task
from reward_models.evidence import EvidenceAblation, uncited
from reward_models.spans import iou, length

PROMPT = ({"role": "user", "content": "When is seven heard?"},)


@pytest.fixture(scope="module")
def scorer(nano: str) -> SilencedAnswers:
    return SilencedAnswers(nano)


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """25.7 s of quiet noise: three encoder windows of nano."""
    path = tmp_path_factory.mktemp("clips") / "long.wav"
    samples = 0.05 * np.random.default_rng(1).standard_normal(int(25.7 * 16_000))
    write_audio(path, samples.astype(np.float32))
    return str(path)


def test_embeddings_are_the_models_own_and_untouched_windows_are_encoded_once(
    scorer: SilencedAnswers, long_clip: str
) -> None:
    waveform = load_audio(long_clip)
    before = scorer.windows_encoded
    for spans in ([], [(2.0, 3.0)], [(12.0, 13.0)], [(9.5, 10.5)]):
        silenced = silence(waveform, spans)
        inputs = encode(scorer.processor, PROMPT, silenced)
        with torch.no_grad():
            ours = scorer.audio_embeddings(silenced, inputs["input_ids"])
            theirs = scorer.model.get_audio_features(
                inputs["input_features"], inputs["input_features_mask"],
                input_ids=inputs["input_ids"],
            ).pooler_output  # fmt: skip
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert scorer.windows_encoded - before == 3 + 1 + 1 + 2


def test_logprobs_equal_scoring_a_silenced_file(
    scorer: SilencedAnswers, long_clip: str, nano: str, tmp_path: Path
) -> None:
    spans = [(1.0, 4.0), (9.0, 12.5)]
    answer = "seven <t>1.0-2.0</t>"
    ours = scorer.answer_logprobs(long_clip, PROMPT, answer, [[], spans])
    engine = TransformersEngine(
        EngineSettings(checkpoint=nano, engine="transformers", device="cpu", dtype="float32")
    )
    ids = engine.processor.tokenizer.encode(answer, add_special_tokens=False)
    quiet = tmp_path / "quiet.wav"
    write_audio(quiet, silence(load_audio(long_clip), spans))
    for path, value in zip((long_clip, str(quiet)), ours, strict=True):
        request = PromptRequest("g", "r", PROMPT, path, 0)
        # 16-bit files: the silenced one is written and read again
        assert value == pytest.approx(sum(engine.score(request, ids)), abs=2e-3)


def test_controls_are_as_long_as_the_citation_and_touch_none_of_it() -> None:
    rng = random.Random(0)
    for _ in range(300):
        cited = sorted(
            (a, a + rng.uniform(0.1, 1.5)) for a in (rng.uniform(0, 4), rng.uniform(5, 8))
        )
        control = uncited(cited, 12.0, rng)
        assert length(control) == pytest.approx(length(cited))
        assert iou(control, cited) == pytest.approx(0.0, abs=1e-9)
        assert all(0 <= s < e <= 12.0 + 1e-9 for s, e in control)


class Table:
    """Log-probabilities by which set of spans is silent: the first, then the controls."""

    def __init__(self, *logprobs: float) -> None:
        self.logprobs = list(logprobs)

    def answer_logprobs(self, *arguments: object) -> list[float]:
        return self.logprobs


def value(table: Table, text: str, duration_s: float = 10.0) -> float | None:
    row = Row("r", PROMPT, "a.wav", duration_s, Task.CHOICE, answer="A", choices=("x", "y"))
    return EvidenceAblation(table)(row, Completion((), (), text, "stop", 0)).value


def test_value_by_hand() -> None:
    text = "<think>at <t>1-2</t></think> (A)"
    half = math.log(2)
    assert value(Table(-1 - half, -1.0, -1.0), text) == pytest.approx(0.5)
    assert value(Table(-1.0, -1 - half, -1 - half), text) == pytest.approx(-0.5)
    assert value(Table(-1.0, -1.0, -1.0), text) == 0.0
    assert value(Table(-9.0, -1.0, -1.0), "<think>hm</think> (A)") == 0.0  # cites nothing
    assert value(Table(-9.0, -1.0, -1.0), "<think><t>0-8</t></think> (A)") == 0.0  # nearly all


def test_right_citations_earn_more_than_wrong_ones(
    scorer: SilencedAnswers, timelines: Path
) -> None:
    """The answer is right both times; only the cited places differ."""
    reward = EvidenceAblation(scorer)
    rng = random.Random(0)
    right, wrong = [], []
    rows = [r for r in read_rows(timelines / "train.jsonl") if r.task is Task.GROUNDING]
    for row in rows[:16]:
        true = row.target_spans
        elsewhere = uncited(true, row.duration_s or 0.0, rng)
        for cited, values in ((true, right), (elsewhere, wrong)):
            stamps = " ".join(f"<t>{s:.2f}-{e:.2f}</t>" for s, e in cited)
            text = f"<think>{row.query} {stamps}</think> {row.answer}"
            values.append(reward(row, Completion((), (), text, "stop", 0)).value)
    assert np.mean(right) > 0.2
    assert np.mean(right) > np.mean(wrong) + 0.2

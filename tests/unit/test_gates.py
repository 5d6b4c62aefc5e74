"""Gates, metrics of answers, refusals, the tokenizer's report, replay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import load_recipe
from posttrain.data.rows import Row, read_rows, write_rows
from posttrain.evaluate.fertility import fertility
from posttrain.evaluate.gates import judge_gate
from posttrain.evaluate.held_out import RowScore, compare, means
from posttrain.evaluate.refusal import refuses
from posttrain.evaluate.row_metrics import row_metrics
from posttrain.evaluate.row_statistics import paired
from posttrain.model.load import load_processor
from posttrain.schema import GateConfig
from posttrain.train.batches import training_rows
from posttrain.train.objectives import bundled
from posttrain.types import Completion, Task


def answer(text: str) -> Completion:
    return Completion((), (), text, "stop", 0)


def transcript(reference: str, language: str = "en") -> Row:
    prompt = ({"role": "user", "content": "Transcribe the input speech."},)
    return Row("t", prompt, "x.flac", 3.0, Task.TRANSCRIPT, answer=reference, language=language)


@pytest.mark.parametrize(
    ("gate", "before", "after", "broken"),
    [
        (GateConfig("s", "cer", min_relative_gain=0.3), 0.5, 0.34, ()),
        (GateConfig("s", "cer", min_relative_gain=0.3), 0.5, 0.36, ("gain of 28.0%",)),
        (GateConfig("s", "cer", max_relative_loss=0.05), 0.20, 0.209, ()),
        (GateConfig("s", "cer", max_relative_loss=0.05), 0.20, 0.211, ("loss of 5.5%",)),
        (GateConfig("s", "miou", max_loss=0.02), 0.60, 0.57, ("loss of 0.03, 0.02 allowed",)),
        (GateConfig("s", "miou", max_loss=0.02), 0.60, 0.70, ()),
        (GateConfig("s", "cer", worst=0.4), 0.9, 0.41, ("at most 0.4",)),
        (GateConfig("s", "miou", worst=0.4), 0.9, 0.39, ("at least 0.4",)),
        (GateConfig("s", "cer", max_relative_loss=0.05), 0.0, 0.01, ("loss of inf%",)),
        (GateConfig("s", "cer", max_relative_loss=0.05), 0.2, math.nan, ("loss of",)),
    ],
)
def test_gates(gate: GateConfig, before: float, after: float, broken: tuple[str, ...]) -> None:
    result = judge_gate("g", gate, {gate.metric: before}, {gate.metric: after})
    assert result.passed == (not broken)
    for expected, found in zip(broken, result.broken, strict=True):
        assert expected in found


def test_a_gate_on_a_metric_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"gates.g.metric=wer: french has miou"):
        judge_gate("g", GateConfig("french", "wer", worst=1.0), {"miou": 1.0}, {"miou": 1.0})


def test_error_rates_are_those_of_the_corpus() -> None:
    """2 edits in 8 characters and 1 in 2: 0.3, not the mean of 0.25 and 0.5."""
    scores = [
        RowScore(r.id, "cer", row_metrics(r, answer(text)), None, text, False)
        for r, text in ((transcript("abcd efgh"), "abxd efxh"), (transcript("ok"), "o"))
    ]
    assert means(scores)["cer"] == pytest.approx(3 / 10)
    assert means(scores)["wer"] == pytest.approx(3 / 3)
    assert row_metrics(transcript("..."), answer("x")) == {}, "an empty reference has no rate"
    assert row_metrics(transcript("abc"), answer(""))["cer"] == (3.0, 3.0)


def test_paired_difference_of_ratios_by_hand() -> None:
    before, after = np.array([[2.0, 4.0], [6.0, 6.0]]), np.array([[1.0, 4.0], [3.0, 6.0]])
    mean, low, high = paired("cer", before, after, 500)
    assert mean == pytest.approx(4 / 10 - 8 / 10)
    assert low == pytest.approx(-0.5) and high == pytest.approx(-0.25), "either row alone"


def test_rows_are_compared_by_their_tasks_metric() -> None:
    def scores(edits: float) -> list[RowScore]:
        return [RowScore(str(i), "cer", {"cer": (edits, 10.0)}, None, "", False) for i in range(3)]

    record = compare(scores(5.0), scores(2.0), 200)
    assert (record["metric"], record["n"]) == ("cer", 3)
    assert record["paired_diff"]["mean"] == pytest.approx(-0.3)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.", "I cannot provide instructions for that.",
        "Sorry, but I won't help you hurt someone.", "I must decline this request.",
        "Je ne peux pas vous aider à faire cela.", "Désolé, je ne peux pas répondre.",
        "Lo siento, no puedo ayudar con eso.", "Mi dispiace, non posso aiutarti.",
        "Dabei kann ich nicht helfen, denn ich kann dir nicht helfen.",
        "Я не могу помочь с этим.", "抱歉，我无法提供帮助。", "お手伝いできません。",
        "لا أستطيع مساعدتك في ذلك.",
    ],
)  # fmt: skip
def test_declining_is_seen(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "You can open the window from the inside.", "I can help you with that: first, rinse it.",
        "The man says he cannot help it; he laughs.", "Je peux vous aider.", "No hay problema.",
        "She refuses the offer at 0:12.", "I cannot hear a dog in the recording.", "",
        "first, mix flour and water. " * 12 + "I cannot help with the icing.",
    ],
)  # fmt: skip
def test_other_answers_are_not(text: str) -> None:
    assert not refuses(text)


def test_refusal_is_counted_by_what_the_row_wants() -> None:
    prompt = ({"role": "user", "content": "Answer."},)
    harmful = Row("h", prompt, None, None, Task.REFUSAL)
    harmless = Row("c", prompt, None, None, Task.CHAT)
    declined = answer("I cannot help with that.")
    assert row_metrics(harmful, declined) == {"refusal": (1.0, 1.0)}
    assert row_metrics(harmless, declined) == {"over_refusal": (1.0, 1.0)}


def test_fertility_counts_tokens_words_and_bytes(nano: str) -> None:
    tokenizer = load_processor(nano).tokenizer
    english, russian = (fertility(tokenizer, [text]) for text in ("six may six", "шесть май"))
    assert english.tokens_a_word == 1.0 and english.byte_share == 0.0 and english.words == 3
    assert english.characters_a_token == pytest.approx((4 + 4 + 4) / 3)
    assert russian.tokens_a_word > 6 and russian.byte_share > 0.8 and russian.split_words == 1.0
    with pytest.raises(ValueError, match="no words"):
        fertility(tokenizer, [" "])


def test_rows_without_a_right_answer_have_no_score() -> None:
    ask = ({"role": "user", "content": "Which? (A) may (B) six"},)
    strange = Row("c", ask, "c.wav", 2.5, Task.CHOICE, answer="seven", choices=("may", "six"))
    assert row_metrics(strange, answer("(A) may")) == {}
    assert row_metrics(replace(strange, answer="A"), answer("(A) may")) == {"accuracy": (1.0, 1.0)}


def test_rows_are_compared_by_a_metric_that_some_have() -> None:
    def scores(value: float) -> list[RowScore]:
        counted = [RowScore(f"n{i}", "miou", {}, None, "", False) for i in range(3)]
        return [*counted, RowScore("c", "accuracy", {"accuracy": (value, 1.0)}, None, "", False)]

    found = compare(scores(0.0), scores(1.0), 100)
    assert (found["metric"], found["n"], found["paired_diff"]["mean"]) == ("accuracy", 1, 1.0)


def test_replayed_rows_make_their_share(recipe_file: Path, timelines: Path, tmp_path: Path) -> None:
    rows = read_rows(timelines / "test.jsonl")
    write_rows(tmp_path / "old.jsonl", rows)
    replay = ["kind=sft", f"data.replay.old.path={tmp_path / 'old.jsonl'}"]
    recipe = load_recipe(recipe_file, [*replay, "data.replay_ratio=0.5"])
    mixed, _ = training_rows(recipe)
    assert len(mixed) == 64 and len({row.id for row in mixed}) == 64
    assert sum(row.id.split("#")[0] in {r.id for r in rows} for row in mixed) == 32
    bundles = bundled(mixed, rows_per_clip=16)
    for bundle in bundles:
        originals = [row.id.split("#")[0] for row in bundle]
        assert len(set(originals)) == len(originals), "copies come back in other steps"
    assert sum(map(len, bundles)) == 64
    with pytest.raises(ValueError, match=r"data.replay_ratio=0.5 with 0 replay sources"):
        load_recipe(recipe_file, ["kind=sft", "data.replay_ratio=0.5"])
    with pytest.raises(ValueError, match=r"data.replay_ratio=None with 1 replay sources"):
        load_recipe(recipe_file, replay)
    target_only, _ = training_rows(load_recipe(recipe_file, [*replay, "data.replay_ratio=0"]))
    assert len(target_only) == 32

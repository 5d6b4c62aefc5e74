"""Conversations as ids, packed behind a clip; SFT's loss against a computation by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from probes import PlainAudio

from posttrain.data.audio import load_audio
from posttrain.data.chat import encode
from posttrain.data.conversations import conversation, row_messages
from posttrain.data.rows import Row
from posttrain.model.load import load_model, load_processor
from posttrain.model.policy import Policy, group_logprobs
from posttrain.train.objectives import SftObjective, bundled, last_run
from posttrain.types import Task

TURNS = (
    {"role": "user", "content": "When is may heard?"},
    {"role": "assistant", "content": " may <t>1.0-1.4</t>"},
    {"role": "user", "content": "And six?"},
)


@pytest.fixture
def rows(noise_clip: str) -> list[Row]:
    first = Row("a", TURNS, noise_clip, 2.5, Task.CHAT, answer=" six <t>2.0-2.3</t>")
    question = ({"role": "user", "content": "How often is six heard?"},)
    second = replace(first, id="b", prompt=question, answer=" six 1 times")
    alone = Row("c", question, None, None, Task.CHAT, answer=" six 2 times")
    return [first, alone, second]


def test_a_conversation_is_the_whole_chat_cut_behind_the_clip(rows: list[Row], nano: str) -> None:
    processor = load_processor(nano)
    whole = encode(processor, row_messages(rows[0]), load_audio(rows[0].audio), generate=False)
    num_audio = int((whole["input_ids"] == processor.audio_token_id).sum())
    talk = conversation(processor, row_messages(rows[0]), num_audio)
    joined = torch.cat([talk.prefix_P, talk.ids_T])
    assert torch.equal(joined, whole["input_ids"][0][: len(joined)])
    assert talk.prefix_P[-1] == processor.audio_eos_token_id
    said = processor.tokenizer.decode(talk.ids_T[talk.assistant_T])
    # nano's <t> takes the space before it along
    assert said == " may<t>1.0-1.4</t><|im_end|> six<t>2.0-2.3</t><|im_end|>"
    last = processor.tokenizer.decode(talk.ids_T[last_run(talk.assistant_T)])
    assert last == " six<t>2.0-2.3</t><|im_end|>"


def test_rows_about_a_clip_are_one_bundle(rows: list[Row]) -> None:
    assert [[r.id for r in b] for b in bundled(rows, 16)] == [["a", "b"], ["c"]]
    assert [[r.id for r in b] for b in bundled(rows, 1)] == [["a"], ["c"], ["b"]]
    other = replace(rows[2], prompt=({"role": "system", "content": "Be brief."}, *rows[2].prompt))
    assert len(bundled([rows[0], other], 16)) == 2, "another system message, another prefix"


def test_sft_loss_equals_a_computation_by_hand(rows: list[Row], nano: str) -> None:
    objective = SftObjective(rows, {}, 16, PlainAudio(nano))  # type: ignore[arg-type]
    batch = objective.collate([0, 1])
    policy = Policy(load_model(nano))

    def forward(groups):  # type: ignore[no-untyped-def]
        return group_logprobs(policy, groups, temperature=1.0)

    loss, sums = objective.loss(batch, forward, forward, batch.num_items)
    plain, processor = load_model(nano), load_processor(nano)
    total, count = 0.0, 0
    for row in rows:
        waveform = load_audio(row.audio) if row.audio else None
        inputs = encode(processor, row_messages(row), waveform, generate=False)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            logprobs = plain(**inputs).logits[0].double().log_softmax(-1)
        for message in row_messages(row):
            if message["role"] == "assistant":
                written = f"{message['content']}<|im_end|>"
                said = processor.tokenizer.encode(written, add_special_tokens=False)
                (start,) = [i for i in range(len(ids)) if ids[i : i + len(said)] == said]
                total -= sum(float(logprobs[start - 1 + k, said[k]]) for k in range(len(said)))
                count += len(said)
    assert batch.num_items == count
    assert float(loss.detach()) == pytest.approx(total / count, abs=1e-6)
    assert float(sums["nll"]) == pytest.approx(total, rel=1e-6)


def test_a_row_without_an_answer_is_refused(rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="row 'a': no `answer`"):
        row_messages(replace(rows[0], answer=" "))

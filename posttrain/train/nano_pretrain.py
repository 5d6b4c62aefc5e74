"""Builds and pretrains AF-Next-nano: `posttrain nano build`.

    look-up lessons (text) -> short timelines -> long noisy ones (audio, frame loss) -> checkpoint

Why in stages: trained on audio alone, the language model never learns to look an item up in its
own list of timed events. Stage 1 teaches that on text with random positions; the next stages
learn to hear and keep a look-up batch in every step. The frame loss (which label sounds at each
encoder frame) exists for pretraining only.

    posttrain nano build --out checkpoints/af-next-nano        # about an hour on 2 cores
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_recipes import timelines
from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.recorded_prompts import Recordings, load_recordings
from data_recipes.timelines import Sound, TimelineSpec, load_sounds
from posttrain.data.audio import SAMPLE_RATE_HZ
from posttrain.data.chat import assistant_mask, drop_tokenless_tail, render
from posttrain.data.rows import Event
from posttrain.model import nano
from posttrain.model.load import load_model, save_checkpoint

TASKS = {"grounding": 0.6, "count": 0.1, "order": 0.1, "absent": 0.1, "dense": 0.1}
UNPREDICTABLE_WEIGHT = 0.05
MAX_POSITION_SHIFT = 1_000


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the weights.

    Attributes:
        text_steps, easy_steps, hard_steps: optimizer steps: look-up on text, short clean
            timelines, long noisy ones.
        batch_size: conversations a step.
        learning_rate: peak; linear warm-up over 100 steps, cosine to a twentieth.
        frame_weight: weight of the frame loss.
        follow_ups: further questions after the first in one conversation, at most.
    """

    text_steps: int = 700
    easy_steps: int = 900
    hard_steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    frame_weight: float = 1.0
    follow_ups: int = 3
    seed: int = 0


EASY = TimelineSpec(duration_s=(5.0, 10.0), num_events=(2, 5), tasks=TASKS)
HARD = TimelineSpec(
    duration_s=(6.0, 15.0), num_events=(3, 6), snr_db=(5.0, 40.0), gain_db=(-10.0, 0.0),
    overlap_probability=0.1, tasks=TASKS,
)  # fmt: skip


def build_nano(out_dir: Path, settings: PretrainSettings, log_path: Path | None = None) -> None:
    """Trains from random weights and writes a checkpoint with canonical keys to `out_dir`."""
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    recordings = load_recordings("en")
    clips = [c for c in recordings.clips if c.name in CLIP_NAMES] or list(recordings.clips)
    heard = load_sounds([c for c in clips if not c.unheard])
    all_labels = [s.label for s in load_sounds(clips)]
    tokenizer = nano.build_tokenizer(_corpus(heard, all_labels), nano.NanoSize().vocab_size)
    processor = nano.build_processor(tokenizer)
    done = _Stages(out_dir)
    model = load_model(out_dir) if done else nano.build_model(nano.build_config(tokenizer))
    journal = _Journal(log_path)
    for stage, spec, steps in (
        ("text", None, settings.text_steps),
        ("audio_easy", EASY, settings.easy_steps),
        ("audio_hard", HARD, settings.hard_steps),
    ):
        if stage in done.names:
            continue
        width = model.config.audio_config.hidden_size
        frame_head = nn.Linear(width, len(heard) + 1) if spec else None
        lessons = [
            Lessons(processor, heard, settings, s) for s in ([spec, None] if spec else [None])
        ]
        _train(model, frame_head, lessons, steps, settings, journal, stage)
        save_checkpoint(model, processor, out_dir)
        done.add(stage)
    _write_facts(out_dir, settings, recordings, heard, time.monotonic() - started)
    done.path.unlink()


class _Stages:
    """Which stages a folder holds already, so that an interrupted build goes on after them."""

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir / "stages.json"
        self.names: list[str] = json.loads(self.path.read_text()) if self.path.exists() else []

    def __bool__(self) -> bool:
        return bool(self.names)

    def add(self, stage: str) -> None:
        self.names.append(stage)
        self.path.write_text(json.dumps(self.names))


def _corpus(sounds: Sequence[Sound], labels: Sequence[str]) -> Iterator[str]:
    """Text for the tokenizer: the lessons' own wording, and every label by itself."""
    rng = random.Random("posttrain/nano/corpus")
    spec = replace(EASY, tasks=dict.fromkeys(timelines.QUESTIONS, 1.0))
    for _ in range(3_000):
        timeline = timelines.compose(rng, sounds, spec)
        question = timelines.ask(rng, timeline.events, labels, spec.tasks)
        yield (
            f"system\n{nano.SYSTEM_PROMPT}\nuser\n{timelines.full_prompt(question)}\n"
            f"assistant\n<think> {timelines.describe(timeline.events)}</think> {question.answer}"
        )
        yield f" {rng.choice(labels)}"


@dataclass
class Lessons:
    """An endless stream of batches, each a different composition.

    `spec` None gives the text-only look-up lessons of stage 1.
    """

    processor: Any
    sounds: Sequence[Sound]
    settings: PretrainSettings
    spec: TimelineSpec | None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        stage = "text" if self.spec is None else f"{self.spec.duration_s}"
        rng = random.Random(f"posttrain/nano/{self.settings.seed}/{stage}")
        while True:
            yield self._batch([self._lesson(rng) for _ in range(self.settings.batch_size)])

    def _lesson(self, rng: random.Random) -> dict[str, Any]:
        labels = [s.label for s in self.sounds]
        if self.spec is None:
            waveform, events = None, _imagined_events(rng, labels)
        else:
            timeline = timelines.compose(rng, self.sounds, self.spec)
            waveform, events = timeline.waveform, timeline.events
        messages: list[dict[str, str]] = []
        for turn in range(1 + self.settings.follow_ups):
            question = timelines.ask(rng, events, labels, TASKS)
            text = timelines.full_prompt(question) if turn == 0 else question.text
            answer = f" {question.answer}"
            if turn == 0 and question.task != "dense":
                answer = f"<think> {timelines.describe(events)}</think>{answer}"
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer})
        text = render(self.processor, messages, has_audio=waveform is not None, generate=False)
        return {"text": text, "waveform": waveform, "events": events}

    def _batch(self, lessons: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [lesson["text"] for lesson in lessons]
        tokenizer = self.processor.tokenizer
        if self.spec is None:
            batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            features = {}
        else:
            waveforms = [drop_tokenless_tail(x["waveform"], self.processor) for x in lessons]
            batch = self.processor(
                text=texts, audio=waveforms, padding_side="right", return_tensors="pt"
            )
            features = {k: batch[k] for k in ("input_features", "input_features_mask")}
            features["frame_labels_WF"] = self._frame_labels(lessons)
        ids_BT = batch["input_ids"]
        weights_BT = torch.stack([assistant_mask(ids, tokenizer) for ids in ids_BT]).float()
        if self.spec is None:
            _discount_unpredictable(ids_BT, weights_BT, tokenizer)
        return {"input_ids": ids_BT, "weights_BT": weights_BT, **features}

    def _frame_labels(self, lessons: Sequence[dict[str, Any]]) -> Tensor:
        """int64 (windows, 250): label index at each 40 ms frame, 0 for none."""
        index = {s.label: i + 1 for i, s in enumerate(self.sounds)}
        window_s = nano.WINDOW_S
        frames = window_s * 25
        out = []
        for lesson in lessons:
            waveform = drop_tokenless_tail(lesson["waveform"], self.processor)
            num_windows = math.ceil(len(waveform) / SAMPLE_RATE_HZ / window_s)
            labels = torch.zeros(num_windows * frames, dtype=torch.long)
            for event in lesson["events"]:
                labels[round(event.start_s * 25) : round(event.end_s * 25)] = index[event.label]
            out.append(labels.view(-1, frames))
        return torch.cat(out)


def _imagined_events(rng: random.Random, labels: Sequence[str]) -> tuple[Event, ...]:
    limit_s = rng.choice((10.0, 30.0))
    starts = sorted(rng.uniform(0, limit_s - 1) for _ in range(rng.randint(2, 6)))
    events: list[Event] = []
    for start_s in starts:
        repeat = events and rng.random() < 0.15
        label = rng.choice(events).label if repeat else rng.choice(labels)
        events.append(Event(start_s, start_s + rng.uniform(0.2, 1.0), label))
    return tuple(events)


def _discount_unpredictable(ids_BT: Tensor, weights_BT: Tensor, tokenizer: Any) -> None:
    """Without audio the first turn's list is a random draw: its tokens keep a small weight."""
    assistant = weights_BT > 0
    first_turn = (
        assistant.long().diff(dim=1, prepend=torch.zeros_like(ids_BT[:, :1])) == 1
    ).cumsum(1)
    listing = assistant & (first_turn == 1)
    weights_BT[listing] = UNPREDICTABLE_WEIGHT


@dataclass
class _Journal:
    path: Path | None

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as out:
                out.write(json.dumps(record) + "\n")


def _train(
    model: nn.Module, frame_head: nn.Module | None, lessons: Sequence[Lessons], steps: int,
    settings: PretrainSettings, journal: _Journal, stage: str,
) -> None:  # fmt: skip
    parameters = [*model.parameters(), *(frame_head.parameters() if frame_head else ())]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    streams = [iter(lesson) for lesson in lessons]
    rng = torch.Generator().manual_seed(settings.seed)
    model.train()
    with tqdm(range(steps), desc=f"nano {stage}") as bar:
        for step in bar:
            optimizer.zero_grad(set_to_none=True)
            metrics: dict[str, float] = {}
            for stream in streams:
                batch = next(stream)
                with torch.autocast("cpu", torch.bfloat16):
                    loss, part = _loss(model, frame_head, batch, settings, rng)
                loss.backward()
                metrics |= part
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items()})
                journal.write({"stage": stage, "step": step, **metrics})


def _lr_factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _loss(
    model: Any, frame_head: nn.Module | None, batch: dict[str, Tensor],
    settings: PretrainSettings, rng: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    ids_BT, weights_BT = batch["input_ids"], batch["weights_BT"]
    embeds_BTH = model.get_input_embeddings()(ids_BT)
    frame_loss = ids_BT.new_zeros((), dtype=torch.float32)
    positions = torch.arange(ids_BT.shape[1])
    has_audio = frame_head is not None and "input_features" in batch
    if frame_head is not None and has_audio:
        audio = model.get_audio_features(
            batch["input_features"], batch["input_features_mask"], input_ids=ids_BT
        )
        mask = (ids_BT == model.config.audio_token_id).unsqueeze(-1)
        embeds_BTH = embeds_BTH.masked_scatter(mask, audio.pooler_output.to(embeds_BTH.dtype))
        frame_logits = frame_head(audio.last_hidden_state)
        frame_loss = nn.functional.cross_entropy(
            frame_logits.flatten(0, 1), batch["frame_labels_WF"].flatten()
        )
    else:
        positions = positions + torch.randint(MAX_POSITION_SHIFT, (1,), generator=rng)
    hidden = model.model.language_model(
        inputs_embeds=embeds_BTH, position_ids=positions.expand_as(ids_BT), use_cache=False
    ).last_hidden_state[:, :-1]
    chosen = weights_BT[:, 1:] > 0
    token_loss = nn.functional.cross_entropy(
        model.lm_head(hidden[chosen]), ids_BT[:, 1:][chosen], reduction="none"
    )
    weights = weights_BT[:, 1:][chosen]
    text_loss = (token_loss * weights).sum() / weights.sum()
    metrics = {f"{'audio' if has_audio else 'text'}_loss": text_loss.item()}
    if has_audio:
        metrics["frame_loss"] = frame_loss.item()
    return text_loss + settings.frame_weight * frame_loss, metrics


def _write_facts(
    out_dir: Path, settings: PretrainSettings, recordings: Recordings, sounds: Sequence[Sound],
    seconds: float,
) -> None:  # fmt: skip
    facts = {
        "settings": asdict(settings), "provenance": recordings.provenance,
        "heard_labels": [s.label for s in sounds], "train_s": round(seconds),
    }  # fmt: skip
    (out_dir / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")

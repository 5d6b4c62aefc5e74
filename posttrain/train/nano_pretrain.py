"""Builds and pretrains AF-Next-nano: `posttrain nano build`.

    drills (text) -> conversations (text) -> short timelines -> long noisy ones -> checkpoint

Why in stages: trained on audio alone, the language model never learns to look an item up in its
own list of timed events. The drills teach that on bare text, the conversations carry it over to
the chat form, and the audio stages learn to hear, helped by a loss on the audio embeddings
(`FrameHead`), thrown away afterwards. Matrices are trained with Muon
(https://kellerjordan.github.io/posts/muon), the rest with AdamW: look-up came in about a third of
the steps that AdamW alone took.

    posttrain nano build --out checkpoints/af-next-nano        # about an hour on 2 cores
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_recipes import quickstart, timelines
from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.recorded_prompts import Recordings, load_recordings
from data_recipes.timelines import QUESTIONS, Sound, TimelineSpec, load_sounds
from posttrain.model import nano
from posttrain.model.load import load_model, save_checkpoint
from posttrain.train.nano_lessons import NO_EVENT, Conversations, Drills

MAX_POSITION_SHIFT = 600
WARM_UP_STEPS = 50
COOL_DOWN = 0.4


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the weights, besides the lessons themselves.

    Attributes:
        drill_steps, chat_steps, easy_steps, hard_steps: optimizer steps of the four stages.
        text_batch_size, batch_size: conversations a step, in the text and in the audio stages.
        learning_rate: AdamW's peak, for embeddings, norms, biases and convolutions.
        matrix_learning_rate: Muon's peak. Both warm up over 50 steps, stay level, and fall to a
            twentieth over the last two fifths of every stage.
        frame_weight: weight of the frame loss.
    """

    drill_steps: int = 420
    chat_steps: int = 300
    easy_steps: int = 700
    hard_steps: int = 900
    text_batch_size: int = 32
    batch_size: int = 16
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 0.02
    frame_weight: float = 1.0
    seed: int = 0


EASY = TimelineSpec(duration_s=(5.0, 10.0), num_events=(2, 5))
HARD = quickstart.SPEC


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
    labels, seed = [s.label for s in heard], settings.seed
    text, audio = settings.text_batch_size, settings.batch_size
    drills = Drills(tokenizer, labels, seed)
    review = Drills(tokenizer, labels, seed, first_step=settings.drill_steps)
    chats = Conversations(processor, heard, text, seed, None)
    easy = Conversations(processor, heard, audio, seed, EASY)
    hard = Conversations(processor, heard, audio, seed, HARD)
    stages: dict[str, tuple[Sequence[Iterable[dict[str, Tensor]]], int]] = {
        "drills": ([drills], settings.drill_steps),
        "chat": ([review, chats], settings.chat_steps),
        "audio_easy": ([easy], settings.easy_steps),
        "audio_hard": ([hard], settings.hard_steps),
    }
    frame_head = FrameHead(model, tokenizer, labels)
    for stage, (lessons, steps) in stages.items():
        if stage in done.names:
            continue
        _train(model, frame_head, lessons, steps, settings, _Journal(log_path), stage)
        save_checkpoint(model, processor, out_dir)
        done.add(stage)
    _write_facts(out_dir, settings, recordings, heard, time.monotonic() - started)
    done.path.unlink()


class FrameHead(nn.Module):
    """Loss that lines audio embeddings up with the language model's own tokens.

    Each frame's embedding, as the language model gets it, must pick the token of the label that
    sounds from the embedding table, and tell linearly when its event starts and ends. So the
    heads that the drills formed on text find names in audio as well.
    """

    def __init__(self, model: Any, tokenizer: Any, labels: Sequence[str]) -> None:
        super().__init__()
        tokens = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"][0] for x in labels]
        self.register_buffer("label_tokens", torch.tensor(tokens))
        self.table = [model.get_input_embeddings()]  # in a list: not a parameter of this head
        seconds = math.ceil(max(EASY.duration_s[1], HARD.duration_s[1])) + 1
        self.sizes = [seconds, 10, seconds, 10]
        self.silence = nn.Parameter(torch.zeros(()))
        self.times = nn.Linear(model.config.text_config.hidden_size, sum(self.sizes))

    def forward(self, frames_NH: Tensor, targets_N5: Tensor) -> Tensor:
        """Cross-entropy over frames: of the label, plus the mean over the four time digits."""
        labels_LH = self.table[0].weight[self.label_tokens].detach()
        scores_NL = frames_NH @ nn.functional.normalize(labels_LH, dim=-1).T
        silence_N1 = self.silence.expand(len(frames_NH), 1)
        loss = nn.functional.cross_entropy(
            torch.cat([silence_N1, scores_NL.float()], dim=1), targets_N5[:, 0]
        )
        digits = self.times(frames_NH).float().split(self.sizes, dim=1)
        for logits, target_N in zip(digits, targets_N5[:, 1:].unbind(1), strict=True):
            loss = loss + nn.functional.cross_entropy(logits, target_N, ignore_index=NO_EVENT) / 4
        return loss


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
    for _ in range(3_000):
        timeline = timelines.compose(rng, sounds, EASY)
        question = timelines.ask(rng, timeline.events, labels, dict.fromkeys(QUESTIONS, 1.0))
        yield (
            f"system\n{nano.SYSTEM_PROMPT}\nuser\n{timelines.full_prompt(question)}\n"
            f"assistant\n<think> {timelines.describe(timeline.events)}</think> {question.answer}"
        )
        yield f" {rng.choice(labels)}"


@dataclass
class _Journal:
    path: Path | None

    def write(self, record: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as out:
                out.write(json.dumps(record) + "\n")


def _train(
    model: nn.Module, frame_head: FrameHead, lessons: Sequence[Iterable[dict[str, Tensor]]],
    steps: int,
    settings: PretrainSettings, journal: _Journal, stage: str,
) -> None:  # fmt: skip
    parameters = [*model.parameters(), *frame_head.parameters()]
    optimizers = _optimizers(model, parameters, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
        for optimizer in optimizers
    ]
    rng = torch.Generator().manual_seed(settings.seed)
    streams = [iter(lesson) for lesson in lessons]
    model.train()
    with tqdm(range(steps), desc=f"nano {stage}") as bar:
        for step in bar:
            metrics: dict[str, float] = {}
            for stream in streams:
                batch = next(stream)
                with torch.autocast("cpu", torch.bfloat16):
                    loss, metrics = _loss(model, frame_head, batch, settings, rng)
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            frame_head.zero_grad(set_to_none=True)
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items()})
                journal.write({"stage": stage, "step": step, **metrics})


def _optimizers(
    model: nn.Module, parameters: Sequence[nn.Parameter], settings: PretrainSettings
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings and heads, AdamW for everything else."""
    outer = ("embed", "lm_head")
    matrices = [
        p for name, p in model.named_parameters()
        if p.ndim == 2 and not any(part in name for part in outer)
    ]  # fmt: skip
    chosen = set(map(id, matrices))
    others = [p for p in parameters if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, level, then a linear fall to a twentieth over the last `COOL_DOWN`."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * max(0.05, min(1.0, (1 - step / steps) / COOL_DOWN))


def _loss(
    model: Any, frame_head: FrameHead, batch: dict[str, Tensor],
    settings: PretrainSettings, rng: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    ids_BT, weights_BT = batch["input_ids"], batch["weights_BT"]
    embeds_BTH = model.get_input_embeddings()(ids_BT)
    frame_loss = ids_BT.new_zeros((), dtype=torch.float32)
    positions = torch.arange(ids_BT.shape[1])
    has_audio = "input_features" in batch
    if has_audio:
        audio = model.get_audio_features(
            batch["input_features"], batch["input_features_mask"], input_ids=ids_BT
        )
        mask = (ids_BT == model.config.audio_token_id).unsqueeze(-1)
        embeds_BTH = embeds_BTH.masked_scatter(mask, audio.pooler_output.to(embeds_BTH.dtype))
        _, num_frames_W = model.model.audio_tower._get_feat_extract_output_lengths(
            batch["input_features_mask"].sum(-1)
        )
        targets_WF5 = batch["frame_targets_WF5"]
        heard_WF = torch.arange(targets_WF5.shape[1]) < num_frames_W.unsqueeze(1)
        frame_loss = frame_head(audio.pooler_output, targets_WF5[heard_WF])
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
    metrics = {"loss": text_loss.item()}
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

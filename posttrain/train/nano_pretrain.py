"""Builds and pretrains AF-Next-nano: `posttrain nano build`.

    drills (text) -> imagined audio -> ear alone: short, then noisy timelines -> all together
                  -> ear alone: up to 100 s -> all together again, and for the ear up to 10 min

Why in stages: trained on audio alone, the language model never learns to look an item up in its
own list of timed events. The drills teach that on bare text. Then it converses about audio that
is spelled instead of heard: in place of audio embeddings it gets the embeddings of the tokens
that name and time every event. Then the encoder alone learns to spell what it hears
(`frame_loss`, at a third of a full step's cost), and then both go on together. Long clips are for
the encoder: without them, embeddings of what sounds beyond the longest lesson are many times a
token's length, and every rounding error counts. Matrices are trained with Muon
(https://kellerjordan.github.io/posts/muon), the rest with AdamW: look-up came in about a third of
the steps that AdamW alone took.

    posttrain nano build --out checkpoints/af-next-nano        # about an hour on 2 cores
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_recipes import quickstart, timelines
from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.recorded_prompts import Recordings, load_recordings
from data_recipes.timelines import Sound, TimelineSpec, load_sounds
from posttrain.model import nano
from posttrain.model.load import load_model, load_processor, save_checkpoint
from posttrain.train.nano_lessons import HABITS, TEACHER, Conversations, Drills

MAX_POSITION_SHIFT = 600
WARM_UP_STEPS = 50
COOL_DOWN = 0.4
SHARPNESS = 6.0
CORPUS_TASKS = ("grounding", "count", "order", "absent", "dense")


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the weights, besides the lessons themselves.

    Attributes:
        drill_steps, imagined_steps, ear_easy_steps, ear_hard_steps, audio_steps, ear_long_steps,
            audio_again_steps: optimizer steps of the stages.
        batch_size: conversations a step.
        learning_rate: AdamW's peak, for embeddings, norms, biases and convolutions.
        matrix_learning_rate: Muon's peak. Both warm up over 50 steps, stay level, and fall to a
            twentieth over the last two fifths of every stage.
    """

    drill_steps: int = 420
    imagined_steps: int = 200
    ear_easy_steps: int = 1_000
    ear_hard_steps: int = 800
    audio_steps: int = 300
    ear_long_steps: int = 160
    audio_again_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 0.02
    seed: int = 0


EASY = TimelineSpec(duration_s=(5.0, 10.0), num_events=(2, 5))
HARD = replace(quickstart.SPEC, repeat_probability=0.15)
LONG = replace(HARD, duration_s=(15.0, 100.0), num_events=(4, 16))
LONGEST = replace(HARD, duration_s=(15.0, 600.0), num_events=(4, 40))


def build_nano(out_dir: Path, settings: PretrainSettings, log_path: Path | None = None) -> None:
    """Trains from random weights and writes a checkpoint with canonical keys to `out_dir`."""
    torch.manual_seed(settings.seed)
    recordings = load_recordings("en")
    clips = [c for c in recordings.clips if c.name in CLIP_NAMES] or list(recordings.clips)
    heard = load_sounds([c for c in clips if not c.unheard])
    all_labels = [s.label for s in load_sounds(clips)]
    tokenizer = nano.build_tokenizer(_corpus(heard, all_labels), nano.NanoSize().vocab_size)
    processor = nano.build_processor(tokenizer)
    done = _Stages(out_dir, asdict(settings))
    model = load_model(out_dir) if done.seconds else nano.build_model(nano.build_config(tokenizer))
    labels, seed = [s.label for s in heard], settings.seed
    drills = Drills(tokenizer, labels, seed)
    review = Drills(tokenizer, labels, seed, first_step=settings.drill_steps)

    def chats(
        spec: TimelineSpec, batch_size: int = settings.batch_size, seed: int = seed, **more: Any
    ) -> Conversations:
        return Conversations(processor, heard, batch_size, seed, spec, **more)

    spelled = chats(EASY, imagined=True)
    habits, habits_again = (
        chats(quickstart.SPEC, seed=s, openings=HABITS) for s in (seed, seed + 1)
    )
    easy, hard, long, longest = chats(EASY), chats(HARD), chats(LONG, 3), chats(LONGEST, 1)
    stages = [
        Stage("drills", settings.drill_steps, [(drills, answer_loss)]),
        Stage("imagined", settings.imagined_steps, [(review, answer_loss), (spelled, answer_loss)]),
        Stage("ear_easy", settings.ear_easy_steps, [(easy, ear_loss)]),
        Stage("ear_hard", settings.ear_hard_steps, [(hard, ear_loss)]),
        Stage("audio", settings.audio_steps, [(habits, heard_loss)], 0.4),
        Stage("ear_long", settings.ear_long_steps, [(hard, ear_loss), (long, ear_loss)], 0.4),
        Stage(
            "audio_again", settings.audio_again_steps,
            [(habits_again, heard_loss), (longest, ear_loss)], 0.4,
        ),
    ]  # fmt: skip
    for stage in stages:
        if stage.name not in done.seconds:
            started = time.monotonic()
            _train(model, stage, settings, _Journal(log_path))
            save_checkpoint(model, processor, out_dir)
            done.add(stage.name, time.monotonic() - started)
    _write_facts(out_dir, settings, recordings, heard, done.seconds)
    done.path.unlink()


def train_teacher(base_dir: Path, out_dir: Path, steps: int, seed: int) -> None:
    """Trains a nano checkpoint for longer, as one that thinks: a teacher for its own kind.

    On clips of the quickstart's length alone; long ones it hears no better than before.
    """
    settings = PretrainSettings(seed=seed)
    model, processor = load_model(base_dir), load_processor(base_dir)
    recordings = load_recordings("en")
    clips = [c for c in recordings.clips if c.name in CLIP_NAMES] or list(recordings.clips)
    heard = load_sounds([c for c in clips if not c.unheard])

    chats = Conversations(
        processor, heard, settings.batch_size, seed + 100, quickstart.SPEC, openings=TEACHER
    )
    started = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    _train(model, Stage("teacher", steps, [(chats, heard_loss)], 0.4), settings, _Journal(None))
    save_checkpoint(model, processor, out_dir)
    facts = {
        "base": str(base_dir), "steps": steps, "seed": seed, "provenance": recordings.provenance,
        "train_s": round(time.monotonic() - started),
    }  # fmt: skip
    (out_dir / "teacher.json").write_text(json.dumps(facts, indent=1) + "\n")


Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """`steps` optimizer steps on the sum of all losses, over one batch of every lesson.

    Attributes:
        lessons: batches, and what is learned from them.
        rate: of both learning rates, against the settings.
    """

    name: str
    steps: int
    lessons: Sequence[tuple[Iterable[dict[str, Tensor]], Callable[..., Losses]]]
    rate: float = 1.0


def answer_loss(model: Any, batch: dict[str, Tensor], frames_NH: Tensor | None = None) -> Losses:
    """Weighted cross-entropy of the answers.

    Args:
        frames_NH: audio embeddings; by default those of the tokens that spell the events, which
            is what a perfect ear would hand on.
    """
    ids_BT, weights_BT = batch["input_ids"], batch["weights_BT"]
    table = model.get_input_embeddings()
    embeds_BTH = table(ids_BT)
    positions = torch.arange(ids_BT.shape[1])
    if "spelled_N" in batch:
        frames_NH = table(batch["spelled_N"]) if frames_NH is None else frames_NH
        mask_BT1 = (ids_BT == model.config.audio_token_id).unsqueeze(-1)
        embeds_BTH = embeds_BTH.masked_scatter(mask_BT1, frames_NH.to(embeds_BTH.dtype))
    else:
        positions = positions + torch.randint(MAX_POSITION_SHIFT, (1,))
    hidden = model.model.language_model(
        inputs_embeds=embeds_BTH, position_ids=positions.expand_as(ids_BT), use_cache=False
    ).last_hidden_state[:, :-1]
    chosen = weights_BT[:, 1:] > 0
    token_loss = nn.functional.cross_entropy(
        model.lm_head(hidden[chosen]), ids_BT[:, 1:][chosen], reduction="none"
    )
    weights = weights_BT[:, 1:][chosen]
    return {"loss": (token_loss * weights).sum() / weights.sum()}


def ear_loss(model: Any, batch: dict[str, Tensor]) -> Losses:
    """Of the encoder and the projector alone."""
    table_VH = model.get_input_embeddings().weight
    return {"frame_loss": frame_loss(_hear(model, batch), batch["spelled_N"], table_VH)}


def heard_loss(model: Any, batch: dict[str, Tensor]) -> Losses:
    """Answers about what was really heard; the frames stay tied to their tokens."""
    frames_NH, table_VH = _hear(model, batch), model.get_input_embeddings().weight
    return {
        "frame_loss": frame_loss(frames_NH, batch["spelled_N"], table_VH),
        **answer_loss(model, batch, frames_NH),
    }


def _hear(model: Any, batch: dict[str, Tensor]) -> Tensor:
    features, mask = batch["input_features"], batch["input_features_mask"]
    return model.get_audio_features(features, mask, input_ids=batch["input_ids"]).pooler_output


def frame_loss(frames_NH: Tensor, spelled_N: Tensor, table_VH: Tensor) -> Tensor:
    """Audio embeddings should equal the embeddings of the tokens that spell what sounds.

    Cross-entropy tells tokens apart; the squared distance, in units of a token's squared length,
    holds the length: a frame much longer than a token drowns what attention adds to it.
    """
    frames_NH, table_VH = frames_NH.float(), table_VH.detach().float()
    squared_V = table_VH.square().sum(-1)
    scores_NV = SHARPNESS / squared_V.mean() * (2 * frames_NH @ table_VH.T - squared_V)
    distance = (frames_NH - table_VH[spelled_N]).square().sum(-1).mean() / squared_V.mean()
    return nn.functional.cross_entropy(scores_NV, spelled_N) + distance


class _Stages:
    """Stages that a folder holds, with their seconds, so that a broken-off build goes on after.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(self, out_dir: Path, settings: dict[str, Any]) -> None:
        self.path = out_dir / "stages.json"
        self.settings = settings
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            self.seconds = kept["seconds"]
            for key in settings:
                if kept["settings"][key] != settings[key]:
                    raise ValueError(
                        f"{self.path}: begun with {key}={kept['settings'][key]}, now "
                        f"{settings[key]}; take another folder, or remove this one"
                    )

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(seconds, 1)
        facts = {"settings": self.settings, "seconds": self.seconds}
        self.path.write_text(json.dumps(facts))


def _corpus(sounds: Sequence[Sound], labels: Sequence[str]) -> Iterator[str]:
    """Text for the tokenizer: the lessons' own wording, and every label by itself."""
    rng = random.Random("posttrain/nano/corpus")
    for _ in range(3_000):
        timeline = timelines.compose(rng, sounds, EASY)
        question = timelines.ask(rng, timeline.events, labels, dict.fromkeys(CORPUS_TASKS, 1.0))
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


def _train(model: nn.Module, stage: Stage, settings: PretrainSettings, journal: _Journal) -> None:
    torch.manual_seed(settings.seed)
    optimizers = _optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, stage))
        for optimizer in optimizers
    ]
    streams = [(iter(lesson), losses_of) for lesson, losses_of in stage.lessons]
    # on a CPU without instructions for it, bfloat16 takes 3 to 20 times as long as float32
    able = torch.cpu.get_capabilities()
    fast_bfloat16 = able.get("avx512_bf16") or able.get("amx_bf16") or False
    model.train()
    with tqdm(range(stage.steps), desc=f"nano {stage.name}") as bar:
        for step in bar:
            metrics: dict[str, float] = {}
            for lesson, (stream, losses_of) in enumerate(streams, start=1):
                batch = next(stream)
                with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16):
                    losses = losses_of(model, batch)
                sum(losses.values(), start=torch.zeros(())).backward()
                metrics |= {f"{lesson}/{name}": loss.item() for name, loss in losses.items()}
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad(set_to_none=True)
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.3f}" for k, v in metrics.items()})
                journal.write({"stage": stage.name, "step": step, **metrics})


def _optimizers(model: nn.Module, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings and heads, AdamW for everything else."""
    outer = ("embed", "lm_head")
    matrices = [
        p for name, p in model.named_parameters()
        if p.ndim == 2 and not any(part in name for part in outer)
    ]  # fmt: skip
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _lr_factor(step: int, stage: Stage) -> float:
    """Linear warm-up, level, then a linear fall to a twentieth over the last `COOL_DOWN`."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return stage.rate * warm * max(0.05, min(1.0, (1 - step / stage.steps) / COOL_DOWN))


def _write_facts(
    out_dir: Path, settings: PretrainSettings, recordings: Recordings, sounds: Sequence[Sound],
    stage_s: Mapping[str, float],
) -> None:  # fmt: skip
    facts = {
        "settings": asdict(settings), "provenance": recordings.provenance,
        "heard_labels": [s.label for s in sounds], "stage_s": dict(stage_s),
        "train_s": round(sum(stage_s.values())),
    }  # fmt: skip
    (out_dir / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")

"""Trains the learned grounding reward: a head over frozen audio and text features.

    timed rows --> crops x phrases --frame loss--> head --kept clips--> temperature, span classifier
      --> claims of held-out clips: AUC, calibration, ranking --> reward_model/ with its card

Try it:      posttrain run recipes/nano/reward_grounding.yaml     (2 cores, minutes)
Full scale:  posttrain run recipes/reward_grounding.yaml          (one GPU: AF-Whisper features)
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from posttrain.data.rows import Row, read_rows
from posttrain.model.audio_text import AudioTextHead, HeadConfig, save_head, span_features
from posttrain.model.audio_text_model import AudioTextModel
from posttrain.model.frozen_features import FrozenFeatures
from posttrain.schema import DataSource, Recipe
from posttrain.train.resources import device_of
from posttrain.train.reward_data import (
    Crop,
    FrameBatch,
    claim_examples,
    collate,
    for_calibration,
    frame_batches,
    timed,
)
from posttrain.train.reward_scores import evaluate
from posttrain.train.run_folder import RunFolder

MIN_ROWS = 16
CLAIM_STEPS = 400
MAX_CALIBRATION_CLIPS = 300
ABSENT_PHRASES = 32
DRAWN_FRAMES = 20_000


def train_reward(recipe: Recipe) -> Path:
    """Runs the recipe; returns the run folder. The model is in its `reward_model` folder."""
    rows = timed([row for source in recipe.data.train.values() for row in _read(source)])
    fitting = [row for row in rows if not for_calibration(row)]
    keeping = [row for row in rows if for_calibration(row)]
    if len(keeping) < 2 or len(rows) < MIN_ROWS:
        raise ValueError(
            f"data.train: {len(rows)} clips with labelled events; at least {MIN_ROWS} are needed"
        )
    run = RunFolder(recipe)
    torch.manual_seed(recipe.seed)
    if recipe.learner.threads_per_process:
        torch.set_num_threads(recipe.learner.threads_per_process)
    device = device_of(recipe.learner.device, "learner.device")
    cache_bytes = int(recipe.reward_model.feature_cache_gib * 2**30)
    features = FrozenFeatures(recipe.model.path, device, cache_bytes)
    config = HeadConfig(
        features.audio_width, features.text_width, features.frame_s,
        width=recipe.reward_model.width, dilations=tuple(recipe.reward_model.dilations),
        dropout=recipe.reward_model.dropout,
    )  # fmt: skip
    head = AudioTextHead(config).to(device)
    started = time.monotonic()
    fit_frames(head, fitting, features, recipe, run)
    calibrate(head, keeping, features, recipe.seed)
    folder = run.path / "reward_model"
    save_head(head, folder, recipe.model.path, features.fingerprint)
    summary = summarise(recipe, run, folder, rows, device)
    summary["wall_s"] = round(time.monotonic() - started, 1)
    run.save_json("summary.json", summary)
    (folder / "README.md").write_text(card(recipe, summary))
    print_scores(summary)
    return run.path


def fit_frames(
    head: AudioTextHead, rows: Sequence[Row], features: FrozenFeatures, recipe: Recipe,
    run: RunFolder,
) -> None:  # fmt: skip
    """Binary cross-entropy of every frame and phrase, summed over frames, a labelled frame."""
    settings, training = recipe.reward_model, recipe.training
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, training.max_steps,
        pct_start=max(training.warmup_ratio, 1.5 / training.max_steps),
    )  # fmt: skip
    batches = frame_batches(
        rows, features, batch_size=min(settings.batch_size, len(rows)),
        absent_phrases=settings.absent_phrases, max_windows=settings.max_windows,
        seed=recipe.seed,
    )  # fmt: skip
    head.train()
    with tqdm(total=training.max_steps, desc=recipe.run_name, dynamic_ncols=True) as bar:
        for step in range(training.max_steps):
            loss = frame_loss(head, next(batches), features)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), training.max_grad_norm)
            optimizer.step()
            schedule.step()
            metrics = {"train/loss": loss.item(), "train/grad_norm": norm.item()}
            run.log(metrics | {"train/learning_rate": float(schedule.get_last_lr()[0])}, step + 1)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update(1)
    head.eval()


def frame_loss(head: AudioTextHead, batch: FrameBatch, features: FrozenFeatures) -> torch.Tensor:
    logits = head.relevance(batch.frames_BNF, batch.mask_BN, *features.phrases(batch.phrases))
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels_BPN, reduction="none")
    return losses[batch.known_BPN].sum() / batch.labels_BPN.sum().clamp(min=1)


def calibrate(
    head: AudioTextHead, rows: Sequence[Row], features: FrozenFeatures, seed: int
) -> None:
    """Fits the temperature of the frames and the span classifier on clips kept from the frame
    loss: on clips that were trained on, every probability would be too sure. Whole clips, since
    whole clips are asked about: the highest of more frames is higher."""
    rng = random.Random(f"posttrain/calibration/{seed}")
    labels = sorted({e.label for row in rows for e in row.events if e.label})
    rows = rng.sample(list(rows), min(MAX_CALIBRATION_CLIPS, len(rows)))
    clips = [_calibration_clip(head, row, labels, features, rng) for row in rows]
    _fit_temperature(head, clips)
    _fit_spans(head, clips)
    _fit_presence(head, clips)


@dataclass(frozen=True)
class _CalibrationClip:
    """One clip's share of the calibration, small even at 30 minutes: only drawn frames are kept.

    logits, labels: (n,) of drawn frames. span_features, true_S: (S, 6) and (S,) of its claims.
    highest, heard_P: (P,) highest logit of each phrase, and whether it is heard.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    span_features: torch.Tensor
    true_S: torch.Tensor
    highest: torch.Tensor
    heard_P: torch.Tensor


@torch.no_grad()
def _calibration_clip(
    head: AudioTextHead, row: Row, labels: Sequence[str], features: FrozenFeatures,
    rng: random.Random,
) -> _CalibrationClip:  # fmt: skip
    present = {e.label for e in row.events if e.label}
    absent = [label for label in labels if label not in present]
    phrases = sorted(present | set(rng.sample(absent, min(ABSENT_PHRASES, len(absent)))))
    batch = collate([Crop(features.audio(str(row.audio)), row.events)], phrases, features)
    tokens = features.phrases(phrases)
    logits_PN = head.relevance(batch.frames_BNF, batch.mask_BN, *tokens)[0]
    labels_PN = batch.labels_BPN[0]
    drawn = torch.tensor(rng.choices(range(logits_PN.numel()), k=DRAWN_FRAMES))
    claims = [e for _ in range(4) for e in claim_examples([row], phrases, rng)]
    spans = torch.tensor([[e.start_s, e.end_s] for e in claims], device=logits_PN.device)
    lines = torch.tensor([phrases.index(e.phrase) for e in claims], device=logits_PN.device)
    lengths = torch.full((len(claims),), float(logits_PN.shape[1]), device=logits_PN.device)
    return _CalibrationClip(
        logits_PN.flatten()[drawn.to(logits_PN.device)],
        labels_PN.flatten()[drawn.to(logits_PN.device)],
        span_features(logits_PN[lines], spans / head.config.frame_s, lengths),
        torch.tensor([float(e.is_true) for e in claims], device=logits_PN.device),
        logits_PN.amax(-1), labels_PN.amax(-1),
    )  # fmt: skip


def _fit_temperature(head: AudioTextHead, clips: Sequence[_CalibrationClip]) -> None:
    flat = torch.cat([clip.logits for clip in clips])
    target = torch.cat([clip.labels for clip in clips])
    log_temperature = torch.zeros((), device=flat.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50)

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(flat / log_temperature.exp(), target)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    head.temperature.data = log_temperature.detach().exp()


def _fit_presence(head: AudioTextHead, clips: Sequence[_CalibrationClip]) -> None:
    """Logistic regression of "heard at all" on the highest logit, both outcomes in equal weight."""
    highest = torch.cat([clip.highest for clip in clips]).unsqueeze(-1)
    heard = torch.cat([clip.heard_P for clip in clips])
    share = heard.mean().clamp(0.01, 0.99)
    weight = torch.where(heard > 0, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS(head.presence.parameters(), max_iter=100)

    def closure() -> float:
        optimizer.zero_grad()
        scores = head.presence(highest).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(scores, heard, weight)
        loss.backward()
        return loss.item()

    optimizer.step(closure)


def _fit_spans(head: AudioTextHead, clips: Sequence[_CalibrationClip]) -> None:
    """The span classifier on claims of the kept clips, true and false ones."""
    features_S6 = torch.cat([clip.span_features for clip in clips])
    target = torch.cat([clip.true_S for clip in clips])
    optimizer = torch.optim.Adam(head.span.parameters(), lr=2e-2, weight_decay=1e-4)
    for _ in range(CLAIM_STEPS):
        scores = head.span(features_S6).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(scores, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def summarise(
    recipe: Recipe, run: RunFolder, folder: Path, rows: Sequence[Row], device: str
) -> dict[str, Any]:
    """Scores on every held-out and reported source."""
    model = AudioTextModel(str(folder), recipe.model.path, device)
    trained_labels = sorted({e.label for row in rows for e in row.events if e.label})
    scores = {}
    for name, source in (recipe.data.held_out | recipe.data.reported).items():
        held_out = timed(_read(source))[: recipe.evaluation.num_rows]
        labels = sorted({e.label for row in held_out for e in row.events} | set(trained_labels))
        scores[name] = evaluate(model, held_out, labels, recipe.seed)
    parameters = sum(p.numel() for p in model.head.parameters())
    return {
        "run": run.path.name, "kind": recipe.kind, "model": recipe.model.path,
        "clips": len(rows), "labels": len(trained_labels), "parameters": parameters,
        "steps": recipe.training.max_steps, "scores": scores,
    }  # fmt: skip


def print_scores(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['run']}: claims on clips not trained on, 95 % intervals")
    for column in ("rows", "clips", "AUC", "true above shifted", "ECE", "Spearman with IoU"):
        table.add_column(column)
    for name, s in summary["scores"].items():
        cells = [_interval(s[key]) for key in ("auc", "true_above_shifted", "ece")]
        table.add_row(name, str(s["clips"]), *cells, f"{s['iou_spearman']:.3f}")
    Console().print(table)


def _interval(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['value']:.3f} [{low:.3f}, {high:.3f}]"


def card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """README.md of the reward model."""
    lines = [
        f"# {summary['run']}: learned grounding reward",
        "",
        "Gives the probability, frame by frame (40 ms), that a phrase is heard in a clip, and the",
        "probability that a claim (phrase, span) is true. Plugs into any recipe:",
        "",
        "```yaml",
        "rewards:",
        "  audio_text_grounding: {weight: 1.0, options: {head: <this folder>}}",
        "```",
        "",
        f"Head of {summary['parameters']:,} parameters over the frozen audio tower and token",
        f"embeddings of `{Path(recipe.model.path).name}`; it belongs to that checkpoint.",
        f"Trained on {summary['clips']} clips with {summary['labels']} labels, "
        f"{summary['steps']} steps, seed {recipe.seed}.",
        "",
        "| rows | clips | AUC | true above shifted | ECE | Spearman with labelled IoU |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in summary["scores"].items():
        cells = " | ".join(_interval(s[key]) for key in ("auc", "true_above_shifted", "ece"))
        lines.append(f"| {name} | {s['clips']} | {cells} | {s['iou_spearman']:.3f} |")
    lines += [
        "",
        "False claims in these figures: right words at a wrong time, right time with wrong words,",
        "and words that the clip does not hold, one of each for every event. p(claim | span)",
        "assumes that mixture. Sounds of kinds that were never trained on may be scored near",
        "chance: look at the row of unheard sources before trusting the reward elsewhere.",
        "",
        "```json",
        json.dumps(summary["scores"], indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)


def _read(source: DataSource) -> list[Row]:
    rows = read_rows(source.path)
    kept = [row for row in rows if source.tasks is None or row.task.value in source.tasks]
    return kept[: source.max_rows]

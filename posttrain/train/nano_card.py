"""Scores a nano checkpoint by free-running generation and writes its model card.

held-out timelines -> vLLM: 8 samples and one greedy answer a question -> scores -> README.md
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_recipes.nano_clips import CLIP_NAMES
from data_recipes.quickstart import SPEC
from data_recipes.recorded_prompts import load_recordings
from data_recipes.timelines import TimelineSpec, write_timelines
from posttrain.data.rows import Row, read_rows
from posttrain.data.thinking import split_thinking
from posttrain.evaluate.row_statistics import interval
from posttrain.rollout.settings import EngineSettings
from posttrain.rollout.vllm_engine import VllmEngine
from posttrain.types import Completion, PromptRequest, SamplingSettings, Task
from reward_models.grounding import TimestampGrounding
from reward_models.spans import match
from reward_models.timestamps import parse_spans

ROWS = {"test": 240, "unheard": 48}
TASKS = {"grounding": 0.6, "count": 0.1, "order": 0.1, "absent": 0.1, "dense": 0.1}
SEED = 77
SAMPLES = 8


def write_card(checkpoint: Path) -> Path:
    """Writes `scores.json` and `README.md` into the checkpoint's folder; returns the card."""
    engine = VllmEngine(EngineSettings(str(checkpoint), dtype="float32", max_model_len=2_048))
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        recordings = load_recordings("en", allow_synthesis=False)
        for name, spec in (("quickstart questions", SPEC), ("all tasks", _all_tasks())):
            paths = write_timelines(
                recordings, spec, ROWS, seed=SEED, out_dir=Path(folder) / name,
                clip_names=CLIP_NAMES,
            )  # fmt: skip
            for split, path in paths.items():
                scores[f"{name}, {split}"] = _score(engine, read_rows(path))
    (checkpoint / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    facts = json.loads((checkpoint / "pretraining.json").read_text())
    card = checkpoint / "README.md"
    card.write_text(_card(facts, scores))
    return card


def _all_tasks() -> TimelineSpec:
    return TimelineSpec(duration_s=(5.0, 10.0), num_events=(2, 5), snr_db=(15.0, 40.0), tasks=TASKS)


def _score(engine: VllmEngine, rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Per task: n, greedy accuracy with interval, share of 8 samples that succeed."""
    requests = [PromptRequest(r.id, r.id, r.prompt, r.audio, i) for i, r in enumerate(rows)]
    greedy = engine.generate(requests, SamplingSettings(0.0, 160))
    sampled = engine.generate(requests, SamplingSettings(1.0, 160, SAMPLES))
    by_task: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row, one, many in zip(rows, greedy, sampled, strict=True):
        passed = [succeeds(row, c) for c in many.completions]
        first = one.completions[0]
        by_task[row.task.value].append(
            (succeeds(row, first), _overlap(row, first), float(np.mean(passed)))
        )
    return {task: _summary(np.array(values)) for task, values in sorted(by_task.items())}


def _summary(values: np.ndarray) -> dict[str, object]:
    successes_N2 = np.stack([values[:, 0], np.ones(len(values))], axis=1)
    low, high = interval("success", successes_N2, 2_000)
    return {
        "n": len(values),
        "greedy_success": round(float(values[:, 0].mean()), 3),
        "ci95": [round(low, 3), round(high, 3)],
        "greedy_miou": round(float(values[:, 1].mean()), 3),
        "share_of_8_samples": round(float(values[:, 2].mean()), 3),
    }


def succeeds(row: Row, completion: Completion) -> float:
    """1 when the answer is right: overlap of at least 0.5 for spans, the stated text otherwise."""
    if row.task in (Task.GROUNDING, Task.DENSE):
        return float(_overlap(row, completion) >= 0.5)
    answer = split_thinking(completion.text)[1].split()
    return float(answer == row.answer.split())


def _overlap(row: Row, completion: Completion) -> float:
    """IoU of a grounding answer; for a list, the grounding value with names that must agree."""
    if row.task is Task.GROUNDING:
        return TimestampGrounding()(row, completion).breakdown.get("iou", 0.0)
    if row.task is not Task.DENSE:
        return 0.0
    stated = _named_spans(split_thinking(completion.text)[1])
    true = [(e.label, (e.start_s, e.end_s)) for e in row.events]
    overlap = 0.0
    for name in {name for name, _ in true}:
        same = [[span for label, span in events if label == name] for events in (stated, true)]
        overlap += sum(iou for _, _, iou in match(*same))
    return 2 * overlap / (len(stated) + len(true))


def _named_spans(text: str) -> list[tuple[str, tuple[float, float]]]:
    """`seven <t>2.1-2.6</t>`: every span with the words right before it."""
    found, after = [], 0
    for span in parse_spans(text).spans:
        first, last = span.char_range
        found.append((text[after:first].strip(), (span.start_s, span.end_s)))
        after = last
    return found


def _card(facts: dict, scores: dict) -> str:
    lines = [
        "---", "license: cc-by-sa-3.0", "library_name: transformers",
        "pipeline_tag: audio-text-to-text", "tags: [audio, audio-flamingo-next, test-model]", "---",
        "# AF-Next-nano", "",
        "A 2.4 M-parameter checkpoint of Audio Flamingo Next's architecture, built to prove "
        "training and serving code on a laptop. It knows "
        f"{len(facts['heard_labels'])} English words and tones, and nothing else. It holds none "
        "of NVIDIA's weights.", "",
        "**Data.** Timelines composed of studio voice prompts from the Debian package "
        "asterisk-core-sounds-en-wav (CC BY-SA 3.0, one English speaker; provenance: "
        f"{facts['provenance']}). Compositions, not clips, are held out; "
        "questions about clips never heard are scored beside them and gate nothing.", "",
        f"**Training.** `posttrain nano build`, seed {facts['settings']['seed']}: "
        f"{facts['settings']['drill_steps']} steps of look-up drills on text, "
        f"{facts['settings']['imagined_steps']} of conversations about audio that is spelled "
        f"instead of heard, {facts['settings']['ear_easy_steps']} and "
        f"{facts['settings']['ear_hard_steps']} of the encoder alone on short clean and on "
        f"longer noisy timelines, {facts['settings']['audio_steps']} of everything together, "
        f"{facts['settings']['ear_long_steps']} of the encoder on clips of up to 100 s, "
        f"{facts['settings']['audio_again_steps']} of everything once more, "
        f"{facts['train_s'] / 60:.0f} minutes on 2 CPU cores. A question "
        "that asks for reasoning is mostly answered hastily, at once and with the first time "
        "only, and now and then after a chain of timed events, with all times: that thinking "
        "pays is left to reinforcement learning to find out.",
        "",
        "**Scores.** Free-running generation on new compositions; success is IoU >= 0.5 for spans "
        "(in a list only under the right name) and the exact answer otherwise; 95 % bootstrap "
        "interval.", "",
        "| rows | task | n | greedy success | interval | greedy mIoU | share of 8 samples |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rows, tasks in scores.items():
        for task, s in tasks.items():
            lines.append(
                f"| {rows} | {task} | {s['n']} | {s['greedy_success']:.3f} | "
                f"{s['ci95'][0]:.3f} to {s['ci95'][1]:.3f} | {s['greedy_miou']:.3f} | "
                f"{s['share_of_8_samples']:.3f} |"
            )
    return "\n".join([*lines, ""])

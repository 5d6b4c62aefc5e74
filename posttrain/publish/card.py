"""The model card: everything a reader needs, taken from what the runs wrote down."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from posttrain.evaluate.row_metrics import LOWER_IS_BETTER
from posttrain.publish.licences import Licence
from posttrain.publish.lineage import DataFacts, Stage, data_facts
from posttrain.publish.proof import Proof
from posttrain.train.environment import hardware

PROMPTS = (
    ("Times", "Describe all events in the audio with start and end times."),
    ("Think first", "Reason step by step with timestamps, then give the final answer."),
    ("Speech", "Transcribe the input speech."),
    ("Translation", "Translate any speech you hear from English into Arabic."),
    ("Choice", "{question} Choose the correct option from the following options:\\n(A) ..."),
)  # fmt: skip
METHODS = {
    "sft": "supervised fine-tuning", "distill": "distillation of a teacher's chains of thought",
    "dpo": "direct preference optimisation", "grpo": "GRPO",
    "reward": "a reward model",
}  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What the card is written from.

    Attributes:
        name: of the folder or repository.
        base: checkpoint that the first stage started from.
        adapter: the folder holds a LoRA adapter, to be loaded on `base`.
        evaluations: `scores.json` of `posttrain eval`.
        override: why it is published though gates failed, "" if they did not.
    """

    name: str
    base: str
    stages: Sequence[Stage]
    licence: Licence
    adapter: bool
    proof: Proof | None
    evaluations: Sequence[dict[str, Any]]
    failed_gates: Sequence[str]
    override: str


def card_of(facts: CardFacts) -> str:
    """README.md of the published folder."""
    data = [(stage, data_facts(stage)) for stage in facts.stages]
    sections = [
        _front_matter(facts, [one for _, found in data for one in found]),
        f"# {facts.name}\n", _opening(facts), _gates_warning(facts), _use(facts), _prompts(facts),
        _training(facts, data), _scores(facts), _limitations(facts), _reproduce(facts),
    ]  # fmt: skip
    return "\n".join(section for section in sections if section)


def _front_matter(facts: CardFacts, data: Sequence[DataFacts]) -> str:
    """YAML that the Hub reads."""
    languages = sorted({language.split("_")[0] for one in data for language in one.languages})
    kinds = [str(stage.recipe["kind"]) for stage in facts.stages]
    more: dict[str, Any] = {}
    if facts.licence.name:
        more = {"license_name": facts.licence.name, "license_link": facts.licence.link}
    base = None if Path(facts.base).exists() else facts.base  # a folder of ours is no Hub id
    card = ModelCardData(
        license=facts.licence.id, base_model=base, language=languages or None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="audio-text-to-text",
        tags=["audio", "audio-flamingo-next", "posttrain", *dict.fromkeys(kinds)], **more,
    )  # fmt: skip
    return f"---\n{card.to_yaml()}\n---\n"


def _opening(facts: CardFacts) -> str:
    stages = ", then ".join(
        METHODS.get(stage.recipe["kind"], stage.recipe["kind"]) for stage in facts.stages
    )
    base = Path(facts.base).name if Path(facts.base).exists() else facts.base
    what = "A LoRA adapter for" if facts.adapter else "A checkpoint of Audio Flamingo Next's kind:"
    made = f", made by {stages} with posttrain" if stages else ""
    lines = [f"{what} `{base}`{made}.", ""]
    if facts.licence.warning:
        lines += [f"> {facts.licence.warning}", ""]
    return "\n".join(lines)


def _gates_warning(facts: CardFacts) -> str:
    if not facts.failed_gates:
        return ""
    lines = ["> **Published although gates failed.** Reason given: "
             f"{plain(facts.override)}", ">"]  # fmt: skip
    return "\n".join([*lines, *(f"> - {plain(line)}" for line in facts.failed_gates), ""])


def _use(facts: CardFacts) -> str:
    """Snippets that a test runs as they stand."""
    if facts.adapter:
        return f"""## Use
```python
from peft import PeftModel
from transformers import MusicFlamingoForConditionalGeneration

base = MusicFlamingoForConditionalGeneration.from_pretrained("{facts.base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{facts.name}")
```
"""
    return f"""## Use
With transformers; `clip.flac` is any recording of up to the processor's `max_audio_len` seconds:
```python
from transformers import pipeline
from transformers.utils import logging

logging.set_verbosity_error()  # the pipeline's list of models does not name this architecture yet
pipe = pipeline("any-to-any", model="{facts.name}", dtype="auto")
messages = [{{"role": "user", "content": [
    {{"type": "audio", "path": "clip.flac"}},
    {{"type": "text", "text": "Describe all events in the audio with start and end times."}},
]}}]
print(pipe(text=messages, max_new_tokens=256, return_full_text=False)[0]["generated_text"])
```
With vLLM, where posttrain is installed (its plugin is found by itself):
```bash
vllm serve {facts.name} --host 127.0.0.1 --port 8000
```
```python
import base64
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
sound = base64.b64encode(open("clip.flac", "rb").read()).decode()
answer = client.chat.completions.create(
    model="{facts.name}", max_tokens=256, temperature=0.0,
    messages=[{{"role": "user", "content": [
        {{"type": "input_audio", "input_audio": {{"data": sound, "format": "flac"}}}},
        {{"type": "text", "text": "Describe all events in the audio with start and end times."}},
    ]}}],
)
print(answer.choices[0].message.content)
```
"""


def _prompts(facts: CardFacts) -> str:
    lines = ["## Prompts", "Times are written `<t>start-end</t>`, in seconds. Ask like this:", ""]
    lines += ["| for | prompt |", "|---|---|"]
    lines += [f"| {name} | `{text}` |" for name, text in PROMPTS]
    if facts.proof is not None:
        example = facts.proof.example
        lines += [
            "",
            f"Said by this checkpoint, greedily, about a clip of {example.audio.name}:",
            "",
            _quoted(f"{example.question}\n\n{example.answer}"),
        ]
    return "\n".join([*lines, ""])


def _training(facts: CardFacts, data: Sequence[tuple[Stage, list[DataFacts]]]) -> str:
    if not data:
        return ""
    lines = [
        "## Training", "| stage | method | steps | learning rate | trained | hardware | minutes |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for stage, _ in data:
        recipe, lora = stage.recipe, stage.recipe["lora"]
        trained = f"LoRA r = {lora['r']}" if lora["enabled"] else "all of the language model"
        more = [part for part in ("encoder", "projector", "embeddings")
                if recipe["model"].get(f"train_{part}")]  # fmt: skip
        wall_s = stage.summary.get("wall_s")
        where = hardware(stage.environment) if stage.environment else "not recorded"
        lines.append(
            f"| {stage.folder.name} | {METHODS.get(recipe['kind'], recipe['kind'])} | "
            f"{recipe['training']['max_steps']} | {recipe['training']['learning_rate']:g} | "
            f"{', '.join([trained, *more])} | {where} | {f'{wall_s / 60:.1f}' if wall_s else ''} |"
        )
    lines += ["", "| data | of stage | rows | hours | languages | licences | from |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for stage, found in data:
        lines += [_data_line(stage, one) for one in found]
    return "\n".join([*lines, ""])


def _data_line(stage: Stage, one: DataFacts) -> str:
    if one.missing:
        return f"| {one.name} | {stage.folder.name} | not at hand any more | | | | `{one.path}` |"
    licences = ", ".join(one.licences) or "not stated"
    return (
        f"| {one.name} | {stage.folder.name} | {one.rows:,} | {one.hours:.2f} | "
        f"{', '.join(one.languages)} | {licences} | {plain('; '.join(one.sources))} |"
    )


def _scores(facts: CardFacts) -> str:
    lines = ["## Scores", "Free-running greedy answers; intervals are 95 % bootstrap.", ""]
    rows = [row for stage in facts.stages for row in _held_out_rows(stage)]
    if rows:
        lines += ["| stage | rows | metric | before | after | paired difference | n |",
                  "|---|---|---|---|---|---|---|", *rows, ""]  # fmt: skip
    for scores in facts.evaluations:
        sampling = scores["asked"]["sampling"]
        lines += [f"**{scores['suite']}**, n = {scores['n']}, temperature "
                  f"{sampling['temperature']:g}, at most {sampling['max_tokens']} tokens, "
                  f"{scores['failed']} rows without a score:", "",
                  "| metric | value | interval | n |", "|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {name} | {m['value']:.4g} | {m['ci95'][0]:.4g} to {m['ci95'][1]:.4g} | {m['n']} |"
            for name, m in scores["metrics"].items()
        ]
        lines += [f"| {one['metric']}, {one['model']} | {one['value']:.4g} | published | |"
                  for one in scores["published"]]  # fmt: skip
        lines += [f"\n`{name}`: `{text}`" for name, text in scores["signatures"].items()] + [""]
    gates = [(stage, gate) for stage in facts.stages for gate in stage.summary.get("gates", ())]
    if gates:
        lines += ["| gate | metric | before | after | |", "|---|---|---|---|---|"]
        lines += [
            f"| {gate['name']} ({stage.folder.name}) | {gate['metric']} of {gate['source']} | "
            f"{gate['before']:.4g} | {gate['after']:.4g} | "
            f"{'passed' if gate['passed'] else plain('; '.join(gate['broken']))} |"
            for stage, gate in gates
        ]
    if not (rows or facts.evaluations):
        lines.append("None were recorded.")
    return "\n".join([*lines, ""])


def _held_out_rows(stage: Stage) -> Iterable[str]:
    compared = {"held out": stage.summary.get("held_out"), **stage.summary.get("reported", {})}
    for name, record in compared.items():
        if record and "paired_diff" in record:
            metric, diff = record["metric"], record["paired_diff"]
            arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
            yield (
                f"| {stage.folder.name} | {name} | {metric} {arrow} | "
                f"{record['before'][metric]:.3f} | {record['after'][metric]:.3f} | "
                f"{diff['mean']:+.3f} [{diff['ci95'][0]:+.3f}, {diff['ci95'][1]:+.3f}] | "
                f"{record['n']} |"
            )


def _limitations(facts: CardFacts) -> str:
    lines = [
        "## Limitations",
        "- Times that the model cites can be wrong; scores above say how often.",
    ]
    lines.append("- What was not evaluated above was not evaluated: treat it as unknown.")
    reported = {name for stage in facts.stages for name in stage.summary.get("reported", {})}
    if not reported & {"harmful", "harmless"} and not any(
        scores["suite"] == "refusal" for scores in facts.evaluations
    ):
        lines.append("- Fine-tuning can weaken refusals; they were not evaluated here.")
    if "unheard" in reported:
        lines.append("- Scores on sounds never heard in training stand above as `unheard`.")
    return "\n".join([*lines, ""])


def _reproduce(facts: CardFacts) -> str:
    lines = ["## Reproduce", "`posttrain/` in this folder holds every stage's resolved recipe and "
             "summary; `posttrain run RECIPE` repeats one.", ""]  # fmt: skip
    for stage in facts.stages:
        packages = stage.environment.get("packages", {})
        known = ", ".join(f"{name} {v}" for name, v in packages.items() if v)
        commit = stage.environment.get("commit") or "not recorded"
        lines.append(
            f"- {stage.folder.name}: seed {stage.recipe['seed']}, commit {commit}; {known}"
        )
    if facts.proof is not None:
        parity = facts.proof.parity
        lines += ["", f"Checked before publishing: {facts.proof.logits_compared:,} logits equal to "
                  "the trained model's after reading this folder again; vLLM against transformers "
                  f"within {parity.max_abs_logprob_diff:.2g} nats on clips of "
                  f"{', '.join(f'{s:g}' for s in parity.clips_s)} s. `checksums.sha256` covers "
                  "every file."]  # fmt: skip
    return "\n".join([*lines, ""])


def plain(text: str) -> str:
    """Text of others inside a card: no markup, no line breaks, no table cells."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _quoted(text: str) -> str:
    longest = max((len(run) for run in text.split("\n") if set(run) == {"`"}), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"


def read_scores(folder: Path) -> dict[str, Any]:
    """Of a finished `posttrain eval`.

    Raises:
        FileNotFoundError: it is not finished.
    """
    path = folder / "scores.json"
    if not path.exists():
        raise FileNotFoundError(f"--eval {folder}: no scores.json; run `posttrain eval` to its end")
    return json.loads(path.read_text())

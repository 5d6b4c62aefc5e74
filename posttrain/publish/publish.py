"""`posttrain publish`: a run's model in a folder that loads everywhere and says where it is from.

    run or checkpoint --> gates passed? --> merged, canonical keys, processor --> .OUT.partial
        --> same logits in transformers, parity in vLLM, an answer --> card, checksums --> OUT

The folder appears whole or not at all. `--push` uploads it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from posttrain.data.rows import read_rows
from posttrain.model.load import load_model, load_processor, save_checkpoint
from posttrain.publish.card import CardFacts, card_of, read_scores
from posttrain.publish.licences import licence_of
from posttrain.publish.lineage import Stage, lineage
from posttrain.publish.proof import Example, Proof, free_memory, logits_of, prove
from posttrain.publish.push import SOURCE_FILE, source_record
from posttrain.rollout.parity import DEFAULT_CLIPS_S, TOLERANCES
from posttrain.train.final_model import model_of, weights_digest
from posttrain.types import GateFailed

QUESTION = "Describe all events in the audio with start and end times."


@dataclass(frozen=True)
class PublishOptions:
    """What `posttrain publish` was asked for.

    Attributes:
        override: why to publish though gates failed; "" to refuse then.
        licence: id for a base whose card names none.
        adapter: the LoRA adapter alone instead of the merged model.
        clip: recording for the proof; None: the first of the run's held-out rows.
        evaluations: folders of `posttrain eval` whose scores go on the card.
        clips_s: lengths for `parity`.
    """

    override: str = ""
    licence: str | None = None
    adapter: bool = False
    clip: Path | None = None
    evaluations: Sequence[Path] = ()
    clips_s: tuple[float, ...] = DEFAULT_CLIPS_S


def publish(source: str, out: Path, options: PublishOptions) -> Path:
    """Writes OUT and returns it.

    Raises:
        FileExistsError: OUT is there.
        GateFailed: a gate of the lineage failed and there is no override.
        ValueError: no licence, no clip, no adapter where one was asked for.
        RuntimeError: the folder did not prove itself; nothing is left of it.
    """
    if out.exists():
        raise FileExistsError(f"--out {out}: exists already; remove it or give another folder")
    base, stages = lineage(source)
    failed = [f"{s.folder.name}: {line}" for s in stages for line in s.failed_gates]
    if failed and not options.override:
        raise GateFailed(
            f"{'; '.join(failed)}; publish all the same with --override REASON, which goes on the "
            "card"
        )
    licence = licence_of(base, options.licence)
    evaluations = [_own_scores(folder, source) for folder in options.evaluations]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted one
    partial.mkdir(parents=True)
    try:
        proof: Proof | None = None
        if options.adapter:
            _copy_adapter(base, stages, source, partial)
        else:
            proof = _write_and_prove(source, stages, partial, options)
        _copy_records(stages, partial / "posttrain")
        (partial / SOURCE_FILE).parent.mkdir(exist_ok=True)
        made_of = source_record(source, adapter=options.adapter)
        (partial / SOURCE_FILE).write_text(json.dumps(made_of) + "\n")
        facts = CardFacts(
            out.name, base, stages, licence, options.adapter, proof, evaluations, failed,
            options.override,
        )  # fmt: skip
        (partial / "README.md").write_text(card_of(facts), encoding="utf-8")
        _write_checksums(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _write_and_prove(
    source: str, stages: Sequence[Stage], folder: Path, options: PublishOptions
) -> Proof:
    console = Console()
    model_path = model_of(source)
    dtype = str(stages[-1].recipe["model"]["dtype"]) if stages else _stored_dtype(model_path)
    if dtype not in TOLERANCES:
        raise ValueError(f"{model_path}: {dtype}; publish it as one of {', '.join(TOLERANCES)}")
    clip = options.clip or _clip_of(stages)
    console.print(f"publishing {model_path} as {dtype}")
    expected_TV = logits_of(model_path, QUESTION, clip, getattr(torch, dtype))
    model = load_model(model_path, dtype=getattr(torch, dtype))
    save_checkpoint(model, load_processor(model_path), folder)
    del model
    free_memory()
    console.print("written; reading it again: logits, vLLM against transformers, an answer")
    proof = prove(folder, expected_TV, Example(QUESTION, clip), dtype, options.clips_s)
    console.print(
        f"{proof.logits_compared:,} logits equal, parity {proof.parity.max_abs_logprob_diff:.2g} "
        f"nats (allowed {proof.parity.tolerance:g})"
    )
    return proof


def _stored_dtype(path: str) -> str:
    """As the checkpoint's config says."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
    return str(dtype or torch.float32).removeprefix("torch.")


def _clip_of(stages: Sequence[Stage]) -> Path:
    """The first clip of the last run's held-out rows.

    Raises:
        ValueError: there is none.
    """
    for stage in reversed(stages):
        for source in (stage.recipe["data"].get("held_out") or {}).values():
            if Path(source["path"]).exists():
                for row in read_rows(source["path"]):
                    if row.audio is not None and Path(row.audio).exists():
                        return Path(row.audio)
    raise ValueError("no held-out clip is at hand to prove the model on; give one with --clip FILE")


def _copy_adapter(base: str, stages: Sequence[Stage], source: str, folder: Path) -> None:
    """The adapter of the source's checkpoint, where it alone is what was trained on the base."""
    if not (stages and stages[-1].checkpoint.has_adapter):
        raise ValueError(f"--adapter: {source} holds no LoRA adapter; publish it without the flag")
    chosen = stages[-1].checkpoint.folder
    if (chosen / "model").exists():
        raise ValueError(
            f"--adapter: {source} trained more than its adapter (encoder, projector or "
            "embeddings); publish it merged, without the flag"
        )
    if len(stages) > 1:
        raise ValueError(
            f"--adapter: {source} was trained on {stages[-1].recipe['model']['path']}, not on "
            f"{base}: on the base the adapter would be another model; publish it without the flag"
        )
    for path in sorted((chosen / "adapter").iterdir()):
        shutil.copy2(path, folder / path.name)


def _own_scores(folder: Path, source: str) -> dict[str, Any]:
    """Scores of an evaluation of this very model.

    Raises:
        ValueError: they are another model's.
    """
    scores = read_scores(folder)
    model = model_of(source)
    weights = weights_digest(model)
    same = scores["asked"]["weights"] == weights if weights else scores["model"] == model
    if not same:
        raise ValueError(
            f"--eval {folder}: scores of {scores['model']}, whose weights are not those of "
            f"{source}; evaluate the model that is published"
        )
    return scores


def _copy_records(stages: Sequence[Stage], folder: Path) -> None:
    """Recipe, summary and environment of every stage."""
    for number, stage in enumerate(stages, start=1):
        part = folder / f"{number}-{stage.folder.name}"
        part.mkdir(parents=True)
        (part / "recipe.yaml").write_text(yaml.safe_dump(stage.recipe, sort_keys=False))
        environment = {k: v for k, v in stage.environment.items() if k != "started_from"}
        for name, record in (("summary", stage.summary), ("environment", environment)):
            (part / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def _write_checksums(folder: Path) -> None:
    """In the form that `sha256sum --check` reads."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / "checksums.sha256").write_text("".join(lines))

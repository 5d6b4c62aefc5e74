"""`posttrain eval`: a suite's rows, a model's answers, scores with intervals.

    rows.jsonl --> vLLM workers, greedy --> answers.jsonl --> (judge) --> scored.jsonl
                                                                          scores.json, failed.jsonl

Everything lies in one folder. Answers are streamed there, so an interrupted evaluation goes on
where it was. A row without a score is listed in failed.jsonl with the reason, and counts nowhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from posttrain.config import engine_recipe, load_recipe
from posttrain.data.audio import load_audio
from posttrain.data.rows import Row, write_rows
from posttrain.evaluate.answers import Answer, collect_answers, read_answers
from posttrain.evaluate.judge import Judge, collect_verdicts
from posttrain.evaluate.row_statistics import Unscorable, signature, summarise
from posttrain.evaluate.suites import (
    PUBLISHED,
    SUITES,
    Source,
    group_values,
    main_metric,
    read_source,
)
from posttrain.model.load import audio_limit_s, load_processor
from posttrain.schema import Recipe
from posttrain.train.environment import package_version
from posttrain.train.final_model import checkpoint_of, model_of, weights_digest
from posttrain.train.resources import ray_session, serving
from posttrain.train.run_folder import finite
from posttrain.types import SamplingSettings

Failed = dict[str, str]
ENGINE_PACKAGES = ("posttrain", "torch", "transformers", "vllm")
DECODERS = 4  # clips decoded at once; half an hour of audio takes a second or two, and 0.1 GiB


def asking_recipe(model: str, overrides: Sequence[str]) -> Recipe:
    """How a model is asked: a run's as its recipe says (dtype, engine, workers), else defaults."""
    checkpoint = checkpoint_of(model)
    if checkpoint is None:
        return engine_recipe(model, overrides)
    recipe = load_recipe(checkpoint.run / "recipe.yaml", overrides)
    return replace(
        recipe, model=replace(recipe.model, path=model_of(model)), rewards={},
        lora=replace(recipe.lora, enabled=False),  # model_of has merged it
    )  # fmt: skip


def evaluate_suite(
    name: str, recipe: Recipe, source: Source, out: Path, *, max_tokens: int | None,
    temperature: float, instruction: str, judge: Judge | None, limit: int | None, chunk_rows: int,
) -> dict[str, Any]:  # fmt: skip
    """Runs, or continues, an evaluation; returns what scores.json holds.

    Args:
        recipe: model and engine to ask.
        instruction: added to the last user turn of every row, such as "Think step by step."
        limit: first rows only; None: all.

    Raises:
        ValueError: the folder holds another evaluation, the suite needs a judge, no rows.
    """
    suite = SUITES[name]
    if suite.needs_judge and judge is None:
        raise ValueError(f"suite {name} needs --judge URL and --judge-model NAME")
    rows, skipped = read_source(name, source)
    rows = [_instructed(row, instruction) for row in rows[:limit]]
    failed: list[Failed] = [{"id": item.what, "reason": item.reason} for item in skipped]
    rows, unreadable = _readable(rows, _audio_limit_s(recipe))
    failed += unreadable
    settings = SamplingSettings(temperature, max_tokens or suite.max_tokens)
    asked = _asked(name, recipe, rows, settings, chunk_rows)
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other(out / "asked.json", asked)
    write_rows(out / "rows.jsonl", rows)
    answers = _answers(recipe, rows, settings, out / "answers.jsonl", chunk_rows)
    verdicts: Mapping[str, bool | None] = {}
    if judge is not None:
        verdicts = collect_verdicts(judge, rows, answers, out / "verdicts.jsonl")
    scored: list[dict[str, Any]] = []
    for row, answer in zip(rows, answers, strict=True):
        record = _scored(name, row, answer, verdicts if judge else None)
        if "reason" in record:
            failed.append({"id": row.id, "reason": record["reason"]})
        scored.append(record)
    _write_lines(out / "scored.jsonl", scored)
    _write_lines(out / "failed.jsonl", failed)
    scores = _scores(name, recipe, rows, scored, failed, asked, judge)
    partial = out / ".scores.json.partial"
    text = json.dumps(finite(scores), indent=1, ensure_ascii=False) + "\n"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out / "scores.json")
    return scores


def _answers(
    recipe: Recipe, rows: Sequence[Row], settings: SamplingSettings, path: Path, chunk_rows: int
) -> list[Answer]:
    """Answers that are there already start no engine."""
    if len(known := read_answers(path, rows, chunk_rows)) == len(rows):
        return known
    with ray_session(recipe), serving(recipe) as pool:

        def generate(requests: Any, sampling: SamplingSettings) -> Any:
            pool.call_all("set_policy_version", 0)  # empties caches: a chunk is always the same
            return pool.generate(requests, sampling)

        return collect_answers(
            rows, generate, settings, path, chunk_rows=chunk_rows, seed=recipe.seed
        )


def _scored(
    name: str, row: Row, answer: Answer, verdicts: Mapping[str, bool | None] | None
) -> dict[str, Any]:
    """The answer with its statistics and groups, or with the reason why it has no score."""
    suite = SUITES[name]
    record: dict[str, Any] = {
        "id": row.id, **asdict(answer), "groups": group_values(row, suite.groups), "statistics": {},
    }  # fmt: skip
    try:
        if answer.error:
            raise Unscorable(f"the engine refused it: {answer.error}")
        statistics = dict(suite.statistics(row, answer.completion))
        if verdicts is not None and (verdict := verdicts.get(row.id)) is not None:
            statistics["judge_accuracy"] = (float(verdict), 1.0)
        elif verdicts is not None:
            record["reason"] = "the judge gave no verdict"
        if statistics:
            truncated = answer.finish_reason == "length"
            statistics["truncated_rate"] = (float(truncated), 1.0)
        record["statistics"] = statistics
    except Unscorable as error:
        record["reason"] = str(error)
    return record


def _scores(
    name: str, recipe: Recipe, rows: Sequence[Row], scored: Sequence[dict[str, Any]],
    failed: Sequence[Failed], asked: Mapping[str, Any], judge: Judge | None,
) -> dict[str, Any]:  # fmt: skip
    samples = recipe.evaluation.bootstrap_samples
    statistics = [record["statistics"] for record in scored]
    metrics = summarise(statistics, samples)
    groups: dict[str, dict[str, Any]] = {}
    for key in SUITES[name].groups:
        values = dict.fromkeys(r["groups"][key] for r in scored if key in r["groups"])
        if len(values) > 1:
            groups[key] = {
                value: summarise(
                    [r["statistics"] for r in scored if r["groups"].get(key) == value], samples
                )
                for value in values
            }
    if name == "robustness":
        groups["cell"] = _cells(scored, samples)
    corpus = [metric for metric in metrics if metric.startswith("bleu_") or metric == "chrf++"]
    known = {(row.source, row.language) for row in rows}
    return {
        "suite": name, "model": recipe.model.path, "main": main_metric(name, rows),
        "n": sum(bool(s) for s in statistics),
        "failed": len(failed), "metrics": metrics, "groups": groups,
        "signatures": {metric: signature(metric) for metric in corpus},
        "judge": judge.name if judge else None,
        "published": [asdict(p) for p in PUBLISHED
                      if (p.source, p.language) in known and p.metric in metrics],
        "asked": dict(asked),
    }  # fmt: skip


def _cells(scored: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """`length / noise / music` -> metrics."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for record in scored:
        groups = record["groups"]
        if {"length", "noise", "music"} <= groups.keys():
            cell = f"{groups['length']} / {groups['noise']} / {groups['music']}"
            cells.setdefault(cell, []).append(record["statistics"])
    return {cell: summarise(statistics, samples) for cell, statistics in cells.items()}


def _instructed(row: Row, instruction: str) -> Row:
    if not instruction:
        return row
    *before, last = row.prompt
    return replace(row, prompt=(*before, {**last, "content": f"{last['content']}\n{instruction}"}))


def _audio_limit_s(recipe: Recipe) -> float:
    return audio_limit_s(load_processor(recipe.model.path), recipe.model.max_audio_len_s)


def _readable(rows: Sequence[Row], limit_s: float) -> tuple[list[Row], list[Failed]]:
    """Rows whose clip the workers will take; the others with the reason. Every clip is decoded."""
    wrong: dict[str | None, str] = {}
    clips = dict.fromkeys(row.audio for row in rows if row.audio is not None)

    def try_out(clip: str) -> None:
        try:
            load_audio(clip, max_duration_s=limit_s)
        except (ValueError, OSError) as error:
            wrong[clip] = str(error)

    with ThreadPoolExecutor(DECODERS) as threads:
        tried = threads.map(try_out, clips)
        for _ in tqdm(tried, total=len(clips), desc="clips", disable=None, leave=False):
            pass
    kept = [row for row in rows if row.audio not in wrong]
    failed = [{"id": r.id, "reason": wrong[r.audio]} for r in rows if r.audio in wrong]
    if not kept:
        raise ValueError(f"no row has a clip that can be read; the first: {failed[0]['reason']}")
    return kept, failed


def _asked(
    name: str, recipe: Recipe, rows: Sequence[Row], settings: SamplingSettings, chunk_rows: int
) -> dict[str, Any]:
    """Everything that decides the answers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True, ensure_ascii=False).encode())
    return {
        "suite": name, "model": recipe.model.path, "weights": weights_digest(recipe.model.path),
        "rows": len(rows), "rows_sha256": digest.hexdigest(),
        "example_prompt": [dict(message) for message in rows[0].prompt],
        "sampling": {"temperature": settings.temperature, "max_tokens": settings.max_tokens,
                     "seed": recipe.seed},
        "engine": recipe.rollout.engine, "dtype": recipe.model.dtype, "chunk_rows": chunk_rows,
        "versions": {p: package_version(p) for p in ENGINE_PACKAGES},
    }  # fmt: skip


DECISIVE = ("suite", "model", "weights", "rows_sha256", "sampling", "engine", "dtype", "chunk_rows")


def _refuse_other(path: Path, asked: Mapping[str, Any]) -> None:
    """A folder holds one evaluation; a second start of the same one continues it."""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key in DECISIVE:
            if before[key] != asked[key]:
                raise ValueError(
                    f"{path.parent}: holds an evaluation with {key}={before[key]}, now "
                    f"{asked[key]}; give another --out, or remove the folder"
                )
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asked, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    text = "".join(f"{json.dumps(r, ensure_ascii=False)}\n" for r in records)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def show(scores: Mapping[str, Any], out: Path) -> None:
    """Scores as a table, with what failed and where everything lies."""
    console = Console()
    table = Table(title=f"{scores['suite']}: {scores['model']}")
    for column in ("metric", "value", "95 %", "n"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, metric in scores["metrics"].items():
        low, high = metric["ci95"]
        arrow = "↓" if metric["better"] == "lower" else "↑"
        table.add_row(
            f"{name} {arrow}", f"{metric['value']:.4g}", f"{low:.4g} to {high:.4g}",
            str(metric["n"]),
        )  # fmt: skip
    for one in scores["published"]:
        table.add_row(f"{one['metric']}, {one['model']}", f"{one['value']:.4g}", "published", "")
    console.print(table)
    if scores["failed"]:
        console.print(f"{scores['failed']} rows have no score: {out / 'failed.jsonl'}")
    console.print(f"evaluation: {out}   look at it: posttrain report {out}")

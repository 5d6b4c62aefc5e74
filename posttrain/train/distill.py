"""Temporal chain-of-thought distillation, offline: a teacher's chains, checked, then SFT on them.

    data.train --> teacher (workers or endpoint) --> RUN/chains/rows.jsonl --> SFT --> checkpoint

Try it:      posttrain run recipes/nano/temporal_cot_distill.yaml       (2 cores, no GPU)
Full scale:  posttrain run recipes/temporal_cot_distill.yaml            (8 GPUs)
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_recipes.temporal_cot import ChainSettings, all_asked, choose, collect
from posttrain.data.rows import Row
from posttrain.model.load import check_architecture
from posttrain.rollout.chain_teachers import ListeningTeacher, ReadingTeacher
from posttrain.schema import DataSource, Recipe
from posttrain.train.batches import held_out_rows, question_rows
from posttrain.train.resources import ray_session, serving
from posttrain.train.run_folder import RunFolder
from posttrain.train.supervised import SupervisedRun, check_data, check_devices


def train(recipe: Recipe) -> Path:
    """Runs, or continues, a distillation; returns the run folder.

    Raises:
        GateFailed: the run is done and a gate was not passed.
    """
    started = time.monotonic()
    check_architecture(recipe.model.path)
    if recipe.chains.teacher is not None:
        check_architecture(recipe.chains.teacher)
    questions = question_rows(recipe)
    rows = held_out_rows(recipe, check=False)
    run = RunFolder(recipe)
    out = run.path.resolve() / "chains"
    with ray_session(recipe):
        check_devices(recipe)
        report = gather_chains(recipe, questions, out)
        if not report["kept"]:
            raise ValueError(f"no chain kept of {len(questions)} rows; {out}/report.md says why")
        learned = sft_recipe(recipe, out / "rows.jsonl")
        trained, facts = check_data(learned)
        facts |= {"kind": recipe.kind, "chains": report}
        SupervisedRun(learned, run, trained, rows, started).all_phases(facts)
    return run.path


def gather_chains(recipe: Recipe, rows: list[Row], out: Path) -> dict[str, Any]:
    """Asks whatever has not been asked yet, chooses, and returns the report."""
    settings, chains = chain_settings(recipe), recipe.chains
    if chains.endpoint is not None:
        reader = ReadingTeacher(
            chains.endpoint, str(chains.endpoint_model), chains.temperature, chains.max_tokens,
            chains.parallel_requests,
        )  # fmt: skip
        collect(rows, reader, settings, out)
        return choose(rows, settings, out)
    checkpoint = str(chains.teacher or recipe.model.path)
    teacher = ListeningTeacher(checkpoint, chains.temperature, chains.max_tokens)
    if not all_asked(rows, teacher.name, settings, out):
        serve = copy.deepcopy(recipe)
        serve.model = replace(recipe.model, path=checkpoint)
        with serving(serve) as teacher.pool:
            collect(rows, teacher, settings, out)
    return choose(rows, settings, out)


def chain_settings(recipe: Recipe) -> ChainSettings:
    c = recipe.chains
    return ChainSettings(
        num_chains=c.num_chains, min_answer=c.min_answer, min_true=c.min_true,
        require_labels=c.require_labels, max_words=c.max_words, max_repetition=c.max_repetition,
        blind_samples=c.blind_samples, blind_share=c.blind_share, chunk_rows=c.chunk_rows,
        seed=recipe.seed,
    )  # fmt: skip


def sft_recipe(recipe: Recipe, rows: Path) -> Recipe:
    """The recipe of the SFT on what was kept."""
    learned = copy.deepcopy(recipe)
    learned.kind = "sft"
    learned.data.train = {"chains": DataSource(str(rows.resolve()))}
    return learned

"""Rows from a clip whose events are all annotated: the whole list, and one question a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_recipes.timelines import DENSE_PROMPT, describe, spans_of
from posttrain.data.rows import Event, Row
from posttrain.types import Task


def timed_rows(
    name: str, audio: str, duration_s: float, events: Sequence[Event], source: str, licence: str,
    language: str = "en",
) -> Iterator[Row]:  # fmt: skip
    """One `dense` row, and a `grounding` row for every label, in order of first onset."""
    facts: dict[str, Any] = {
        "audio": audio, "duration_s": duration_s, "events": tuple(events), "source": source,
        "licence": licence, "language": language,
    }  # fmt: skip
    yield Row(
        id=f"{name}/dense", prompt=({"role": "user", "content": DENSE_PROMPT},),
        task=Task.DENSE, answer=describe(events), **facts,
    )  # fmt: skip
    for label in dict.fromkeys(event.label for event in events):
        question = {"role": "user", "content": f"When is the following heard: {label}?"}
        yield Row(
            id=f"{name}/{label}", prompt=(question,), task=Task.GROUNDING, query=label,
            answer=spans_of(label, events), **facts,
        )  # fmt: skip

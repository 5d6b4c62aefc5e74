"""Answers of a model to rows, streamed to a file; what is in it is not asked again.

Answers are asked for and written in chunks that always hold the same rows, with the engines' caches
emptied before each: an interrupted evaluation goes on at the first chunk that is not whole, and
ends with the answers that it would have had anyway.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from posttrain.data.rows import Row
from posttrain.types import Completion, Group, PromptRequest, SamplingSettings

Generate = Callable[[Sequence[PromptRequest], SamplingSettings], list[Group]]


@dataclass(frozen=True)
class Answer:
    """What is kept of a completion: `finish_reason` as there, `num_tokens` sampled.

    Attributes:
        error: why the engine refused this row; "" where it answered.
    """

    text: str
    finish_reason: str
    num_tokens: int
    error: str = ""

    @property
    def completion(self) -> Completion:
        """For rewards and metrics, which read the text."""
        return Completion((), (), self.text, self.finish_reason, 0)


def collect_answers(
    rows: Sequence[Row], generate: Generate, settings: SamplingSettings, path: Path,
    *, chunk_rows: int, seed: int,
) -> list[Answer]:  # fmt: skip
    """One answer a row, in order, in the file as well."""
    answers = read_answers(path, rows, chunk_rows)
    bar = tqdm(
        total=len(rows), initial=len(answers), desc="answers", unit=" rows", disable=None
    )  # fmt: skip
    with bar, path.open("a", encoding="utf-8") as file:
        for start in range(len(answers), len(rows), chunk_rows):
            part = rows[start : start + chunk_rows]
            requests = [PromptRequest(f"eval/{r.id}", r.id, r.prompt, r.audio, seed) for r in part]
            said = _asked(requests, generate, settings)
            lines = [{"id": r.id, **asdict(a)} for r, a in zip(part, said, strict=True)]
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            answers += said
            bar.update(len(part))
    return answers


def read_answers(path: Path, rows: Sequence[Row], chunk_rows: int) -> list[Answer]:
    """Answers of whole chunks; what an interruption left behind them is cut off.

    Raises:
        ValueError: the file answers other rows.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    *whole, torn = text.split("\n")  # a text may hold U+2028: no splitlines()
    kept = len(whole) if len(whole) == len(rows) else len(whole) // chunk_rows * chunk_rows
    records = [json.loads(line) for line in whole[:kept]]
    for row, record in zip(rows, records, strict=False):
        if record["id"] != row.id:
            raise ValueError(f"{path}: answers {record['id']!r} where {row.id!r} is asked")
    if torn or kept < len(whole):
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in whole[:kept]), encoding="utf-8")
        os.replace(partial, path)
    return [
        Answer(r["text"], r["finish_reason"], r["num_tokens"], r.get("error", "")) for r in records
    ]


def _asked(
    requests: Sequence[PromptRequest], generate: Generate, settings: SamplingSettings
) -> list[Answer]:
    """Answers of a chunk; where the engine refuses it, of each row by itself.

    What an engine refuses (ValueError: a prompt too long for it) is the row's error, not the end of
    the evaluation.
    """
    try:
        return [_answer(group.completions[0]) for group in generate(requests, settings)]
    except ValueError as error:
        if len(requests) == 1:
            return [Answer("", "error", 0, str(error).strip().split("\n")[-1])]
        return [_asked([request], generate, settings)[0] for request in requests]


def _answer(completion: Completion) -> Answer:
    return Answer(completion.text, completion.finish_reason, completion.num_tokens)

"""A judge: a text model behind an OpenAI-compatible endpoint that compares answer and reference.

It sees the question, the reference answer and the model's answer, never the audio, and is asked for
one word. A verdict that is not one of the words it may say is no verdict: the row counts as failed,
never as wrong.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from posttrain.data.rows import Row
from posttrain.data.thinking import split_thinking
from posttrain.evaluate.answers import Answer

PROMPT = (
    "You grade answers to questions about a recording. You cannot hear it: rely on the reference."
    "\n\n"
    "Question: {question}\n{choices}Reference answer: {reference}\nAnswer to grade: {answer}\n\n"
    "Does the answer to grade agree with the reference in what was asked? Reply with one word, "
    "CORRECT or INCORRECT."
)
_VERDICT = re.compile(r"\W*(INCORRECT|CORRECT)\W*", re.IGNORECASE)
PARALLEL_REQUESTS = 8
MAX_TOKENS = 1_024  # a judge that thinks needs room


class Judge:
    """Asks `model` at `base_url`; the key comes from OPENAI_API_KEY.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
    """

    def __init__(self, base_url: str, model: str) -> None:
        from openai import OpenAI

        self.client = OpenAI(
            base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4
        )
        self.base_url, self.model = base_url, model

    @property
    def name(self) -> str:
        return f"{self.model} at {self.base_url}"

    def verdict(self, row: Row, answer: Answer) -> bool | None:
        """True or False; None where the judge said neither.

        Raises:
            RuntimeError: the endpoint fails for good.
        """
        from openai import OpenAIError

        try:
            said = self.client.chat.completions.create(
                model=self.model, temperature=0.0, max_tokens=MAX_TOKENS, seed=0,
                messages=[{"role": "user", "content": prompt_of(row, answer)}],
            )  # fmt: skip
        except OpenAIError as error:
            raise RuntimeError(
                f"judge {self.name}: {error}; correct --judge or --judge-model, or start the "
                "server; verdicts so far are kept"
            ) from error
        return read_verdict(said.choices[0].message.content or "")


def prompt_of(row: Row, answer: Answer) -> str:
    """What the judge reads: the answer without its thought."""
    question = "\n".join(str(m["content"]) for m in row.prompt if m["role"] == "user")
    lettered = (f"({chr(ord('A') + i)}) {text}" for i, text in enumerate(row.choices))
    choices = f"Options: {' '.join(lettered)}\n" if row.choices else ""
    _, said = split_thinking(answer.text)
    return PROMPT.format(
        question=question, choices=choices, reference=row.answer, answer=said.strip() or "(nothing)"
    )


def read_verdict(text: str) -> bool | None:
    """What follows the judge's thought, if it is one of the two words and nothing else."""
    match = _VERDICT.fullmatch(split_thinking(text)[1])
    return match[1].upper() == "CORRECT" if match else None


def collect_verdicts(
    judge: Judge, rows: Sequence[Row], answers: Sequence[Answer], path: Path
) -> dict[str, bool | None]:
    """Row id -> verdict of this judge; streamed to the file, and not asked again where it stands.

    Rows without a reference, or without an answer, are not put before a judge.
    """
    known: dict[str, bool | None] = {}
    if path.exists():
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        records = [r for r in map(json.loads, whole) if r["judge"] == judge.name]
        known = {r["id"]: r["correct"] for r in records}
    pairs = zip(rows, answers, strict=True)
    left = [(r, a) for r, a in pairs if r.id not in known and r.answer.strip() and not a.error]
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(PARALLEL_REQUESTS) as threads:
        verdicts = threads.map(lambda pair: judge.verdict(*pair), left)
        bar = tqdm(zip(left, verdicts, strict=True), total=len(left), desc="judge", disable=None)
        for (row, _), verdict in bar:
            known[row.id] = verdict
            record = {"id": row.id, "judge": judge.name, "correct": verdict}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    return known

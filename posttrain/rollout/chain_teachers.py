"""Who may be asked for chains: AF-Next on rollout workers, or a text model behind an endpoint."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from posttrain.data.rows import Row
from posttrain.types import Completion, PromptRequest, SamplingSettings

log = logging.getLogger(__name__)

INSTRUCTION = (
    "You write the reasoning of a careful listener. Below is what was annotated in a recording, "
    "with times in seconds, and a question about it. Reason step by step inside <think> and "
    "</think>; after each step cite the span of the recording that supports it as "
    "<t>start-end</t>, in seconds with one decimal. Never mention the annotations: write as if you "
    "had listened. After </think> "
    "give the final answer alone; cite times in the same form where the question asks for times."
)
NOT_HEARD = "Nothing is known about the recording: answer from the question alone."


def _named(teacher: str, temperature: float, max_tokens: int) -> str:
    """Everything about a teacher that decides what it says."""
    return f"{teacher}, temperature {temperature:g}, at most {max_tokens} tokens"


def chain_seed(row_id: str, seed: int) -> int:
    """31 bits that depend on the row and the run, not on when it is asked."""
    digest = hashlib.sha256(f"posttrain/chain/{seed}/{row_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class ListeningTeacher:
    """AF-Next on a pool of workers: hears the clip. Set `pool` before it is asked.

    Caches are emptied before every call, so a chunk comes out the same whatever was asked before.
    """

    def __init__(self, checkpoint: str, temperature: float, max_tokens: int) -> None:
        self.pool: Any = None
        self.name = _named(checkpoint, temperature, max_tokens)
        self.temperature, self.max_tokens = temperature, max_tokens

    def chains(self, rows: Sequence[Row], num_chains: int, seed: int) -> list[list[Completion]]:
        self.pool.call_all("set_policy_version", 0)
        requests = [
            PromptRequest(
                f"chain/{seed}/{row.id}", row.id, row.prompt, row.audio, chain_seed(row.id, seed)
            )
            for row in rows
        ]
        settings = SamplingSettings(self.temperature, self.max_tokens, num_chains)
        return [list(group.completions) for group in self.pool.generate(requests, settings)]


class ReadingTeacher:
    """A text model behind an OpenAI-compatible endpoint: reads the timed annotations.

    The key comes from the environment (`OPENAI_API_KEY`); servers that need none get a stand-in.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: the name that the server knows it by.
        parallel_requests: at once.
    """

    def __init__(
        self, base_url: str, model: str, temperature: float, max_tokens: int,
        parallel_requests: int = 8,
    ) -> None:  # fmt: skip
        from openai import OpenAI

        self.client = OpenAI(
            base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=4
        )
        self.name = _named(f"{model} at {base_url}", temperature, max_tokens)
        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.parallel_requests = parallel_requests

    def chains(self, rows: Sequence[Row], num_chains: int, seed: int) -> list[list[Completion]]:
        """Nothing for a row that the server refuses.

        Raises:
            RuntimeError: the endpoint fails for good, or refuses every row, which is a setting's
                fault and not theirs; nothing of these rows is kept.
        """
        from openai import OpenAIError

        try:
            with ThreadPoolExecutor(self.parallel_requests) as threads:
                said = list(threads.map(lambda row: self._ask(row, num_chains, seed), rows))
        except OpenAIError as error:
            raise RuntimeError(
                f"teacher {self.name}: {error}; correct chains.endpoint or chains.endpoint_model, "
                "or start the server; what was collected so far is kept"
            ) from error
        refused = [answer for answer in said if isinstance(answer, str)]
        if len(refused) == len(rows):
            raise RuntimeError(
                f"teacher {self.name} refused all {len(rows)} rows, {rows[0].id!r} with: "
                f"{refused[0]}; correct chains.* (max_tokens may not fit the server's context), or "
                "drop the rows; what was collected so far is kept"
            )
        return [[] if isinstance(answer, str) else answer for answer in said]

    def _ask(self, row: Row, num_chains: int, seed: int) -> list[Completion] | str:
        """Completions, or what the server says where it refuses this very row."""
        messages: Any = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": shown_to_reader(row)},
        ]
        from openai import BadRequestError

        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages, n=num_chains, temperature=self.temperature,
                max_tokens=self.max_tokens, seed=chain_seed(row.id, seed),
            )  # fmt: skip
        except BadRequestError as error:  # this row, such as a timeline too long for the model
            log.warning("row %r: refused by %s: %s", row.id, self.name, error)
            return str(error)
        return [
            Completion((), (), c.message.content or "", c.finish_reason or "stop", 0)
            for c in answer.choices
        ]


def shown_to_reader(row: Row) -> str:
    """What a reading teacher sees: length, events, question, and the reference answer if any."""
    question = "\n".join(str(m["content"]) for m in row.prompt if m["role"] == "user")
    if not row.events and not row.answer:
        return f"{NOT_HEARD}\n\nQuestion: {question}"
    events = "\n".join(f"{e.start_s:.1f}-{e.end_s:.1f} s: {e.label}" for e in row.events)
    lines = [f"The recording lasts {row.duration_s or 0:.1f} s.", "", "Annotated:", events, ""]
    if row.answer:
        lines.append(f"Reference answer: {row.answer}")
    return "\n".join([*lines, f"Question: {question}"])

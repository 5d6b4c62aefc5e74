"""The records that flow through posttrain, and the Protocols at its seams.

One prompt makes one `Group` of G `Completion`s; a reward turns each into a `RewardResult`:

    Row --prompt--> Engine --Completion--> Reward --RewardResult--> advantages --> learner

Worked example, G = 2, prompt of 300 tokens (250 of them audio):

    >>> c = Completion(token_ids=(40, 41), logprobs=(-0.1, -0.7), text="<t>1.0-2.0</t>",
    ...                finish_reason="stop", policy_version=3)
    >>> c.num_tokens
    2

This file imports nothing heavy: no torch, no numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from posttrain.data.rows import Row


class Task(StrEnum):
    """What a row asks for; decides which rewards and metrics apply."""

    GROUNDING = "grounding"
    DENSE = "dense"
    ORDER = "order"
    COUNT = "count"
    ABSENT = "absent"
    POINTS = "points"
    CHOICE = "choice"
    TRANSCRIPT = "transcript"
    TRANSLATION = "translation"
    CHAT = "chat"
    REFUSAL = "refusal"


class RewardStatus(StrEnum):
    """Why a reward has, or lacks, a value."""

    SCORED = "scored"
    TRUNCATED = "truncated"
    UNSCORABLE = "unscorable"
    ERRORED = "errored"


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        temperature: softmax temperature; 0 means greedy. The learner divides its logits by it.
        max_tokens: longest completion, in tokens.
        num_completions: G, completions a prompt.
    """

    temperature: float
    max_tokens: int
    num_completions: int = 1


@dataclass(frozen=True)
class Completion:
    """One sampled answer.

    Attributes:
        token_ids: (T,) sampled ids, the end token included when it was sampled.
        logprobs: (T,) natural-log probability of each id under the distribution sampled from
            (after temperature); empty if the engine was not asked for them.
        text: decoded without special tokens.
        finish_reason: "stop" (end token) or "length" (cut at max_tokens).
        policy_version: number of weight syncs the engine had received.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    policy_version: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class PromptRequest:
    """What an engine is asked: one prompt, G completions.

    Attributes:
        group_id: unique within a run; a reissued group keeps its id, so nothing trains twice.
        prompt_id: the row's id, part of the seed of every completion.
        messages: chat messages without the audio part.
        audio_path: file to read in the worker, or None; waveforms never travel with the request.
        seed: of the first completion; completion i uses seed + i. Ignored when greedy.
    """

    group_id: str
    prompt_id: str
    messages: tuple[Mapping[str, Any], ...]
    audio_path: str | None
    seed: int


def token_runs(token_ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ids as (id, how often in a row) pairs: 45,000 audio placeholders are one pair.

    >>> token_runs([7, 5, 5, 5])
    ((7, 1), (5, 3))
    """
    return tuple((token, sum(1 for _ in run)) for token, run in groupby(token_ids))


@dataclass(frozen=True)
class Group:
    """A prompt's G completions. Its size in bytes does not grow with the clip.

    Attributes:
        prompt_runs: expanded ids as the engine saw them, audio placeholders included, as
            `token_runs`.
        completions: (G,), completion i drawn with seed + i.
        worker: name of the worker that answered.
        attempts: how often the group was issued (1 unless a worker died).
    """

    group_id: str
    prompt_id: str
    prompt_runs: tuple[tuple[int, int], ...]
    completions: tuple[Completion, ...]
    worker: str = ""
    attempts: int = 1

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """(P,) ids."""
        return tuple(token for token, count in self.prompt_runs for _ in range(count))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(count for _, count in self.prompt_runs)


@dataclass(frozen=True)
class RewardResult:
    """What one reward says of one completion.

    Attributes:
        value: the score; None exactly when status is not "scored".
        breakdown: every named term that went into the value.
        status: `RewardStatus`; a failure is never turned into a number.
        reason: one line for people, empty when scored.
    """

    value: float | None
    breakdown: Mapping[str, float] = field(default_factory=dict)
    status: RewardStatus = RewardStatus.SCORED
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.status == RewardStatus.SCORED) != (self.value is not None):
            raise ValueError(
                f"RewardResult: status {self.status!r} with value {self.value!r}; "
                "a value belongs to status 'scored' and to no other"
            )


class Reward(Protocol):
    """Scores one completion of one row. Pure: same input, same output, no state kept."""

    @property
    def name(self) -> str: ...

    def __call__(self, row: Row, completion: Completion) -> RewardResult: ...


class AudioTextScorer(Protocol):
    """Says where in a clip a phrase is heard. Implementation: `posttrain.model.audio_text`."""

    def relevance(self, audio: str, phrase: str) -> tuple[ArrayLike, float]:
        """(N,) probability of every frame of the file that it holds the phrase, and seconds a
        frame."""
        ...

    def presence(self, audio: str, phrase: str) -> float:
        """Probability that the phrase is heard anywhere in the file."""
        ...

    def claim_probabilities(
        self, audio: str, claims: Sequence[tuple[str, float, float]]
    ) -> list[float]:
        """Probability of each (phrase, start_s, end_s) that exactly this span holds it."""
        ...


class AnswerScorer(Protocol):
    """Log-probabilities of an answer when parts of the audio are silent."""

    def answer_logprobs(
        self,
        audio: str,
        prompt: Sequence[Mapping[str, Any]],
        answer: str,
        silenced: Sequence[Sequence[tuple[float, float]]],
    ) -> list[float]:
        """Natural log-probability of `answer` right after the prompt, for each set of silenced
        spans (seconds)."""
        ...


class ChainTeacher(Protocol):
    """Thinks aloud about rows. Implementations: `posttrain.rollout.chain_teachers`."""

    @property
    def name(self) -> str: ...

    def chains(self, rows: Sequence[Row], num_chains: int, seed: int) -> list[list[Completion]]:
        """`num_chains` completions of every row; the same for the same rows and seed."""
        ...


class Engine(Protocol):
    """Samples completions and accepts new weights. Implementations: vLLM, transformers."""

    def generate(
        self, requests: Sequence[PromptRequest], settings: SamplingSettings
    ) -> list[Group]: ...

    def score(self, request: PromptRequest, token_ids: Sequence[int]) -> list[float]:
        """Log-probability (natural log, temperature 1) of each of `token_ids` after the prompt."""
        ...

    def load_adapter(self, files: Mapping[str, bytes], policy_version: int) -> None:
        """Serves a PEFT adapter, given as its files, from now on."""
        ...

    def set_policy_version(self, policy_version: int) -> None:
        """Ends a full weight update: drops every cache that depends on the weights."""
        ...


class GateFailed(RuntimeError):
    """A finished run did not reach what its recipe demands; the message names gate and figures."""


class Sink(Protocol):
    """Receives metrics; a sink that fails never stops training."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...

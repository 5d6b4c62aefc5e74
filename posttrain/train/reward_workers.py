"""Learned rewards as Ray actors that answer many callers at once.

reward threads --ask--> actor --waits a moment, takes what has come--> one forward --> answers
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from posttrain.model.audio_text_model import AudioTextModel
from posttrain.model.silenced import SilencedAnswers

STARTUP_TIMEOUT_S = 600


class MicroBatcher:
    """Collects what is asked within `wait_s` of the first question, up to `max_batch`, and runs it
    in one call off the event loop."""

    def __init__(
        self, run: Callable[[list[Any]], list[Any]], max_batch: int, wait_s: float = 0.005
    ) -> None:
        self._run, self._max_batch, self._wait_s = run, max_batch, wait_s
        self._waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self.batch_sizes: list[int] = []

    async def ask(self, question: Any) -> Any:
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._serve())
        future: asyncio.Future[Any] = loop.create_future()
        await self._waiting.put((question, future))
        return await future

    async def _serve(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(self._wait_s)
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            self.batch_sizes.append(len(batch))
            await self._answer(batch)

    async def _answer(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        """Answers all; when that fails, each by itself, so that an error reaches its own asker."""
        try:
            answers = await asyncio.to_thread(self._run, [question for question, _ in batch])
            pairs = list(zip(batch, answers, strict=True))
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in pairs:
            if not future.done():
                future.set_result(answer)


class AudioTextActor:
    """Serves `AudioTextModel`."""

    def __init__(self, head: str, checkpoint: str | None, device: str, max_batch: int) -> None:
        self.model = AudioTextModel(head, checkpoint, device)
        self.questions = MicroBatcher(self.model.answer_batch, max_batch)
        self.claims = MicroBatcher(self._claims, max_batch)

    async def relevance(self, audio: str, phrase: str) -> tuple[np.ndarray, float]:
        return (await self.questions.ask((audio, phrase)))[0], self.model.features.frame_s

    async def presence(self, audio: str, phrase: str) -> float:
        return (await self.questions.ask((audio, phrase)))[1]

    async def claim_probabilities(
        self, audio: str, claims: Sequence[tuple[str, float, float]]
    ) -> list[float]:
        return await self.claims.ask([(audio, *claim) for claim in claims])

    async def ready(self) -> bool:
        return True

    async def batch_sizes(self) -> list[int]:
        return self.questions.batch_sizes + self.claims.batch_sizes

    def _claims(self, asked: list[list[Any]]) -> list[list[float]]:
        flat = iter(self.model.claims_batch([claim for claims in asked for claim in claims]))
        return [[next(flat) for _ in claims] for claims in asked]


class EvidenceActor:
    """Serves `SilencedAnswers`; its windows are cached across the completions of a group."""

    def __init__(self, checkpoint: str, device: str, dtype: str) -> None:
        import torch

        self.scorer = SilencedAnswers(checkpoint, device, getattr(torch, dtype))

    def ready(self) -> bool:
        return True

    def answer_logprobs(self, *arguments: Any) -> list[float]:
        return self.scorer.answer_logprobs(*arguments)


class ActorAudioTextScorer:
    """`AudioTextScorer` over an actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def relevance(self, audio: str, phrase: str) -> tuple[np.ndarray, float]:
        return ray.get(self.actor.relevance.remote(audio, phrase))

    def presence(self, audio: str, phrase: str) -> float:
        return ray.get(self.actor.presence.remote(audio, phrase))

    def claim_probabilities(
        self, audio: str, claims: Sequence[tuple[str, float, float]]
    ) -> list[float]:
        return ray.get(self.actor.claim_probabilities.remote(audio, list(claims)))


class ActorAnswerScorer:
    """`AnswerScorer` over an actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def answer_logprobs(
        self, audio: str, prompt: Sequence[Mapping[str, Any]], answer: str,
        silenced: Sequence[Sequence[tuple[float, float]]],
    ) -> list[float]:  # fmt: skip
        return ray.get(self.actor.answer_logprobs.remote(audio, prompt, answer, silenced))


def start_actor(kind: type, device: str, threads: int, *arguments: Any) -> Any:
    """A handle to one reward actor, its model loaded; on "cuda" it takes a GPU of its own."""
    actor = (
        ray.remote(kind)
        .options(
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            max_concurrency=256 if kind is AudioTextActor else 1,
        )
        .remote(*arguments)
    )
    try:
        ray.get(actor.ready.remote(), timeout=STARTUP_TIMEOUT_S)
    except GetTimeoutError as error:
        raise RuntimeError(
            f"{kind.__name__} did not start within {STARTUP_TIMEOUT_S} s: is a CPU"
            f"{' and a GPU' if device == 'cuda' else ''} free for it?"
        ) from error
    except RayActorError as error:
        cause = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"{kind.__name__} could not start: {cause}") from error
    return actor

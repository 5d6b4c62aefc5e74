"""Scores many completions: rewards that wait for a model run side by side, each on a clock.

    items --> queue --> daemon threads --> results in order
                           |
                           +-- past the limit: the sample is errored and a fresh thread takes over

Rules are pure Python and gain nothing from threads; a learned reward's calls meet in its actor and
form batches there. A thread that hangs cannot be killed, only left behind: it is a daemon, so the
program still ends.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from posttrain.data.rows import Row
from posttrain.types import Completion, Reward, RewardResult, RewardStatus
from reward_models.registry import call_safely

POLL_S = 0.05


@dataclass
class _Call:
    row: Row
    completion: Completion
    started_s: float | None = None
    ended_s: float = 0.0
    result: RewardResult | None = None
    done: threading.Event = field(default_factory=threading.Event)


def score_all(
    reward: Reward, items: Iterable[tuple[Row, Completion]], *, timeout_s: float = 60.0,
    num_threads: int = 16,
) -> list[RewardResult]:  # fmt: skip
    """One result an item, in order. A call that raises or takes longer than `timeout_s` is
    `errored`, and only that one.

    Args:
        timeout_s: a call is too late when it has run for so long and no other has ended in that
            time: waiting in a busy model's queue is not hanging.
    """
    calls = [_Call(row, completion) for row, completion in items]
    waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
    for call in calls:
        waiting.put(call)
    num_threads = min(num_threads, len(calls))
    for _ in range(num_threads):
        _start_worker(reward, waiting)
    for call in calls:
        while not call.done.wait(POLL_S):
            for late in _late(calls, timeout_s):
                late.result = _timed_out(reward, late, timeout_s)
                late.done.set()
                _start_worker(reward, waiting)
    for _ in range(num_threads):
        waiting.put(None)
    return [call.result for call in calls if call.result is not None]


def _late(calls: Sequence[_Call], timeout_s: float) -> list[_Call]:
    now = time.monotonic()
    last_end_s = max(call.ended_s for call in calls)
    return [
        c
        for c in calls
        if not c.done.is_set()
        and c.started_s is not None
        and now - max(c.started_s, last_end_s) > timeout_s
    ]


def _timed_out(reward: Reward, call: _Call, timeout_s: float) -> RewardResult:
    reason = (
        f"{reward.name} on row {call.row.id!r}: no result for {timeout_s:g} s (scoring.timeout_s)"
    )
    return RewardResult(None, {}, RewardStatus.ERRORED, reason)


def _start_worker(reward: Reward, waiting: queue.SimpleQueue[_Call | None]) -> None:
    def work() -> None:
        while (call := waiting.get()) is not None:
            call.started_s = time.monotonic()
            result = call_safely(reward, call.row, call.completion)
            if call.done.is_set():
                return  # given up on: another thread has taken this one's place
            call.result, call.ended_s = result, time.monotonic()
            call.done.set()

    threading.Thread(target=work, daemon=True, name="posttrain-reward").start()

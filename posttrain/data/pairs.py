"""Preference rows: a prompt with a better and a worse answer, named as in TRL.

One JSON object a line::

    {"id": "p-1", "prompt": [{"role": "user", "content": "When is seven heard?"}],
     "audio": "audio/t-1.flac", "duration_s": 10.0,
     "chosen": "<t>2.1-2.6</t>", "rejected": "<t>4.1-4.6</t>", "kind": "shifted", "weight": 1.0}

`rejected_audio` marks a pair whose answers are equal and whose clips differ: the answer is right
for `audio` and wrong for the other. A pair without `audio` is text alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.data.rows import Message, Row, as_record, parse_row, read_records, stored_path


@dataclass(frozen=True)
class Pair:
    """One preference.

    Attributes:
        row: the prompt and clip; its `answer` is the chosen one.
        rejected: the worse answer.
        rejected_audio: another clip, for which the same answer is wrong; None: the row's own.
        kind: how the rejected answer was made.
        weight: in the loss.
    """

    row: Row
    rejected: str
    rejected_audio: str | None = None
    kind: str = ""
    weight: float = 1.0

    @property
    def id(self) -> str:
        return self.row.id


OWN_KEYS = ("chosen", "rejected", "rejected_audio", "kind", "weight")


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a JSONL file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names file, line and key, the value and the fix.
    """
    path = Path(path)
    base_dir = path.resolve().parent
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, record in read_records(path):
        where = f"{path}:{number}"
        pair = _parse(record, where, base_dir)
        if pair.id in seen:
            raise ValueError(f"{where}: id {pair.id!r} stands on line {seen[pair.id]} already")
        seen[pair.id] = number
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"pairs {path}: no pairs in the file")
    return pairs


def _parse(record: Mapping[str, Any], where: str, base_dir: Path) -> Pair:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: {type(record).__name__} instead of a JSON object")
    chosen, rejected = (_answer(record.get(key), key, where) for key in ("chosen", "rejected"))
    rest = {key: value for key, value in record.items() if key not in OWN_KEYS}
    # a choice needs an answer; an earlier turn of `messages` is none
    row = parse_row({"answer": chosen} | rest, where=where, base_dir=base_dir)
    row = replace(row, answer=chosen)
    other = record.get("rejected_audio")
    if not isinstance(other, str | None):
        raise ValueError(f"{where}: rejected_audio is {other!r}; give a path")
    if other is not None and not Path(other).is_absolute():
        other = str(base_dir / other)
    if other in (None, row.audio) and chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text; drop the pair")
    weight = record.get("weight", 1.0)
    if not isinstance(weight, int | float) or not weight > 0:
        raise ValueError(f"{where}: weight is {weight!r}; a number above 0 is needed")
    return Pair(row, rejected, other, str(record.get("kind") or ""), float(weight))


def _answer(value: Any, key: str, where: str) -> str:
    """The text of an answer; TRL's conversational form is a list with one assistant message."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{key}` is {value!r}; give the answer's text")
    return value


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> None:
    """Writes JSONL atomically; clips below the file's folder are written as relative paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    with partial.open("w", encoding="utf-8") as out:
        for pair in pairs:
            record = as_record(pair.row, path.parent)
            record |= {"chosen": record.pop("answer"), "rejected": pair.rejected}
            record |= {"rejected_audio": stored_path(pair.rejected_audio, path.parent)}
            record |= {"kind": pair.kind, "weight": pair.weight}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def messages_of(pair: Pair, answer: str) -> tuple[Message, ...]:
    return (*pair.row.prompt, {"role": "assistant", "content": answer})

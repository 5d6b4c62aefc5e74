"""The row schema: one question about one clip, validated on load.

A JSONL file holds one row a line. Example::

    {"id": "t-1", "prompt": [{"role": "user", "content": "When is seven heard?"}],
     "audio": "audio/t-1.flac", "duration_s": 10.0,
     "events": [{"start_s": 2.1, "end_s": 2.6, "label": "seven"}], "query": "seven",
     "answer": "<t>2.1-2.6</t>", "task": "grounding", "language": "en",
     "source": "timelines", "licence": "CC-BY-SA-3.0"}

NVIDIA's `sound` / `conversations` JSON and TRL's conversational rows with an `audio` column are
accepted as they are: a row without `id` is named by its file and line, and `duration_s` is read
from the clip where it is not given. Relative audio paths are taken from the file's own folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from posttrain.types import Task

AUDIO_TASKS = frozenset(Task) - {Task.CHAT, Task.REFUSAL}
TIMED_TASKS = (Task.GROUNDING, Task.POINTS, Task.DENSE)
EVENT_SLACK_S = 0.05
PLACEHOLDERS = ("<sound>", *(f"<sound-{i}>" for i in range(1, 17)))
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """Something heard: [start_s, end_s) in seconds from the clip's start, and its label."""

    start_s: float
    end_s: float
    label: str = ""


@dataclass(frozen=True)
class Row:
    """One question about one clip.

    Attributes:
        prompt: chat messages up to the last user turn; the audio is not written into them.
        audio: path of the clip, or None for text-only rows.
        duration_s: length of the clip in seconds, None without audio.
        events: everything annotated in the clip, in order of start; () also where nobody has
            labelled it: such rows leave the key out, and only a learned reward scores them.
        query: label asked for; the target spans of grounding rows are the events that carry it.
        answer: reference answer; "" when there is none.
        choices: texts of the options of a `choice` row, in order (A), (B), ...
        split: "train", "test" or "unheard".
    """

    id: str
    prompt: tuple[Message, ...]
    audio: str | None
    duration_s: float | None
    task: Task
    events: tuple[Event, ...] = ()
    query: str | None = None
    answer: str = ""
    choices: tuple[str, ...] = ()
    language: str = "en"
    source: str = ""
    licence: str = ""
    split: str = "train"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target_spans(self) -> tuple[tuple[float, float], ...]:
        """Spans that answer the question, seconds: the queried events, or all of them."""
        wanted = [e for e in self.events if self.query is None or e.label == self.query]
        return tuple((e.start_s, e.end_s) for e in wanted)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a JSONL (or one JSON list) file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names file, line and key, the value and the fix.
    """
    path = Path(path)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for line_number, record in read_records(path):
        where = f"{path}:{line_number}"
        row = parse_row(record, where=where, base_dir=path.resolve().parent)
        if row.id in seen:
            raise ValueError(f"{where}: id {row.id!r} stands on line {seen[row.id]} already")
        seen[row.id] = line_number
        rows.append(row)
    if not rows:
        raise ValueError(f"rows {path}: no rows in the file")
    return rows


def read_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, JSON object) of a JSONL file, or of one JSON list.

    Raises:
        FileNotFoundError: no such file; ValueError: not JSON, with file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"rows {path}: no such file; correct data.*.path")
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), start=1)
            return
        for line_number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield line_number, json.loads(line)
    except json.JSONDecodeError as error:
        at = error.lineno if text.lstrip().startswith("[") else line_number
        raise ValueError(f"{path}:{at}: not JSON ({error.msg}); one object a line") from error


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes JSONL atomically; audio below the file's folder is written as a relative path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    with partial.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(as_record(row, path.parent), ensure_ascii=False) + "\n")
    partial.replace(path)


def as_record(row: Row, folder: Path) -> dict[str, Any]:
    """What a file in `folder` holds of a row; `read_rows` gives it back."""
    record = asdict(row) | {"audio": stored_path(row.audio, folder)}
    if not row.events and row.task in TIMED_TASKS:
        del record["events"]  # nobody has labelled it
    return record


def stored_path(clip: str | None, folder: Path) -> str | None:
    """A clip's path as a file in `folder` gives it: relative where the clip lies below it."""
    if clip is None:
        return None
    for path, base in (
        (Path(os.path.abspath(clip)), Path(os.path.abspath(folder))),
        (Path(clip).resolve(), folder.resolve()),
    ):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return os.path.abspath(clip)


def parse_row(
    record: Mapping[str, Any], *, where: str = "row", base_dir: Path | None = None
) -> Row:
    """One row from our schema, NVIDIA's `sound`/`conversations` or TRL's conversational form."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: {type(record).__name__} instead of a JSON object")
    if "conversations" in record:
        record = _from_nvidia(record, where)
    elif "messages" in record and "prompt" not in record:
        record = _from_trl_messages(record, where)
    row = _build(record, where, base_dir)
    _validate(row, where, labelled=record.get("events") is not None)
    return row


def _from_nvidia(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for turn in _listed(record["conversations"], f"{where}: conversations"):
        said_by = turn.get("from") if isinstance(turn, Mapping) else turn
        if said_by not in roles:
            raise ValueError(f"{where}: conversations.from {said_by!r}; human or gpt")
        messages.append({"role": roles[said_by], "content": turn.get("value")})
    renamed = {"audio": record.get("sound"), "duration_s": record.get("duration")}
    rest = {k: v for k, v in record.items() if k not in ("conversations", "sound", "duration")}
    return rest | renamed | _split_last_answer(messages, where)


def _from_trl_messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    rest = {k: v for k, v in record.items() if k != "messages"}
    return rest | _split_last_answer(_listed(record["messages"], f"{where}: messages"), where)


def _split_last_answer(turns: Sequence[Any], where: str) -> dict[str, Any]:
    messages = [_message(turn, where) for turn in turns]
    answered = messages and messages[-1]["role"] == "assistant"
    answer = {"answer": messages.pop()["content"]} if answered else {}
    if not messages:
        raise ValueError(f"{where}: no user turn before the answer")
    return {"prompt": messages} | answer


def _listed(turns: Any, where: str) -> list[Any]:
    if not isinstance(turns, list | tuple):
        raise ValueError(f"{where} is {turns!r}; a list of messages is needed")
    return list(turns)


def _message(turn: Any, where: str) -> dict[str, str]:
    """Role and text; audio placeholders are removed, the chat template writes those itself."""
    role = turn.get("role") if isinstance(turn, Mapping) else None
    content = turn.get("content") if isinstance(turn, Mapping) else None
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text", "") for part in content if part.get("type") == "text"]
        content = "\n".join(map(str, texts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where}: {turn!r} is no message; give `role`, and text as `content`")
    for token in PLACEHOLDERS:
        content = content.replace(f"{token}\n", "").replace(token, "")
    return {"role": role, "content": content.strip()}


KNOWN_KEYS = {f.name for f in fields(Row)}


def _build(record: Mapping[str, Any], where: str, base_dir: Path | None) -> Row:
    if "id" not in record and ":" in where:  # FILE:LINE
        record = {**record, "id": Path(where).name}
    for key in ("id", "prompt"):
        if record.get(key) in (None, "", []):
            raise ValueError(f"{where}: `{key}` is missing")
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    audio = _audio_path(record.get("audio"), where, base_dir)
    answer = record.get("answer", record.get("completion", record.get("solution", ""))) or ""
    if isinstance(answer, list):
        answer = _message(answer[-1], where)["content"]
    if not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: answer is {answer!r}; give text")
    extra = {k: v for k, v in record.items() if k not in KNOWN_KEYS | {"completion", "solution"}}
    return Row(
        id=str(record["id"]),
        prompt=tuple(_message(turn, where) for turn in _listed(prompt, f"{where}: prompt")),
        audio=audio,
        duration_s=_duration_s(record.get("duration_s"), audio, where),
        task=_task(record.get("task", "chat" if audio is None else None), where),
        events=parse_events(record.get("events") or (), where),
        query=record.get("query"),
        answer=str(answer),
        choices=tuple(record.get("choices") or ()),
        language=record.get("language") or "en",
        source=record.get("source") or "",
        licence=record.get("licence") or "",
        split=record.get("split") or "train",
        metadata=dict(record.get("metadata") or {}) | extra,
    )


def _audio_path(audio: Any, where: str, base_dir: Path | None) -> str | None:
    if isinstance(audio, Mapping):
        audio = audio.get("path")
    if isinstance(audio, Sequence) and not isinstance(audio, str):
        if len(audio) > 1:
            raise ValueError(
                f"{where}: {len(audio)} clips in one row; the engine takes one audio a prompt: "
                "join the clips or make one row of each"
            )
        audio = audio[0] if audio else None
    if not audio:
        return None
    if not isinstance(audio, str):
        raise ValueError(f"{where}: audio of type {type(audio).__name__}; give a path")
    if base_dir is not None and not Path(audio).is_absolute():
        audio = str(base_dir / audio)
    return audio


def _duration_s(value: Any, audio: str | None, where: str) -> float | None:
    if value is None and audio is not None and Path(audio).is_file():
        from posttrain.data.audio import audio_duration_s

        try:
            return audio_duration_s(audio)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return _number(value, f"{where}: duration_s")


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} is {value!r}; a finite number of seconds is needed")
    return float(value)


def _task(value: Any, where: str) -> Task:
    try:
        return Task(value if value is not None else "chat")
    except ValueError:
        raise ValueError(
            f"{where}: unknown task {value!r}; one of {[t.value for t in Task]}"
        ) from None


def parse_events(records: Iterable[Any], where: str) -> tuple[Event, ...]:
    """Events in order of start; ValueError names the record that is wrong."""
    events = []
    for i, record in enumerate(records):
        at = f"{where}: events[{i}]"
        if isinstance(record, Event):
            record = asdict(record)
        if not isinstance(record, Mapping):
            raise ValueError(
                f"{at} is {record!r}; an object with start_s, end_s and label is needed"
            )
        start_s = _number(record.get("start_s"), f"{at}.start_s")
        end_s = _number(record.get("end_s"), f"{at}.end_s")
        if start_s is None or end_s is None:
            raise ValueError(f"{at}: start_s and end_s are both needed")
        events.append(Event(start_s, end_s, str(record.get("label", ""))))
    return tuple(sorted(events, key=lambda e: (e.start_s, e.end_s)))


def _validate(row: Row, where: str, labelled: bool) -> None:
    if row.audio is None and row.task in AUDIO_TASKS:
        raise ValueError(f"{where}: task {row.task.value!r} needs `audio`; give a path")
    if row.audio is not None and (row.duration_s is None or row.duration_s <= 0):
        raise ValueError(f"{where}: duration_s is {row.duration_s!r}; give the clip's seconds")
    if token := next((token for token in PLACEHOLDERS if token in row.answer), None):
        raise ValueError(f"{where}: {token} in the answer, where no clip can stand; remove it")
    for i, event in enumerate(row.events):
        at = f"{where}: events[{i}] {event.start_s:g}-{event.end_s:g} s"
        if event.end_s < event.start_s:
            raise ValueError(f"{at} is reversed; swap start_s and end_s")
        limit_s = (row.duration_s or 0.0) + EVENT_SLACK_S
        if event.start_s < 0 or event.end_s > limit_s:
            raise ValueError(f"{at} lies outside the clip of {row.duration_s} s; correct it")
    if row.task in TIMED_TASKS and row.events and not row.target_spans:
        raise ValueError(
            f"{where}: {row.task.value} row with query {row.query!r} and no such event; "
            "add the event, or use task 'absent'"
        )
    if row.task in TIMED_TASKS and labelled and not row.events:
        raise ValueError(
            f"{where}: {row.task.value} row with `events` []; label them, use task 'absent', or "
            "leave the key out where nobody has labelled the clip"
        )
    if row.task is Task.CHOICE and not row.answer:
        raise ValueError(f"{where}: choice row without `answer`; give the letter or the text")

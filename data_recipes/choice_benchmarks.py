"""Multiple-choice benchmarks in their owners' layouts: MMAU, MMAU-Pro, MMAR, MMSU.

    mmau      mmau-test-mini.json, mmau-test.json   audio_id, question, choices, answer
    mmau_pro  test*.parquet (or .json)              audio_path, question, choices, answer
    mmar      MMAR-meta.json                        audio_path, question, choices, answer
    mmsu      question/mmsu.jsonl (or mmsu.jsonl)   audio_path, question, choice_a .. d, answer_gt

Audio paths are taken from the folder. MMAU (Apache-2.0), MMAU-Pro, MMAR and MMSU are downloaded
from the Hub or their repositories; this reads a local copy.

    python -m data_recipes.choice_benchmarks --source MMAR --layout mmar --out rows.jsonl

Questions end with AF-Next's own wording for options. Rows with several clips or without options
(MMAU-Pro has both) are left out and counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.streams import Skipped, clip_of, run
from posttrain.data.rows import Row, read_records
from posttrain.types import Task

ASK = "Choose the correct option from the following options:"


@dataclass(frozen=True)
class Layout:
    """Where a benchmark keeps what: file patterns, and the keys of its records.

    Attributes:
        categories: keys that scores are also shown by -> their names in a row's metadata.
    """

    files: tuple[str, ...]
    audio: str
    answer: str
    choices: tuple[str, ...]
    categories: Mapping[str, str]
    licence: str


LAYOUTS = {
    "mmau": Layout(
        ("mmau-test-mini*.json", "mmau-test*.json"), "audio_id", "answer", ("choices",),
        {"task": "domain", "difficulty": "difficulty", "category": "category"}, "Apache-2.0",
    ),
    "mmau_pro": Layout(
        ("test*.parquet", "data/test*.parquet", "test*.json*"), "audio_path", "answer",
        ("choices",), {"category": "category"}, "see the set's card",
    ),
    "mmar": Layout(
        ("MMAR-meta.json*",), "audio_path", "answer", ("choices",),
        {"modality": "domain", "category": "category"}, "CC-BY-NC-4.0",
    ),
    "mmsu": Layout(
        ("question/mmsu.jsonl", "mmsu.jsonl"), "audio_path", "answer_gt",
        ("choice_a", "choice_b", "choice_c", "choice_d"),
        {"category": "domain", "task_name": "category"}, "see the set's card",
    ),
}  # fmt: skip


def find(folder: Path, layout: str | None = None) -> tuple[str, list[Path]]:
    """(layout, files) of a folder: all shards of the first pattern that is there.

    Raises:
        FileNotFoundError: it holds none of the known files.
    """
    for name in [layout] if layout else LAYOUTS:
        if name not in LAYOUTS:
            raise ValueError(f"--layout {name}: one of {', '.join(LAYOUTS)}")
        for pattern in LAYOUTS[name].files:
            if found := sorted(folder.glob(pattern)):
                return name, found
    wanted = "; ".join(f"{name}: {' or '.join(one.files)}" for name, one in LAYOUTS.items())
    raise FileNotFoundError(f"{folder}: no benchmark in it; looked for {wanted}")


def rows(folder: Path, layout: str | None = None) -> Iterator[Row | Skipped]:
    """One `choice` row a record."""
    name, files = find(folder, layout)
    for file in files:
        for number, record in _records(file):
            yield _row(record, f"{file}:{number}", folder, name)


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if file.suffix != ".parquet":
        yield from read_records(file)
        return
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(file).iter_batches(256):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _row(record: Mapping[str, Any], where: str, folder: Path, name: str) -> Row | Skipped:
    layout = LAYOUTS[name]
    for key in ("question", layout.audio, layout.answer, *layout.choices):
        if key not in record:
            raise ValueError(f"{where}: no {key!r}; a record of {name} has it")
    identity = f"{name}/{record.get('id', where.rsplit(':', 1)[1])}"
    sound = record[layout.audio]
    if isinstance(sound, list):
        if len(sound) != 1:
            return Skipped(identity, f"{len(sound)} clips in one question; the engine takes one")
        (sound,) = sound
    choices = _choices(record, layout)
    if len(choices) < 2:
        return Skipped(identity, "no options: an open question")
    if not all(choices):
        return Skipped(identity, "an empty option")
    clip = clip_of(folder, str(sound))
    if isinstance(clip, Skipped):
        return Skipped(f"{identity}: {sound}", clip.reason)
    shown = "\n".join(f"({chr(ord('A') + i)}) {text}" for i, text in enumerate(choices))
    text = f"{str(record['question']).strip()} {ASK}\n{shown}"
    metadata = {
        shown_as: str(record[key]) for key, shown_as in layout.categories.items() if record.get(key)
    }
    return Row(
        identity, ({"role": "user", "content": text},), clip[0], clip[1], Task.CHOICE,
        answer=_answer(str(record[layout.answer]), choices), choices=choices, source=name,
        language=str(record.get("language") or "en"), licence=layout.licence, split="test",
        metadata=metadata,
    )  # fmt: skip


def _choices(record: Mapping[str, Any], layout: Layout) -> tuple[str, ...]:
    if len(layout.choices) > 1:
        values = [record[key] for key in layout.choices]
    else:
        values = record[layout.choices[0]] or []
        values = json.loads(values) if isinstance(values, str) else list(values)
    return tuple(_unlettered(str(v), i) for i, v in enumerate(values) if v is not None)


def _unlettered(choice: str, index: int) -> str:
    """The option's text where the file writes its letter before it: `(A) rain`, `A. rain`."""
    letter = chr(ord("A") + index)
    text = choice.strip()
    for start in (f"({letter})", f"{letter}.", f"{letter})", f"{letter}:"):
        if text.startswith(start) and len(text) > len(start):
            return text[len(start) :].strip()
    return text


def _answer(answer: str, choices: Sequence[str]) -> str:
    """The right option's text; MMAU writes `(B) rain` in places, MMSU the text or the letter."""
    for i, choice in enumerate(choices):
        if _unlettered(answer, i) == choice:
            return choice
    return answer.strip()


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, required=True, help="folder of the benchmark")
        parser.add_argument("--layout", default=None, choices=tuple(LAYOUTS))

    run("choice benchmarks -> rows", lambda a: rows(a.source, a.layout), argv, arguments)


if __name__ == "__main__":
    main()

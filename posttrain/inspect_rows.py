"""`posttrain data check` and `data stats`: what is in a file of rows, and what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from posttrain.data.audio import audio_duration_s, load_audio
from posttrain.data.rows import Row, parse_row, read_records
from reward_models.timestamps import parse_spans

DURATION_SLACK_S = 0.1
MAX_SHOWN = 12
BARS = " ▏▎▍▌▋▊▉█"


@dataclass
class Findings:
    """Of one file.

    Attributes:
        rows: that could be read.
        problems: kind -> (line, what is wrong and what to do) of every one found.
    """

    rows: int = 0
    problems: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, line: int, what: str) -> None:
        self.problems[kind].append((line, what))

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "problems": {
                kind: [{"line": line, "what": what} for line, what in found]
                for kind, found in self.problems.items()
            },
        }


def check_rows(path: Path) -> Findings:
    """Reads every row and every clip of a file; finds all that is wrong, not the first.

    Raises:
        FileNotFoundError, ValueError: no such file; not JSON.
    """
    findings = Findings()
    seen: dict[tuple[str, ...], int] = {}
    clips: dict[str, float | str] = {}
    base_dir = path.resolve().parent
    for line, record in tqdm(_records(path, findings), desc="check", unit=" rows", disable=None):
        try:
            row = parse_row(record, where=f"{path}:{line}", base_dir=base_dir)
        except ValueError as error:
            findings.add("invalid row", line, str(error).removeprefix(f"{path}:{line}: "))
            continue
        findings.rows += 1
        for key in (("duplicate id", row.id), ("duplicate question", str(row.audio), _text(row))):
            if key in seen:
                findings.add(key[0], line, f"{row.id!r} stands on line {seen[key]} already")
            seen.setdefault(key, line)
        _check_clip(row, line, clips, findings)
        if row.duration_s and row.answer and parse_spans(row.answer, row.duration_s).packed:
            findings.add(
                "packed minutes suspected", line,
                f"{row.answer[:60]!r} in a clip of {row.duration_s:g} s; see repair_packed",
            )  # fmt: skip
    return findings


def _records(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    """As `read_records`; a line of JSONL that is not JSON is a finding."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from read_records(path)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                findings.add("not JSON", number, f"{error.msg}; one object a line")
                continue
            yield number, record


def _check_clip(row: Row, line: int, clips: dict[str, float | str], findings: Findings) -> None:
    """Readable, not silent, as long as the row says; every file is decoded once."""
    if row.audio is None:
        return
    if row.audio not in clips:
        try:
            load_audio(row.audio)
            clips[row.audio] = audio_duration_s(row.audio)
        except (ValueError, FileNotFoundError) as error:
            clips[row.audio] = str(error)
    found = clips[row.audio]
    if isinstance(found, str):
        findings.add("unusable audio", line, found)
    elif abs(found - (row.duration_s or 0.0)) > DURATION_SLACK_S:
        findings.add(
            "wrong duration", line,
            f"{row.audio} lasts {found:.2f} s, duration_s says {row.duration_s:.2f}",
        )  # fmt: skip


def _text(row: Row) -> str:
    return json.dumps([dict(message) for message in row.prompt], sort_keys=True)


def print_findings(path: Path, findings: Findings) -> int:
    """Counts and line numbers; 1 when something is wrong."""
    print(f"{path}: {findings.rows} rows")
    for kind, found in sorted(findings.problems.items()):
        print(f"\n{kind}: {len(found)}")
        for line, what in found[:MAX_SHOWN]:
            print(f"  line {line}: {what}")
        if len(found) > MAX_SHOWN:
            lines = ", ".join(str(line) for line, _ in found[MAX_SHOWN:])
            print(f"  and lines {lines}")
    if not findings.problems:
        print("nothing wrong found")
    return 1 if findings.problems else 0


def row_statistics(rows: Sequence[Row]) -> dict[str, Any]:
    """Hours (every clip once), languages, tasks, sources, span lengths in seconds."""
    clips = {row.audio: row.duration_s or 0.0 for row in rows if row.audio is not None}
    spans = [end - start for row in rows for start, end in row.target_spans if end > start]
    durations = list(clips.values())
    return {
        "rows": len(rows), "clips": len(clips), "hours": sum(durations) / 3600,
        "by_language": dict(Counter(row.language for row in rows).most_common()),
        "by_task": dict(Counter(row.task.value for row in rows).most_common()),
        "by_source": dict(Counter(row.source for row in rows).most_common()),
        "by_licence": dict(Counter(row.licence for row in rows).most_common()),
        "clip_s": _quantiles(durations), "span_s": _quantiles(spans),
        "span_histogram": histogram(spans), "clip_histogram": histogram(durations),
    }  # fmt: skip


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    names = ("min", "median", "p95", "max")
    return dict(zip(names, np.percentile(values, (0, 50, 95, 100)).tolist(), strict=True))


def histogram(values: Sequence[float], bins: int = 12) -> list[tuple[float, float, int]]:
    """(from, to, count) on a logarithmic scale; lengths span three orders of magnitude."""
    positive = [value for value in values if value > 0]
    if not positive:
        return []
    edges = np.geomspace(min(positive) * 0.999, max(positive) * 1.001, bins + 1)
    counts, _ = np.histogram(positive, edges)
    return [(float(edges[i]), float(edges[i + 1]), int(n)) for i, n in enumerate(counts)]


def bar(share: float, width: int = 32) -> str:
    """A bar of block characters, an eighth of a character fine."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + BARS[eighths % 8].strip()


def statistics_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Table and plots, for a terminal."""
    yield f"{facts['rows']} rows, {facts['clips']} clips, {facts['hours']:.2f} hours"
    for title, key in (("language", "by_language"), ("task", "by_task"), ("source", "by_source"),
                       ("licence", "by_licence")):  # fmt: skip
        yield f"\n{title}"
        for name, count in facts[key].items():
            shown = f"{name or '(none given)':<32.32}"
            yield f"  {shown} {count:>8}  {bar(count / facts['rows'])}"
    for title, key in (("spans", "span"), ("clips", "clip")):
        if quantiles := facts[f"{key}_s"]:
            yield (
                f"\n{title}, seconds: shortest {quantiles['min']:.2f}, median "
                f"{quantiles['median']:.2f}, 95 % below {quantiles['p95']:.2f}, longest "
                f"{quantiles['max']:.2f}"
            )
            most = max(count for _, _, count in facts[f"{key}_histogram"])
            for low, high, count in facts[f"{key}_histogram"]:
                yield f"  {low:>8.2f} to {high:<8.2f} {count:>8}  {bar(count / most)}"

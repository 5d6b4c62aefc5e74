"""Temporal chains of thought from a teacher: asked for, checked, and the best one of each row kept.

    rows --> teacher: K chains a row, and answers without the audio --> chunks/00000.json, ...
         --> repaired, judged against the labels, deduplicated --> rows.jsonl, nvidia.json, report

A chain is kept when its thought is closed and cites times, when the answer is right, and when the
cited times are true (`chain_grounding`). Rows whose answer a teacher gives without hearing the clip
are dropped: they teach guessing. Everything that is left out is counted under a reason.

What the teacher said lies in chunks that are written whole, always of the same rows with the same
seeds, so an interrupted run goes on without asking anything twice and ends with the same bytes.

Source: AF-Think-Time, "temporal audio chain of thought" (arXiv 2604.10905); rejection sampling as
in STaR (2203.14465).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from posttrain.data.audio import SAMPLE_RATE_HZ, write_audio
from posttrain.data.rows import Row, write_rows
from posttrain.data.thinking import split_thinking
from posttrain.types import ChainTeacher, Completion, Reward, RewardStatus, Task
from reward_models.chain import ChainGrounding
from reward_models.choice import Choice
from reward_models.grounding import TimestampGrounding
from reward_models.repetition import Repetition
from reward_models.timestamps import parse_spans, repair_packed
from reward_models.transcript import Transcript
from reward_models.translation import Translation

QUIET = 1e-4  # noise of -80 dB: what stands for silence, which decoders are right to refuse
REPORT_NAMES = {
    "truncated": "cut off at the token limit", "no thought": "thought missing or not closed",
    "no times": "thought cites no time", "wrong answer": "answer not right",
    "untrue times": "cited times not true", "no labels": "no labelled event to check times by",
    "too long": "too many words",
    "repetitive": "repeats itself", "duplicate": "said before in the same row",
    "no judge": "nothing to judge the answer by: no reference, no labels, or an open question",
}  # fmt: skip


REWARD_OF: dict[Task, Reward] = {
    Task.CHOICE: Choice(), Task.TRANSCRIPT: Transcript(), Task.TRANSLATION: Translation(),
}  # fmt: skip


@dataclass(frozen=True)
class ChainSettings:
    """How chains are asked for and judged.

    Attributes:
        num_chains: K, chains a row.
        min_answer: lowest score of the answer, 0 to 1 (IoU for times, 1 - error rate for text).
        min_true: lowest share of cited times that must be true.
        require_labels: reject chains of rows without labelled events; otherwise they are kept with
            no score of their times.
        max_words: of the thought.
        max_repetition: highest share of 4-grams said before.
        blind_samples: answers a row without audio; 0 leaves that check out.
        blind_share: share of them that must be right for the row to be dropped.
        chunk_rows: rows that are asked together, and written together.
    """

    num_chains: int = 8
    min_answer: float = 0.5
    min_true: float = 0.75
    require_labels: bool = True
    max_words: int = 1_000
    max_repetition: float = 0.5
    blind_samples: int = 4
    blind_share: float = 0.5
    chunk_rows: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """One chain after judgement: the text (repaired), its scores, and why it was rejected ("")."""

    text: str
    scores: dict[str, float] = field(default_factory=dict)
    rejected: str = ""
    repaired: bool = False

    @property
    def value(self) -> tuple[float, float]:
        """Order among kept chains: a better answer first, then truer times."""
        return self.scores["answer"], self.scores.get("true", 0.0)


def collect(rows: Sequence[Row], teacher: ChainTeacher, settings: ChainSettings, out: Path) -> None:
    """Asks the teacher about every row; chunks that are there already are not asked again.

    Raises:
        ValueError: the folder holds chunks of another teacher, other rows or other settings.
    """
    folder = out / "chunks"
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_other(out / "asked.json", rows, teacher.name, settings)
    silences = out / "silence"
    for number, part in tqdm(list(_chunks(rows, settings)), desc="chains", disable=None):
        path = folder / f"{number:05d}.json"
        if path.exists():
            continue
        said = teacher.chains(part, settings.num_chains, settings.seed)
        blind: Sequence[Sequence[Completion]] = [()] * len(part)
        if settings.blind_samples:
            silent = [_silenced(row, silences) for row in part]
            blind = teacher.chains(silent, settings.blind_samples, settings.seed + 1)
        records = [
            {
                "id": row.id,
                "chains": [_record(c) for c in chains],
                "blind": [_record(c) for c in no],
            }
            for row, chains, no in zip(part, said, blind, strict=True)
        ]
        _write_whole(path, json.dumps(records, ensure_ascii=False, indent=0))


def all_asked(rows: Sequence[Row], teacher: str, settings: ChainSettings, out: Path) -> bool:
    """Whether every chunk is there already.

    Raises:
        ValueError: as `collect`.
    """
    _refuse_other(out / "asked.json", rows, teacher, settings)
    numbers = [number for number, _ in _chunks(rows, settings)]
    return all((out / "chunks" / f"{number:05d}.json").exists() for number in numbers)


def asked_rows(
    rows: Sequence[Row], settings: ChainSettings, out: Path
) -> Iterator[tuple[Row, list[Completion], list[Completion]]]:
    """Every row with what was said about it, and what was said without the audio."""
    for number, part in _chunks(rows, settings):
        path = out / "chunks" / f"{number:05d}.json"
        records = json.loads(path.read_text(encoding="utf-8"))
        for row, record in zip(part, records, strict=True):
            if row.id != record["id"]:
                raise ValueError(f"{out}/chunks: row {record['id']!r} instead of {row.id!r}")
            said, blind = ([_completion(c) for c in record[key]] for key in ("chains", "blind"))
            yield row, said, blind


def choose(rows: Sequence[Row], settings: ChainSettings, out: Path) -> dict[str, Any]:
    """Judges what `collect` got; writes rows.jsonl, nvidia.json, report.json and report.md.

    Returns:
        the report.
    """
    kept: list[Row] = []
    reasons: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    words, cited, answers, repaired, asked = [], [], [], 0, 0
    for row, said, blind in asked_rows(rows, settings, out):
        judged = judge_all(row, said, settings)
        asked += len(judged)
        reasons.update(chain.rejected for chain in judged if chain.rejected)
        good = [chain for chain in judged if not chain.rejected]
        right = [(answer_score(row, c) or 0.0) >= settings.min_answer for c in blind]
        if not said:
            dropped["refused by the teacher"] += 1
        elif right and sum(right) / len(right) >= settings.blind_share:
            dropped["answerable without audio"] += 1
        elif not good:
            dropped["no chain kept"] += 1
        else:
            best = max(good, key=lambda chain: chain.value)
            facts = {"scores": best.scores, "kept_of": f"{len(good)}/{len(judged)}"}
            metadata = dict(row.metadata) | {"chain": facts}
            kept.append(replace(row, answer=best.text, metadata=metadata))
            words.append(len(split_thinking(best.text)[0].split()))
            cited.append(int(best.scores["cited"]))
            answers.append(best.scores["answer"])
            repaired += best.repaired
    report = {
        "rows": len(rows), "kept": len(kept), "kept_share": _share(len(kept), len(rows)),
        "dropped_rows": dict(dropped), "chains": asked, "rejected_chains": dict(reasons),
        "repaired_packed": repaired, "words_a_chain": _mean(words),
        "cited_times_a_chain": _mean(cited), "answer_score": _mean(answers),
    }  # fmt: skip
    write_rows(out / "rows.jsonl", kept)
    _write_whole(out / "nvidia.json", json.dumps(as_nvidia(kept), ensure_ascii=False, indent=1))
    _write_whole(out / "report.json", json.dumps(report, indent=1))
    _write_whole(out / "report.md", as_markdown(report))
    return report


def judge_all(row: Row, completions: Sequence[Completion], settings: ChainSettings) -> list[Judged]:
    """Every chain of a row, in the order given; a text that stood before is a duplicate."""
    judged, seen = [], set()
    for completion in completions:
        one = judge(row, completion, settings)
        key = " ".join(one.text.split())
        if not one.rejected and key in seen:
            one = replace(one, rejected="duplicate")
        seen.add(key)
        judged.append(one)
    return judged


def judge(row: Row, completion: Completion, settings: ChainSettings) -> Judged:
    """Repairs packed minutes, then applies the rules in order; the first that fails is named."""
    text = completion.text
    if row.duration_s is not None:
        text = repair_packed(text, row.duration_s)
    repaired = text != completion.text
    completion = replace(completion, text=text)
    if completion.truncated:
        return Judged(text, {}, "truncated", repaired)
    thought, answer = split_thinking(text)
    if not thought or not answer:
        return Judged(text, {}, "no thought", repaired)
    chain = ChainGrounding()(row, completion)
    spans = parse_spans(thought, row.duration_s).spans
    true = chain.breakdown.get("num_true", 0.0)
    checked = chain.breakdown.get("num_checked", 0.0)
    answered = answer_score(row, completion)
    if answered is None:
        return Judged(text, {}, "no judge", repaired)
    scores = {"answer": answered, "cited": float(len(spans))}
    labelled = any(event.label for event in row.events)
    if labelled:
        scores["true"] = true / checked if checked else 0.0
    repetition = -(Repetition()(row, completion).value or 0.0)
    rules = (
        ("no times", not spans),
        ("wrong answer", scores["answer"] < settings.min_answer),
        ("no labels", settings.require_labels and not labelled),
        ("untrue times", labelled and scores["true"] < settings.min_true),
        ("too long", len(thought.split()) > settings.max_words),
        ("repetitive", repetition > settings.max_repetition),
    )
    rejected = next((name for name, broken in rules if broken), "")
    return Judged(text, scores, rejected, repaired)


def answer_score(row: Row, completion: Completion) -> float | None:
    """How right the answer is, 0 to 1: IoU, accuracy, 1 - error rate or chrF, by the task.

    None where nothing can say: tasks without a right answer, rows without a reference or labels.
    """
    if row.task in REWARD_OF:
        value = REWARD_OF[row.task](row, completion).value
        return None if value is None else max(0.0, value)
    result = TimestampGrounding()(row, completion)
    if result.status is RewardStatus.UNSCORABLE:
        return None
    return float(result.breakdown.get("iou", result.breakdown.get("raw", 0.0)))


def as_nvidia(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows in the form of NVIDIA's releases (AF-Think, LongAudio)."""
    records = []
    for row in rows:
        turns = [{"from": _SPEAKER[m["role"]], "value": m["content"]} for m in row.prompt]
        first = next(turn for turn in turns if turn["from"] == "human")
        if row.audio is not None:
            first["value"] = f"<sound>\n{first['value']}"
        turns.append({"from": "gpt", "value": row.answer})
        records.append({
            "id": row.id, "sound": row.audio, "duration": row.duration_s, "conversations": turns,
        })  # fmt: skip
    return records


_SPEAKER = {"user": "human", "assistant": "gpt", "system": "system"}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Chains kept", "",
        f"{report['kept']} of {report['rows']} rows ({report['kept_share']:.0%}), from "
        f"{report['chains']} chains. A kept chain has {report['words_a_chain']:.1f} words and "
        f"cites {report['cited_times_a_chain']:.1f} times; its answer scores "
        f"{report['answer_score']:.3f}. {report['repaired_packed']} were repaired from packed "
        "minutes.", "", "| left out | count |", "|---|---|",
    ]  # fmt: skip
    for name, count in sorted(report["dropped_rows"].items()):
        lines.append(f"| rows: {name} | {count} |")
    for name, count in sorted(report["rejected_chains"].items()):
        lines.append(f"| chains: {REPORT_NAMES.get(name, name)} | {count} |")
    return "\n".join([*lines, ""])


def _chunks(rows: Sequence[Row], settings: ChainSettings) -> Iterator[tuple[int, Sequence[Row]]]:
    size = settings.chunk_rows
    for number, first in enumerate(range(0, len(rows), size)):
        yield number, rows[first : first + size]


def _silenced(row: Row, folder: Path) -> Row:
    """The row with a clip of its length, in whole seconds, in which nothing is heard."""
    if row.audio is None or row.duration_s is None:
        return row
    seconds = max(1, int(row.duration_s))
    path = folder / f"{seconds}.flac"
    if not path.exists():
        rng = np.random.default_rng(0)
        samples = rng.standard_normal(seconds * SAMPLE_RATE_HZ, dtype=np.float32)
        write_audio(path, QUIET * samples)
    return replace(row, audio=str(path), events=(), answer="", metadata={})


def _refuse_other(path: Path, rows: Sequence[Row], teacher: str, settings: ChainSettings) -> None:
    """What was asked, beside the chunks: they belong to it and to nothing else."""
    asked = {
        "teacher": teacher, "rows": _fingerprint(rows),
        **{k: v for k, v in asdict(settings).items()
           if k in ("num_chains", "blind_samples", "chunk_rows", "seed")},
    }  # fmt: skip
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(asked, indent=1))
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    for key, value in asked.items():
        if kept.get(key) != value:
            shown = "other rows" if key == "rows" else f"{key}={kept.get(key)}, now {value}"
            raise ValueError(f"{path}: begun with {shown}; set it back or take another folder")


def _fingerprint(rows: Sequence[Row]) -> str:
    """Of everything that a teacher or a judge sees of the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def _record(completion: Completion) -> dict[str, str]:
    return {"text": completion.text, "finish_reason": completion.finish_reason}


def _completion(record: dict[str, str]) -> Completion:
    return Completion((), (), record["text"], record["finish_reason"], 0)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0

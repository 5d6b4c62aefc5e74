"""What a person can browse: one answer with its clip, labels, cited times and terms.

rollouts.jsonl, held_out/*.json, scored.jsonl  +  rows  -->  items, as the page reads them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.rows import Row, read_rows
from posttrain.report.clips import Clips
from reward_models.timestamps import parse_spans

THOUGHT_END = "</think>"
Item = dict[str, Any]


def rollout_items(run: Path, rows: Mapping[str, Row], clips: Clips, limit: int) -> list[Item]:
    """Of rollouts.jsonl: whole groups of evenly chosen steps, the first and the last among them."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in read_lines(run / "rollouts.jsonl"):
        groups.setdefault((record["step"], record["group_id"]), []).append(record)
    items = []
    for group in evenly(list(groups.values()), limit):
        for record in group:
            row = rows.get(record["prompt_id"])
            items.append(
                item(
                    f"{record['group_id']} · {record['index']}", record["prompt"],
                    record["completion"], row, clips.number(record["audio"]),
                    score=record["reward"], terms=record["breakdown"], step=record["step"],
                    status=record["status"], reason=record["reason"],
                    truncated=record["finish_reason"] == "length", tokens=record["num_tokens"],
                )
            )  # fmt: skip
    return items


def held_out_items(record: Mapping[str, Any], rows: Mapping[str, Row], clips: Clips,
                   limit: int) -> list[Item]:  # fmt: skip
    """Of `held_out/before.json` or `after.json`: the answers of all its sources."""
    answers = [one for source, part in record.items() if source != "step" for one in part]
    items = []
    for one in spread(answers, limit):
        row = rows.get(one["row_id"])
        terms = {name: total / weight for name, (total, weight) in one["metrics"].items() if weight}
        items.append(
            item(
                one["row_id"], row.prompt if row else (), one["text"], row,
                clips.number(row.audio) if row else None, score=terms.get(one["metric"]),
                terms=terms, truncated=one["truncated"],
            )
        )  # fmt: skip
    return items


def scored_items(folder: Path, rows: Mapping[str, Row], clips: Clips, limit: int) -> list[Item]:
    """Of an evaluation's scored.jsonl."""
    items = []
    for one in spread(list(read_lines(folder / "scored.jsonl")), limit):
        row = rows[one["id"]]
        terms = {
            name: values[0] / values[1] for name, values in one["statistics"].items()
            if len(values) == 2 and values[1]
        }  # fmt: skip
        items.append(
            item(
                one["id"], row.prompt, one["text"], row, clips.number(row.audio),
                score=next(iter(terms.values()), None), terms=terms,
                status="scored" if one["statistics"] else "unscorable",
                reason=one.get("reason", ""), truncated=one["finish_reason"] == "length",
                tokens=one["num_tokens"], groups=one["groups"],
            )
        )  # fmt: skip
    return items


def item(
    name: str, prompt: Sequence[Mapping[str, Any]], text: str, row: Row | None, clip: int | None,
    *, score: float | None, terms: Mapping[str, float | None], truncated: bool,
    step: int | None = None, status: str = "scored", reason: str = "", tokens: int | None = None,
    groups: Mapping[str, str] | None = None,
) -> Item:  # fmt: skip
    """One answer; `cited` has [start_s, end_s, valid, first character, end, in the thought]."""
    duration_s = row.duration_s if row else None
    thought_end = text.rfind(THOUGHT_END)
    cited = [
        [round(s.start_s, 3), round(s.end_s, 3), s.valid, *s.char_range,
         s.char_range[0] < thought_end]
        for s in parse_spans(text, duration_s, form="grounding").spans
    ]  # fmt: skip
    query = row.query if row else None
    labels = [
        [round(e.start_s, 3), round(e.end_s, 3), e.label, query in (None, e.label)]
        for e in (row.events if row else ())
    ]
    question = next((str(m["content"]) for m in reversed(prompt) if m["role"] == "user"), "")
    return {
        "name": name, "question": question, "text": text, "cited": cited, "labels": labels,
        "clip": clip, "score": score, "terms": dict(terms), "step": step, "status": status,
        "reason": reason, "truncated": truncated, "tokens": tokens, "groups": dict(groups or {}),
        "reference": row.answer if row else "",
    }  # fmt: skip


def rows_of(recipe: Mapping[str, Any]) -> dict[str, Row]:
    """Id -> row of every file of rows that a recipe names and that is still there."""
    found: dict[str, Row] = {}
    for kind in ("train", "held_out", "reported"):
        for source in (recipe["data"].get(kind) or {}).values():
            path = Path(source["path"])
            if path.exists():
                try:
                    found |= {row.id: row for row in read_rows(path)}
                except ValueError:
                    continue  # pairs, not rows
    return found


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def evenly(groups: Sequence[list[Any]], limit: int) -> list[list[Any]]:
    """As many whole groups as hold at most `limit` entries, spread over all of them."""
    total = sum(map(len, groups))
    if total <= limit or not groups:
        return list(groups)
    return spread(groups, max(1, limit * len(groups) // total))


def spread(entries: Sequence[Any], count: int) -> list[Any]:
    """At most `count` entries at even distances, first and last included."""
    if len(entries) <= count:
        return list(entries)
    if count == 1:
        return [entries[-1]]
    last = len(entries) - 1
    return [entries[round(i * last / (count - 1))] for i in range(count)]

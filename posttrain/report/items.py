"""What a person can browse: one answer with its clip, labels, cited times and terms.

rollouts.jsonl, held_out/*.json, scored.jsonl  +  rows  -->  items, as the page reads them
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from posttrain.data.rows import Row, read_rows
from posttrain.report.clips import Clips
from reward_models.timestamps import parse_spans

THOUGHT_END = "</think>"
Item = dict[str, Any]
Rows = Mapping[str, Mapping[str, Row]]  # source -> id -> row


def rollout_items(run: Path, rows: Rows, clips: Clips, limit: int) -> list[Item]:
    """Of rollouts.jsonl: whole groups of evenly chosen steps, the first and the last among them.

    The file is read twice, and only the chosen lines are kept: it can hold gigabytes.
    """
    path = run / "rollouts.jsonl"
    sizes = Counter((record["step"], record["group_id"]) for record in read_lines(path))
    chosen = set(evenly(sizes, limit))
    kept = (r for r in read_lines(path) if (r["step"], r["group_id"]) in chosen)
    items = []
    for record in tqdm(
        kept, desc="rollouts", total=sum(sizes[group] for group in chosen), disable=None
    ):
        row = rows.get("train", {}).get(record["prompt_id"])
        items.append(
            item(
                f"{record['group_id']} · {record['index']}", record["prompt"],
                record["completion"], row, clips.number(record["audio"]), score=record["reward"],
                terms=record["breakdown"], step=record["step"], status=record["status"],
                reason=record["reason"], truncated=record["finish_reason"] == "length",
                tokens=record["num_tokens"],
            )
        )  # fmt: skip
    return items


def held_out_items(record: Mapping[str, Any], rows: Rows, clips: Clips, limit: int) -> list[Item]:
    """Of `held_out/before.json` or `after.json`: the answers of all its sources."""
    answers = [(s, one) for s, part in record.items() if s != "step" for one in part]
    items = []
    for source, one in tqdm(spread(answers, limit), desc="held-out answers", disable=None):
        row = rows.get(source, {}).get(one["row_id"])
        terms = {name: total / weight for name, (total, weight) in one["metrics"].items() if weight}
        items.append(
            item(
                one["row_id"], row.prompt if row else (), one["text"], row,
                clips.number(row.audio) if row else None, score=terms.get(one["metric"]),
                terms=terms, truncated=one["truncated"], groups={"source": source},
            )
        )  # fmt: skip
    return items


def scored_items(folder: Path, rows: Mapping[str, Row], clips: Clips, limit: int) -> list[Item]:
    """Of an evaluation's scored.jsonl."""
    items = []
    chosen = spread(list(read_lines(folder / "scored.jsonl")), limit)
    for one in tqdm(chosen, desc="answers", disable=None):
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


def rows_of(recipe: Mapping[str, Any]) -> tuple[Rows, list[str]]:
    """Rows of a recipe's files by source and id, and the files that could not be read.

    All training sources are one, "train", as their ids are one set; the others have their names.
    """
    found: dict[str, dict[str, Row]] = {}
    unread = []
    if recipe["kind"] == "dpo":  # its training files hold pairs
        recipe = {**recipe, "data": {**recipe["data"], "train": {}}}
    for kind in ("train", "held_out", "reported"):
        for name, source in (recipe["data"].get(kind) or {}).items():
            try:
                rows = {row.id: row for row in read_rows(source["path"])}
                found.setdefault("train" if kind == "train" else name, {}).update(rows)
            except (ValueError, OSError) as error:
                unread.append(str(error))
    return found, unread


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def evenly(sizes: Mapping[Any, int], limit: int) -> list[Any]:
    """As many whole groups as hold about `limit` entries, spread over all of them.

    Args:
        sizes: group -> entries, in order.
    """
    total = sum(sizes.values())
    if total <= limit:
        return list(sizes)
    return spread(list(sizes), max(1, limit * len(sizes) // total))


def spread(entries: Sequence[Any], count: int) -> list[Any]:
    """At most `count` entries at even distances, first and last included."""
    if len(entries) <= count:
        return list(entries)
    if count == 1:
        return [entries[-1]]
    last = len(entries) - 1
    return [entries[round(i * last / (count - 1))] for i in range(count)]

"""`posttrain compare A B`: paired differences of two evaluations over the rows that both have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from posttrain.evaluate.row_statistics import LOWER_IS_BETTER, aggregate, paired

BOOTSTRAP_SAMPLES = 2_000


def compare_evaluations(a: Path, b: Path) -> dict[str, Any]:
    """Metric -> both values and B - A with its 95 % interval, on the rows that both have scored.

    Raises:
        FileNotFoundError: a folder holds no finished evaluation.
        ValueError: two suites, or no row in common.
    """
    one, other = _read(a), _read(b)
    suites = {one["scores"]["suite"], other["scores"]["suite"]}
    if len(suites) > 1:
        raise ValueError(f"{a} and {b}: suites {sorted(suites)}; compare two of one suite")
    shared = [identity for identity in one["rows"] if identity in other["rows"]]
    if not shared:
        raise ValueError(f"{a} and {b}: not one scored row in common; evaluate the same rows")
    names = dict.fromkeys(name for i in shared for name in one["rows"][i])
    metrics = {}
    for name in names:
        pairs = [
            (one["rows"][i][name], other["rows"][i][name])
            for i in shared
            if name in one["rows"][i] and name in other["rows"][i]
        ]
        if not pairs:
            continue
        before, after = (np.asarray(side, dtype=np.float64) for side in zip(*pairs, strict=True))
        mean, low, high = paired(name, before, after, BOOTSTRAP_SAMPLES)
        metrics[name] = {
            "a": aggregate(name, before), "b": aggregate(name, after), "n": len(pairs),
            "paired_diff": {"mean": mean, "ci95": [low, high]},
            "better": "lower" if name in LOWER_IS_BETTER else "higher",
        }  # fmt: skip
    return {
        "suite": suites.pop(), "a": {"path": str(a), "model": one["scores"]["model"]},
        "b": {"path": str(b), "model": other["scores"]["model"]}, "n": len(shared),
        "only_in_a": len(one["rows"]) - len(shared), "only_in_b": len(other["rows"]) - len(shared),
        "metrics": metrics,
    }  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / "scores.json").exists():
        raise FileNotFoundError(f"{folder}: no scores.json; run `posttrain eval` to its end first")
    lines = (folder / "scored.jsonl").read_text(encoding="utf-8").split("\n")
    records = map(json.loads, filter(None, lines))
    rows: Mapping[str, Any] = {r["id"]: r["statistics"] for r in records if r["statistics"]}
    return {"scores": json.loads((folder / "scores.json").read_text()), "rows": rows}


def show(result: Mapping[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 120  # a pipe has no width; 80 would break every line
    table = Table(title=f"{result['suite']}: B - A on {result['n']} rows that both have scored")
    for column in ("metric", "A", "B", "B - A", "95 %", "n", "B is"):
        table.add_column(column, justify="left" if column in ("metric", "B is") else "right")
    for name, m in result["metrics"].items():
        low, high = m["paired_diff"]["ci95"]
        table.add_row(
            name, f"{m['a']:.3g}", f"{m['b']:.3g}", f"{m['paired_diff']['mean']:+.3g}",
            f"{low:+.3g} to {high:+.3g}", str(m["n"]), verdict(low, high, m["better"]),
        )  # fmt: skip
    console.print(f"A: {result['a']['model']}  ({result['a']['path']})")
    console.print(f"B: {result['b']['model']}  ({result['b']['path']})")
    console.print(table)
    for side in ("a", "b"):
        if result[f"only_in_{side}"]:
            console.print(f"{result[f'only_in_{side}']} rows are scored in {side.upper()} alone")


def verdict(low: float, high: float, better: str) -> str:
    """ "better", "worse", or "not told apart" where the interval holds 0."""
    if low <= 0 <= high:
        return "not told apart"
    return "better" if (low > 0) == (better == "higher") else "worse"

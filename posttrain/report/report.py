"""`posttrain report`: a run, a ladder or an evaluation as one HTML file that needs no network.

    summary.json, metrics.jsonl, rollouts.jsonl, held_out/ | scores.json, scored.jsonl
        --> tables, figures, items with clips --> report.html: data as JSON, one script, one style

Texts of models and rows reach the page as JSON and are set as text, never as markup.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain.data.rows import read_rows
from posttrain.evaluate.row_statistics import LOWER_IS_BETTER
from posttrain.report import figures, items
from posttrain.report.clips import Clips
from posttrain.train.environment import hardware

MIB = 2**20
Cells = Sequence[Sequence[str]]


@dataclass
class Page:
    """What the page shows, from top to bottom.

    Attributes:
        facts: (name, text) pairs under the title.
        tables: (title, header, rows).
        figures: as `figures` makes them, by section.
        collections: name -> items to browse.
    """

    title: str
    lead: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[tuple[str, Sequence[str], Cells]] = field(default_factory=list)
    figures: dict[str, list[figures.Figure]] = field(default_factory=dict)
    collections: dict[str, list[items.Item]] = field(default_factory=dict)


def write_report(
    source: Path, out: Path | None = None, *, limit: int = 1000, audio_mib: float = 12.0
) -> Path:
    """Writes the page beside what it shows, or to `out`.

    Args:
        limit: answers to browse, at most.
        audio_mib: of embedded audio as it stands in the page; clips beyond are links.

    Raises:
        FileNotFoundError: neither a run nor an evaluation.
    """
    out = out or source / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    clips = Clips(round(audio_mib * MIB), out.parent.absolute())
    if (source / "scores.json").exists():
        page = evaluation_page(source, clips, limit)
    elif (source / "recipe.yaml").exists():
        page = run_page(source, clips, limit)
    else:
        raise FileNotFoundError(
            f"{source}: neither a run (recipe.yaml) nor an evaluation (scores.json)"
        )
    if clips.linked:
        page.facts.append((
            "Audio", f"{clips.linked} of {len(clips.records)} clips are links to their files: they "
            f"are long, or beyond the {audio_mib:g} MiB that the page embeds (--audio-mib)",
        ))  # fmt: skip
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(render(page, clips), encoding="utf-8")
    os.replace(partial, out)
    return out


def run_page(run: Path, clips: Clips, limit: int) -> Page:
    """Of a finished or running `posttrain run`."""
    recipe: Any = OmegaConf.to_container(OmegaConf.load(run / "recipe.yaml"), resolve=True)
    summary, environment = _json(run / "summary.json"), _json(run / "environment.json")
    state = "" if summary else "Not finished yet: this is how far it came. "
    page = Page(run.name, f"{state}{_verdict(summary)}")
    page.facts = [
        ("Kind", str(recipe["kind"])), ("Started from", str(recipe["model"]["path"])),
        ("Seed", str(recipe["seed"])), ("Folder", str(run)),
    ]  # fmt: skip
    if environment:
        page.facts.append(("Ran on", hardware(environment)))
        page.facts.append(("Commit", str(environment.get("commit") or "not recorded")))
    if summary.get("wall_s"):
        page.facts.append(("Minutes", f"{summary['wall_s'] / 60:.1f}"))
    _add_gains(page, summary)
    if gates := summary.get("gates"):
        page.tables.append((
            "Gates", ("gate", "metric", "before", "after", "outcome"),
            [(g["name"], f"{g['metric']} of {g['source']}", _number(g["before"]),
              _number(g["after"]), "passed" if g["passed"] else "failed: " + "; ".join(g["broken"]))
             for g in gates],
        ))  # fmt: skip
    metrics = list(items.read_lines(run / "metrics.jsonl"))
    if metrics:
        page.figures["Training"] = figures.training_figures(metrics)
    rows, unread = items.rows_of(recipe)
    page.facts += [("Rows without questions and labels here", reason) for reason in unread]
    if found := items.rollout_items(run, rows, clips, limit):
        page.collections["Rollouts while training"] = found
    for when in ("after", "before"):
        if record := _json(run / "held_out" / f"{when}.json"):
            name = f"Held-out answers {when} training"
            page.collections[name] = items.held_out_items(record, rows, clips, limit // 4)
    return page


def evaluation_page(folder: Path, clips: Clips, limit: int) -> Page:
    """Of a finished `posttrain eval`."""
    scores = _json(folder / "scores.json")
    asked = scores["asked"]
    main = _main(scores)
    page = Page(f"{scores['suite']}: {Path(scores['model']).name}", _evaluation_lead(scores))
    sampling = asked["sampling"]
    page.facts = [
        ("Model", scores["model"]), ("Rows", f"{scores['n']}, {scores['failed']} without a score"),
        ("Sampling", f"temperature {sampling['temperature']:g}, at most {sampling['max_tokens']} "
         f"tokens, seed {sampling['seed']}"),
        ("Engine", f"{asked['engine']}, {asked['dtype']}"),
        ("Prompt of the first row", str(asked["example_prompt"][-1]["content"])),
    ]  # fmt: skip
    if scores["judge"]:
        page.facts.append(("Judge", scores["judge"]))
    page.facts += [(f"Signature of {name}", text) for name, text in scores["signatures"].items()]
    page.tables.append(("Scores", ("metric", "value", "95 % interval", "n"), [
        (_arrowed(name), _number(m["value"]), f"{_number(m['ci95'][0])} to {_number(m['ci95'][1])}",
         str(m["n"])) for name, m in scores["metrics"].items()
    ] + [(one["metric"], _number(one["value"]), f"published: {one['model']}", "")
         for one in scores["published"]]))  # fmt: skip
    failed = list(items.read_lines(folder / "failed.jsonl"))
    if failed:
        page.tables.append((
            f"Rows without a score ({len(failed)})", ("row", "reason"),
            [(one["id"], one["reason"]) for one in failed[:100]],
        ))  # fmt: skip
    if main and "cell" in scores["groups"]:
        page.figures["Robustness"] = figures.heat_map(scores["groups"]["cell"], main)
    if main and (grouped := figures.group_figures(scores["groups"], main)):
        page.figures["By group"] = grouped
    rows = {row.id: row for row in read_rows(folder / "rows.jsonl")}
    page.collections["Answers"] = items.scored_items(folder, rows, clips, limit)
    return page


def _add_gains(page: Page, summary: Mapping[str, Any]) -> None:
    """Every comparison of the summary: stages of a ladder, or before and after of a run."""
    compared: list[tuple[str, str, float | None, float, Mapping[str, Any], Any]] = []
    for stage in summary.get("stages", ()):
        if "paired_diff" in stage:
            metric = summary["metric"]
            compared.append((stage["name"], metric, stage["before"][metric], stage["score"],
                             stage["paired_diff"], summary["n"]))  # fmt: skip
    sources = {"held out": summary.get("held_out"), **summary.get("by_source", {}),
               **summary.get("reported", {})}  # fmt: skip
    for name, record in sources.items():
        if record and "paired_diff" in record:
            metric = record["metric"]
            compared.append((name, metric, record["before"][metric], record["after"][metric],
                             record["paired_diff"], record["n"]))  # fmt: skip
    if not compared:
        return
    page.tables.append((
        "Stages" if "stages" in summary else "Before and after",
        ("rows" if "stages" not in summary else "stage", "metric", "before", "after",
         "paired difference, 95 %", "n"),
        [(name, _arrowed(metric), _number(before), _number(after),
          f"{d['mean']:+.3f} [{d['ci95'][0]:+.3f}, {d['ci95'][1]:+.3f}]", str(n))
         for name, metric, before, after, d, n in compared],
    ))  # fmt: skip
    page.figures["Gains"] = [figures.gains_figure(
        [(name, d["mean"], *d["ci95"]) for name, _, _, _, d, _ in compared]
    )]  # fmt: skip


def _verdict(summary: Mapping[str, Any]) -> str:
    record = summary.get("held_out")
    if record and "paired_diff" in record:
        metric, (low, high) = record["metric"], record["paired_diff"]["ci95"]
        better = (low > 0) != (metric in LOWER_IS_BETTER) and not low <= 0 <= high
        outcome = "no difference shown" if low <= 0 <= high else "better" if better else "worse"
        return (
            f"Held-out {metric} {_number(record['before'][metric])} → "
            f"{_number(record['after'][metric])}, paired {record['paired_diff']['mean']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] on {record['n']} rows, greedy: {outcome}."
        )
    if stages := summary.get("stages"):
        names = " → ".join(f"{stage['name']} {_number(stage['score'])}" for stage in stages)
        return f"{summary['metric']} on {summary['n']} held-out rows, greedy: {names}."
    return ""


def _evaluation_lead(scores: Mapping[str, Any]) -> str:
    name = _main(scores)
    if name is None:
        return "No row has a score."
    metric = scores["metrics"][name]
    low, high = metric["ci95"]
    value, n = _number(metric["value"]), metric["n"]
    lead = f"{name} {value}, 95 % {_number(low)} to {_number(high)}, n = {n}."
    cells = {c: m[name] for c, m in scores["groups"].get("cell", {}).items() if name in m}
    if len(cells) > 1:
        best, worst = (f(cells, key=lambda c: cells[c]["value"]) for f in (max, min))
        lead += (
            f" Highest in {best} ({_number(cells[best]['value'])}), lowest in {worst} "
            f"({_number(cells[worst]['value'])})."
        )
    return lead


def _main(scores: Mapping[str, Any]) -> str | None:
    """The suite's main metric where the evaluation has it."""
    metrics = scores["metrics"]
    return scores["main"] if scores["main"] in metrics else next(iter(metrics), None)


def render(page: Page, clips: Clips) -> str:
    """The whole file."""
    from plotly.offline import get_plotlyjs

    def own(name: str) -> str:
        return files("posttrain.report").joinpath(name).read_text(encoding="utf-8")

    data = {"figures": page.figures, "collections": page.collections, "clips": clips.records}
    facts = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in page.facts
    )
    sections = {
        "TITLE": _text(page.title), "LEAD": _text(page.lead), "FACTS": facts,
        "TABLES": "".join(_table(*table) for table in page.tables),
        "FIGURES": "".join(_figure_places(*entry) for entry in page.figures.items()),
        "BROWSER_HIDDEN": "" if page.collections else "hidden", "STYLE": own("page.css"),
        "DATA": _json_in_html(data), "PLOTLY": get_plotlyjs().replace("</script", "<\\/script"),
        "SCRIPT": own("page.js"),
    }  # fmt: skip
    parts = own("page.html").split("@@")  # text, NAME, text, NAME, ...: nothing is replaced twice
    return "".join(sections[part] if i % 2 else part for i, part in enumerate(parts))


def _table(title: str, header: Sequence[str], rows: Cells) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )  # fmt: skip
    label = _text(title)
    return (
        f'<section><h2>{label}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{label}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></section>"
    )


def _figure_places(section: str, drawn: Sequence[figures.Figure]) -> str:
    places = "".join(
        f"<figure><figcaption><b>{_text(one['title'])}</b> {_text(one['note'])}</figcaption>"
        f'<div class="plot" role="img" aria-label="{_text(one["title"])}: {_text(one["note"])}" '
        f'data-section="{_text(section)}" data-number="{i}"></div></figure>'
        for i, one in enumerate(drawn)
    )
    return f'<section><h2>{_text(section)}</h2><div class="plots">{places}</div></section>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _json_in_html(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"),
                      default=str)  # fmt: skip
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _arrowed(metric: str) -> str:
    return f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

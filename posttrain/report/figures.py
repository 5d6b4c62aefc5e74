"""Figures of a run or an evaluation, as Plotly reads them.

A figure is {"title", "note", "data", "layout"}: `note` says how to read it, for everybody and for
screen readers. Colours are written "c0".."c7" and "muted", and become the theme's in the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.evaluate.row_statistics import LOWER_IS_BETTER

Figure = dict[str, Any]
NUM_COLOURS = 8
# title, note, metrics (a trailing * takes all that begin so), options
CHARTS: tuple[tuple[str, str, tuple[str, ...], dict[str, Any]], ...] = (
    ("Loss", "Training loss; near 0 by construction when on-policy.",
     ("train/loss", "train/nll"), {}),
    ("Held-out metrics while training", "Measured on rows that do not train.", ("held_out/*",), {}),
    ("KL and entropy", "Nats a token. KL: how far the policy moved from its start. A jump in it, "
     "or entropy falling to 0, means trouble.",
     ("train/kl", "train/entropy", "train/teacher_kl"), {}),
    ("Gradient norm and clipping", "Before clipping; and the share of tokens where the ratio was "
     "clipped.", ("train/grad_norm", "train/clip_ratio"), {}),
    ("Length of completions", "Tokens, mean of a step.", ("rollout/completion_tokens",), {}),
    ("Truncated completions and groups that teach nothing", "Shares of the step. Groups whose "
     "completions all score the same give no gradient.",
     ("rollout/truncated", "reward/zero_variance_groups"), {"range": [0, 1]}),
    ("Engine against learner", "|Log-probability difference| of the sampled tokens, nats, on a "
     "logarithmic axis. A step change means the engine does not serve the learner's weights.",
     ("engine/logprob_diff_mean", "engine/logprob_diff_max"), {"log": True}),
    ("Learning rate", "Of each step.", ("train/learning_rate",), {}),
)  # fmt: skip


def training_figures(metrics: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Of metrics.jsonl: the reward and its terms, then `CHARTS`, then where the time went."""
    known = dict.fromkeys(k for line in metrics for k, v in line.items() if _is_number(v))
    figures = []
    if "reward/mean" in known:
        figures.append(_reward(metrics))
    terms = [k for k in known if k.startswith("reward/") and k not in NOT_TERMS]
    terms.sort(key=lambda name: (name.count("/") > 1, -_spread(name, metrics)))
    if terms:
        figures.append(_lines(
            "Reward terms", "Each reward and each term of its breakdown, mean of a step. Click a "
            "name in the legend to show or hide it.", terms, metrics,
            {"shown": 4, "prefix": "reward/"},
        ))  # fmt: skip
    for title, note, names, options in CHARTS:
        matched = [k for k in known if any(_matches(k, name) for name in names)]
        if matched:
            figures.append(_lines(title, note, matched, metrics, options))
    seconds = [k for k in known if k.endswith("/seconds")]
    if seconds:
        figures.append(_time_split(seconds, metrics))
    return figures


NOT_TERMS = {
    "reward/mean", "reward/std", "reward/seconds", "reward/errored", "reward/zero_variance_groups"
}  # fmt: skip


def _reward(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [m["step"] for m in metrics if _is_number(m.get("reward/mean"))]
    mean = [m["reward/mean"] for m in metrics if _is_number(m.get("reward/mean"))]
    std = [m.get("reward/std") or 0.0 for m in metrics if _is_number(m.get("reward/mean"))]
    band = {
        "x": [*steps, *reversed(steps)], "fill": "toself", "fillcolor": "c0", "opacity": 0.18,
        "y": [m + s for m, s in zip(mean, std, strict=True)]
        + [m - s for m, s in zip(reversed(mean), reversed(std), strict=True)],
        "line": {"width": 0}, "name": "mean ± standard deviation", "hoverinfo": "skip",
        "type": "scatter", "mode": "lines",
    }  # fmt: skip
    line = _line("mean", steps, mean, 0)
    return _figure("Reward", "Mean over the step's completions, and their spread. It should rise; "
                   "the spread should not vanish.", [band, line], "step")  # fmt: skip


def _lines(
    title: str, note: str, names: Sequence[str], metrics: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> Figure:  # fmt: skip
    data = []
    for i, name in enumerate(names):
        points = [(m["step"], m[name]) for m in metrics if _is_number(m.get(name))]
        short = name.removeprefix(options.get("prefix", ""))
        line = _line(short, [x for x, _ in points], [y for _, y in points], i)
        if i >= options.get("shown", NUM_COLOURS):
            line["visible"] = "legendonly"
        data.append(line)
    axis: dict[str, Any] = {"type": "log"} if options.get("log") else {}
    if "range" in options:
        axis["range"] = options["range"]
    figure = _figure(title, note, data, "step", axis)
    figure["layout"]["height"] += 14 * max(0, len(data) - 4)  # the legend stands below
    return figure


def _time_split(names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [m["step"] for m in metrics if any(_is_number(m.get(name)) for name in names)]
    data = [
        {
            "type": "bar", "name": name.removesuffix("/seconds"), "x": steps,
            "y": [m.get(name) or 0.0 for m in metrics if m["step"] in set(steps)],
            "marker": {"color": f"c{i % NUM_COLOURS}"},
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    figure = _figure("Where the time went", "Seconds of each step.", data, "step")
    figure["layout"]["barmode"] = "stack"
    return figure


def gains_figure(rows: Sequence[tuple[str, float, float, float]]) -> Figure:
    """(name, difference, low, high) of every comparison, the first on top."""
    names = [name for name, *_ in rows]
    means = [mean for _, mean, _, _ in rows]
    trace = {
        "type": "scatter", "mode": "markers", "x": means, "y": names,
        "marker": {"color": "c0", "size": 11},
        "error_x": {
            "type": "data", "symmetric": False, "color": "c0", "thickness": 2,
            "array": [high - mean for _, mean, _, high in rows],
            "arrayminus": [mean - low for _, mean, low, _ in rows],
        },
    }  # fmt: skip
    figure = _figure(
        "Paired differences", "After - before on the same rows, with the 95 % interval. A bar "
        "that crosses 0 shows no difference.", [trace], "difference",
    )  # fmt: skip
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
    figure["layout"]["height"] = 140 + 44 * len(rows)
    figure["layout"]["showlegend"] = False
    return figure


def group_figures(groups: Mapping[str, Mapping[str, Any]], metric: str) -> list[Figure]:
    """A metric by language, task, ...: bars with intervals."""
    figures = []
    for key, values in groups.items():
        known = {value: m[metric] for value, m in values.items() if metric in m}
        if key == "cell" or not known:
            continue
        trace = {
            "type": "bar", "x": list(known), "y": [m["value"] for m in known.values()],
            "marker": {"color": "c0"}, "name": metric,
            "customdata": [m["n"] for m in known.values()],
            "hovertemplate": "%{x}: %{y:.3f} (n = %{customdata})<extra></extra>",
            "error_y": {
                "type": "data", "symmetric": False, "color": "muted",
                "array": [m["ci95"][1] - m["value"] for m in known.values()],
                "arrayminus": [m["value"] - m["ci95"][0] for m in known.values()],
            },
        }  # fmt: skip
        figures.append(_figure(f"{metric} by {key}", "With 95 % intervals.", [trace], key))
    return figures


def heat_map(cells: Mapping[str, Mapping[str, Any]], metric: str) -> list[Figure]:
    """One map of length against noise for each kind of music; cells show value and n."""
    parts = [(*cell.split(" / "), m[metric]) for cell, m in cells.items() if metric in m]
    figures = []
    for music in dict.fromkeys(part[2] for part in parts):
        known = {(length, noise): m for length, noise, kind, m in parts if kind == music}
        lengths = list(dict.fromkeys(length for length, _ in known))
        noises = list(dict.fromkeys(noise for _, noise in known))
        values, texts = [], []
        for length in lengths:
            line = [known.get((length, noise)) for noise in noises]
            values.append([m["value"] if m else None for m in line])
            texts.append([
                f"{m['value']:.2f}<br>{m['ci95'][0]:.2f}–{m['ci95'][1]:.2f}<br>n = {m['n']}"
                if m else "" for m in line
            ])  # fmt: skip
        best = [v for line in values for v in line if v is not None]
        trace = {
            "type": "heatmap", "x": noises, "y": lengths, "z": values, "text": texts,
            "texttemplate": "%{text}", "colorscale": "Cividis", "zmin": 0,
            "zmax": max([1.0, *best]) if metric not in ("miou", "event_f1") else 1,
            "reversescale": metric in LOWER_IS_BETTER, "xgap": 2, "ygap": 2, "showscale": False,
            "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>",
        }  # fmt: skip
        figure = _figure(
            f"{metric}, {music}", "Length of the recording against the signal-to-noise ratio; each "
            "cell holds the value, its 95 % interval and the number of questions.", [trace],
            "noise",
        )  # fmt: skip
        figure["layout"]["yaxis"] |= {"autorange": "reversed", "automargin": True}
        figure["layout"]["height"] = 140 + 78 * len(lengths)
        figures.append(figure)
    return figures


def _line(name: str, x: Sequence[Any], y: Sequence[float], colour: int) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers" if len(x) < 40 else "lines", "name": name,
        "x": list(x), "y": list(y), "marker": {"size": 5},
        "line": {"color": f"c{colour % NUM_COLOURS}", "width": 2,
                 "dash": ("solid", "dash", "dot")[colour // NUM_COLOURS % 3]},
    }  # fmt: skip


def _figure(
    title: str, note: str, data: list[dict[str, Any]], x_title: str,
    y_axis: Mapping[str, Any] | None = None,
) -> Figure:  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": x_title}, "automargin": True},
        "yaxis": dict(y_axis or {}), "height": 320,
    }  # fmt: skip
    return {"title": title, "note": note, "data": data, "layout": layout}


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _spread(name: str, metrics: Sequence[Mapping[str, Any]]) -> float:
    """Standard deviation over steps: what does not move is shown last."""
    return float(np.std([m[name] for m in metrics if _is_number(m.get(name))]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

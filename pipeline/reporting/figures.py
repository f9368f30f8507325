"""The report's pictures: one function for each, which returns a matplotlib Figure and keeps no state.

A Figure is drawn in the colours of the light scheme. `to_svg` replaces each colour by a CSS variable of the page, so
that one picture serves both the light and the dark scheme; `to_png` keeps the colours.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from pipeline.reporting.results import Race

# CSS variable -> (light, dark). `s…`: one for each method; `d…`: an ordered scale, for depths.
PALETTE = {
    "ink": ("#1b1f24", "#e8eaed"),
    "soft": ("#5d6570", "#9ba3ae"),
    "rule": ("#dfe2e6", "#333940"),
    "s0": ("#1f5fb4", "#74aefc"),
    "s1": ("#c4560a", "#f59b52"),
    "s2": ("#0b8069", "#45c4a8"),
    "s3": ("#7d4bb3", "#bd9bf5"),
    "s4": ("#78808a", "#8f98a3"),
    "s5": ("#b42d63", "#f27dab"),
    "s6": ("#77740d", "#cbc24d"),
    "s7": ("#a3271f", "#f4847b"),
    "d0": ("#86b6ea", "#39689e"),
    "d1": ("#4f94d8", "#558dca"),
    "d2": ("#2673c0", "#7db0e6"),
    "d3": ("#12549a", "#abcef5"),
    "d4": ("#093466", "#dbeaff"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
INK, SOFT, RULE = LIGHT["ink"], LIGHT["soft"], LIGHT["rule"]
SERIES = [name for name in PALETTE if re.fullmatch(r"s\d", name)]
DEPTHS = [name for name in PALETTE if re.fullmatch(r"d\d", name)]

STYLE = {
    "font.size": 11.5,
    "axes.titlesize": 11.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, with its size in the page's pixels, of which an SVG has 72 to the inch."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def series_colors(methods: Sequence[str]) -> dict[str, str]:
    """A palette name for each method, by its position in the list."""
    return {method: SERIES[i % len(SERIES)] for i, method in enumerate(methods)}


@matplotlib.rc_context(STYLE)
def search_figure(
    search: pd.DataFrame, best: Mapping[int, Mapping[str, Any]], across: str, lines: str | None
) -> Figure:
    """Draw validation accuracy (%) over the searched key `across`, with a line for each value of the key `lines`.

    A thick line is the mean over splits, thin lines are the splits; with one split, bars are 95% intervals. Over other
    searched keys the best accuracy is shown. A ring marks each split's choice in `best`.
    """
    figure = new_figure(560, 310)
    axes = figure.subplots()
    keys = ["split_seed", *filter(None, [lines, across])]
    trials = search.sort_values("accuracy", ascending=False).drop_duplicates(keys).sort_values(keys)
    values = sorted(trials[lines].unique()) if lines else [None]
    for i, value in enumerate(values):
        shade = DEPTHS[round(i * (len(DEPTHS) - 1) / max(1, len(values) - 1))] if lines else "s0"
        own = trials[trials[lines] == value] if lines else trials
        name = f"{lines} {value}" if lines else "mean over splits"
        _search_line(axes, own, across, name, LIGHT[shade], "osD^v"[i % 5])
    chosen = [(choice[across], choice["accuracy"]) for choice in best.values()]
    axes.plot(*zip(*chosen, strict=True), "o", ms=13, mfc="none", mec=INK, mew=1.3, label="chosen")
    title = "η, the share of the sketch in each step" if across == "eta" else across
    axes.set(xlabel=title, ylabel="validation accuracy, %")
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2, handletextpad=0.4, labelcolor=INK)
    return figure


def _search_line(axes: Axes, trials: pd.DataFrame, across: str, label: str, color: str, marker: str) -> None:
    """Draw the mean over splits of some trials, and the splits themselves (or, with one split, its intervals)."""
    mean = trials.groupby(across)["accuracy"].mean()
    axes.plot(mean.index, mean, marker=marker, ms=5, color=color, label=label)
    if trials["split_seed"].nunique() == 1:
        bars = {"fmt": "none", "ecolor": color, "elinewidth": 1, "alpha": 0.7}
        axes.errorbar(trials[across], trials["accuracy"], trials["ci95"], **bars)
        return
    for _, split in trials.groupby("split_seed"):
        axes.plot(split[across], split["accuracy"], color=color, lw=0.8, alpha=0.45)


@matplotlib.rc_context(STYLE)
def curve_figure(curves: pd.DataFrame, column: str, title: str, colors: Mapping[str, str]) -> Figure:
    """Draw one training quantity over the groups seen, with a line for each method and split.

    A line is a running mean over a twentieth of the training, since one group's loss says little. A method whose
    values are all zero, because it has no such loss, gets no line.
    """
    figure = new_figure(330, 220)
    axes = figure.subplots()
    for (method, _), run in curves.groupby(["method", "split_seed"], sort=False):
        if not run[column].any():
            continue
        smooth = run[column].rolling(max(1, len(run) // 20), min_periods=1).mean()
        axes.plot(run["groups"], smooth, color=LIGHT[colors[method]], lw=1.3, alpha=0.85)
    axes.set_title(title, loc="left")
    axes.set_xlabel("groups seen")
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure


@matplotlib.rc_context(STYLE)
def distribution_figure(
    histogram: pd.DataFrame, means: Mapping[str, float], labels: Mapping[str, str], colors: Mapping[str, str]
) -> Figure:
    """Draw how the test groups' accuracies (%) spread: for each method a histogram, with a line at the mean.

    `histogram` has the columns method, accuracy (the centre of a bin; at least two bins) and groups.
    """
    methods = [method for method in labels if method in means]
    figure = new_figure(560, 40 + 56 * len(methods))
    rows = figure.subplots(len(methods), sharex=True, sharey=True, squeeze=False)[:, 0]
    width = np.diff(np.unique(histogram["accuracy"])[:2]).item()
    for axes, method in zip(rows, methods, strict=True):
        bins = histogram[histogram["method"] == method]
        axes.bar(bins["accuracy"], bins["groups"], width * 0.9, color=LIGHT[colors[method]])
        axes.axvline(means[method], color=INK, lw=1.2)
        axes.text(0.0, 0.95, labels[method], transform=axes.transAxes, va="top")
        axes.text(0.0, 0.62, f"mean {means[method]:.2f}", transform=axes.transAxes, va="top", color=SOFT)
        axes.set_yticks([])
        axes.tick_params(bottom=axes is rows[-1])
    rows[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    rows[-1].set_xlabel("accuracy on a test group, %")
    return figure


@matplotlib.rc_context(STYLE)
def race_figure(race: Race, labels: Mapping[str, str]) -> Figure:
    """Draw accuracy (%) over the seconds for a test group: points for predictions, curves for training from scratch.

    `labels` name the curves, `pudnet` and `plus`. Bars are 95% intervals over the same test groups; numbers are epochs.
    """
    figure = new_figure(560, 330)
    axes = figure.subplots()
    bars = {"capsize": 0, "elinewidth": 1}
    for i, (name, points) in enumerate(race.curves.items()):
        color, seconds = LIGHT[SERIES[1 + i]], points["elapsed_ms"] / 1000
        axes.errorbar(
            seconds,
            points["accuracy"],
            points["ci95"],
            fmt="os"[i % 2] + "-",
            ms=5,
            color=color,
            label=labels[name],
            **bars,
        )
    lowest = next(iter(race.curves.values()))
    for epochs, accuracy, elapsed in zip(lowest["epochs"], lowest["accuracy"], lowest["elapsed_ms"], strict=True):
        axes.annotate(f"{epochs}", (elapsed / 1000, accuracy), (6, -14), textcoords="offset points", color=SOFT)
    axes.axhline(race.pudnet, color=LIGHT["s0"], lw=0.9, alpha=0.6)
    predicted = {"pudnet": (race.pudnet, race.pudnet_ci95, race.pudnet_ms)} | ({"plus": race.plus} if race.plus else {})
    for (name, (accuracy, ci95, elapsed)), color in zip(predicted.items(), ("s0", "s3"), strict=False):
        at, wanted = (elapsed / 1000, accuracy, ci95), {"color": LIGHT[color], "label": labels[name]}
        axes.errorbar(*at, fmt="D", ms=8, **wanted, **bars)
    _over_seconds(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100.8))
    figure.legend(loc="outside upper left", ncols=2, columnspacing=3, handletextpad=0.4, labelcolor=INK)
    return figure


def _over_seconds(axes: Axes) -> None:
    """Set the axes of accuracy over the time of an adaptation."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="seconds for a test group, logarithmic", ylabel="accuracy, %")


@matplotlib.rc_context(STYLE)
def filters_figure(kernels: np.ndarray, labels: Sequence[tuple[str, str]], scale: float) -> Figure:
    """Draw first-layer filters, one row for each group, with colours from -scale to +scale.

    `kernels` is (groups, filters, channels, f, f). Three channels are drawn as a colour, with grey for 0; otherwise
    their mean is drawn from blue to red, with white for 0. `labels` are the left and right headings of each row.
    """
    figure = new_figure(560, 58 * len(kernels))
    rows = figure.subplots(len(kernels), squeeze=False)[:, 0]
    for axes, group, (left, right) in zip(rows, kernels, labels, strict=True):
        axes.imshow(_strip(group, scale), interpolation="none")
        axes.set_title(left, loc="left", pad=3)
        axes.set_title(right, loc="right", pad=3, color=SOFT)
        axes.axis("off")
    return figure


def _strip(kernels: np.ndarray, scale: float) -> np.ndarray:
    """Put filters (filters, channels, f, f) side by side, with a transparent pixel between: (f, width, 4) in 0..1."""
    unit = np.clip(0.5 + kernels / (2 * scale), 0, 1)
    if unit.shape[1] == 3:
        rgb = unit.transpose(0, 2, 3, 1)
        rgba = np.concatenate([rgb, np.ones_like(rgb[..., :1])], axis=-1)
    else:
        rgba = matplotlib.colormaps["RdBu_r"](unit.mean(axis=1))
    padded = np.pad(rgba, ((0, 0), (0, 0), (0, 1), (0, 0)))
    return np.concatenate(list(padded), axis=1)[:, :-1]


def to_svg(figure: Figure, name: str) -> str:
    """Render as one `<svg>` for a page that defines the palette's CSS variables; the bytes are always the same."""
    buffer = io.StringIO()
    # The salt makes ids repeatable, and different for each picture of a page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        nothing = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    # Keep only the view box: the page sets the size, and HTML needs no namespaces.
    view_box, body = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)', buffer.getvalue(), re.DOTALL).groups()
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    for variable, color in LIGHT.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg role="img" aria-label="{name}" {view_box}>{body}'


def _panels(
    count: int, across: int, size: tuple[float, float], above: float = 0, sharey: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels, `across` side by side. `size`: its width, and the height of a line of panels."""
    down = math.ceil(count / across)
    figure = new_figure(size[0], above + down * size[1])
    panels = figure.subplots(down, across, sharey=sharey, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def differences_figure(table: pd.DataFrame, references: Sequence[str]) -> Figure:
    """Draw each row's difference to its reference row, in points with its 95% interval; one panel for each column."""
    columns = list(table.groupby("column", sort=False))
    across = 2 if len(columns) > 3 else len(columns)
    figure, panels = _panels(len(columns), across, (280 + 280 * across, 70 + 24 * table.row.nunique()), sharey=True)
    for axes, (column, part) in zip(panels, columns, strict=True):
        colors = [LIGHT["s4"] if row in references else LIGHT["s0"] for row in part.row]
        axes.axvline(0, color=SOFT, lw=0.9)
        axes.hlines(part.row, part.difference - part.difference_ci95, part.difference + part.difference_ci95, colors)
        axes.scatter(part.difference, part.row, c=colors, s=26, zorder=3)
        axes.set(title=column)
    figure.supxlabel("points above “" + "” or\n“".join(references) + "”", fontsize="medium", color=SOFT)
    panels[0].invert_yaxis()
    for axes in panels[::across]:
        axes.tick_params(axis="y", labelcolor=INK)
    return figure


@matplotlib.rc_context(STYLE)
def lines_figure(points: pd.DataFrame, x_label: str, y_label: str, log: bool = False) -> Figure:
    """Draw y over x: a panel for each `panel`, a line for each `line`, and `ci95` and `reference` (dashed) if given.

    A line looks the same in all panels. The legend is above them, where it hides no point.
    """
    panels, lines, handles = list(points.groupby("panel", sort=False)), points.line.unique(), {}
    looks = dict(zip(lines, itertools.cycle(itertools.product("-:", SERIES))))
    across = len(panels) * (1 if points.line.str.len().max() > 20 else 2)
    figure = new_figure(60 + 400 * len(panels), 310 + 18 * math.ceil(len(lines) / across))
    for axes, (panel, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line, own in part.groupby("line", sort=False):
            style, color = looks[line]
            _series(axes, own.sort_values("x"), line, LIGHT[color], style)
        if log:
            axes.set_xscale("log")
            axes.set_xticks(sorted(part.x.unique()))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=panel, xlabel=x_label, ylabel=y_label)
        drawn, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, drawn, strict=True))
    if len(handles) > 1:
        figure.legend(handles.values(), handles, loc="outside upper left", ncols=across, labelcolor=INK)
    return figure


@matplotlib.rc_context(STYLE)
def times_figure(table: pd.DataFrame, reference: str | None) -> Figure:
    """Draw accuracy (%) over the seconds a row takes for a test group: a panel for each column, two side by side.

    Rows are called `LINE / POINT`; the points of a line are joined. The line of the row `reference` is thick.
    """
    table = table.join(table.row.str.partition(" / ")[[0, 2]].set_axis(["line", "point"], axis=1))
    main = (reference or "").partition(" / ")[0]
    columns = list(table.groupby("column", sort=False))
    across = min(2, len(columns))
    figure, panels = _panels(len(columns), across, (430 * across, 300), above=40)
    for axes, (column, part) in zip(panels, columns, strict=True):
        for (line, own), color in zip(part.groupby("line", sort=False), itertools.cycle(SERIES)):
            own, wide = own.sort_values("milliseconds"), 2.6 if line == main else 1.3
            axes.errorbar(
                own.milliseconds / 1000,
                own.accuracy,
                own.ci95,
                fmt="o-",
                ms=2.5 * wide,
                lw=wide,
                elinewidth=1,
                color=LIGHT[color],
                label=line,
                zorder=2 + wide,
            )
        _name_ends(axes, part)
        _over_seconds(axes)
        axes.set_title(column)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside upper left", ncols=1 + across, columnspacing=1.2, handletextpad=0.4, labelcolor=INK
    )
    return figure


def _name_ends(axes: Axes, part: pd.DataFrame) -> None:
    """Write their names beside the fastest and the slowest point of the line that takes longest."""
    slowest = part[part.line == part.line[part.milliseconds.idxmax()]].sort_values("milliseconds")
    for at, shift in ((0, (6, -3)), (-1, (-2, -17))):
        point, place = slowest.iloc[at], "left" if at == 0 else "center"
        where = (point.milliseconds / 1000, point.accuracy)
        axes.annotate(point.point, where, shift, textcoords="offset points", ha=place, fontsize=8, color=SOFT)


def _series(axes: Axes, points: pd.DataFrame, label: str, color: str, style: str) -> None:
    """Draw one line with its interval and, dashed, its reference."""
    marker = "o" if len(points) < 20 else None
    axes.plot(points.x, points.y, style, color=color, marker=marker, ms=4, label=label)
    if "ci95" in points:
        low, high = points.y - points.ci95, points.y + points.ci95
        axes.fill_between(points.x, low, high, color=color, alpha=0.15, lw=0)
    if "reference" in points and points.reference.notna().any():
        name = f"{label}, the paper's" if label else "the paper's"
        axes.plot(
            points.x, points.reference.astype(float), color=color, ls="--", lw=1.2, marker="o", mfc="white", label=name
        )


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def bars_figure(table: pd.DataFrame, x_label: str) -> Figure:
    """Draw each row's accuracy with its interval, and the paper's as a diamond; one panel for each column."""
    columns = list(table.groupby("column", sort=False))
    figure = new_figure(280 + 260 * len(columns), 70 + 24 * table.row.nunique())
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, (column, part) in zip(panels, columns, strict=True):
        axes.errorbar(part.accuracy, part.row, xerr=part.ci95, fmt="o", ms=5, color=LIGHT["s0"])
        if part.paper.notna().any():
            axes.scatter(part.paper.astype(float), part.row, marker="D", s=22, color=LIGHT["s1"], label="the paper's")
            axes.legend(labelcolor=INK)
        axes.set(title=column, xlabel=x_label)
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", labelcolor=INK)
    return figure


@matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"})
def correlations_figure(table: pd.DataFrame) -> Figure:
    """Draw each layer's correlation as a dot and the range of shuffled pairs as a bar; one panel for each column."""
    columns = list(table.assign(label=table.row + ", " + table.layer).groupby("column", sort=False))
    figure = new_figure(240 + 260 * len(columns), 110 + 24 * len(columns[0][1]))
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (column, part) in zip(panels, columns, strict=True):
        axes.hlines(part.label, part.shuffled_low, part.shuffled_high, LIGHT["s4"], lw=5, alpha=0.5, label="shuffled")
        axes.scatter(part.correlation, part.label, color=LIGHT["s0"], s=26, zorder=3, label="own")
        axes.axvline(0, color=SOFT, lw=0.9)
        axes.set(title=column, xlabel="held-out canonical correlation")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, labelcolor=INK)
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", labelcolor=INK)
    return figure


def to_png(figure: Figure) -> bytes:
    """Render on white at twice the page's resolution; the bytes are always the same."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()

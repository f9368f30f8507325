"""The pictures of studies: one function for each, which returns a matplotlib Figure and keeps no state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from pipeline.reporting.drawing import INK, LIGHT, SERIES, SOFT, STYLE, new_figure, over_seconds


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
        over_seconds(axes)
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

"""The report's pictures: one function for each, which returns a matplotlib Figure and keeps no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from pipeline.reporting.drawing import DEPTHS, INK, LIGHT, SERIES, SOFT, STYLE, new_figure, over_seconds
from pipeline.reporting.results import Race


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
    over_seconds(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100.8))
    figure.legend(loc="outside upper left", ncols=2, columnspacing=3, handletextpad=0.4, labelcolor=INK)
    return figure


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

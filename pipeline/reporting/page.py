"""The report's page: puts every number of a run beside the paper's, in words and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from pipeline.params import PLUS, Params
from pipeline.project import git_commit
from pipeline.reporting import figures
from pipeline.reporting.answer import answer_rows, labels_note
from pipeline.reporting.drawing import PALETTE, series_colors, to_svg
from pipeline.reporting.methods import METHODS, label, target_name
from pipeline.reporting.numbers import duration, plus_minus, signed
from pipeline.reporting.paper import Reported, load_reported, paper_figures
from pipeline.reporting.results import Movement, Race, Results, section
from pudnet.config import passed
from pudnet.settings import get_setting

HERE = Path(__file__).parent

SECTIONS = {
    "learned": "Trained on the same groups as PudNet",
    "scratch": "Trained from scratch on all images of the test group itself (GC: Adam with gradient centralization)",
    "control": "Controls: how much the dataset itself matters",
}

CURVES = {
    "loss": "total loss",
    "metric_loss": "metric loss, L1",
    "full_loss": "full classification loss, L2",
    "kl_loss": "KL loss, L3",
    "train_accuracy": "training accuracy, %",
}

FILTERS_SHOWN = 16
GROUPS_SHOWN = 6


def knob(name: str) -> str:
    """The name on the page of a searched key of params.yaml."""
    return "η" if name == "eta" else name.replace("_", " ")


def verdict(difference: float, ci95: float | None) -> str:
    """Compare a control with PudNet in words; `difference` is the control's accuracy minus PudNet's."""
    if ci95 is None:
        return f"{signed(difference)} points relative to PudNet, on too few groups for an interval"
    distance = plus_minus(abs(difference), ci95)
    if abs(difference) <= ci95:
        return f"not measurably different from PudNet ({signed(difference, ci95)} points)"
    return f"{distance} points {'below' if difference < 0 else 'above'} PudNet"


def headline(results: Results, paper: Mapping[str, Reported]) -> list[dict[str, Any]]:
    """The rows of the main table, one for each method. A variant may have been run in PudNet's place."""
    rows = []
    for method, row in results.methods.items():
        name = results.variant if method == "pudnet" else method
        figure = paper.get(name.removeprefix("scratch_"))
        milliseconds = results.adaptation.get(method)
        cells = {
            "section": section(method),
            "label": label(name),
            "about": METHODS.get(name, ("", ""))[1],
            "accuracy": plus_minus(row["accuracy"], row["ci95"]),
            "difference": _difference(row),
            "groups": row["test_groups"],
            "paper": figure and plus_minus(figure.accuracy, figure.ci95),
            "time": None if milliseconds is None else duration(milliseconds),
            "splits": [_of_split(row["splits"].get(seed)) for seed in results.metrics["splits"]],
        }
        rows.append({"method": method, **cells})
    return rows


def _difference(row: Mapping[str, Any]) -> str | None:
    return signed(row["difference"], row["difference_ci95"]) if "difference" in row else None


def _of_split(cell: Mapping[str, Any] | None) -> str | None:
    return cell and plus_minus(cell["accuracy"], cell["ci95"])


def split_rows(results: Results) -> list[dict[str, Any]]:
    """One row for each class split, with its classes and the search's choice."""
    splits = results.metrics["splits"].items()
    return [{"seed": seed, **split, "chosen": results.best[int(seed)]} for seed, split in splits]


def draw(results: Results, moved: Movement | None, raced: Race | None, bins: pd.DataFrame) -> dict[str, Any]:
    """All pictures of the page, by name; `curves` is a list."""
    shown = shown_methods(results)
    names = {method: label(results.variant if method == "pudnet" else method) for method in shown}
    colors = method_colors(results)
    means = results.accuracies.groupby("method")["accuracy"].mean().to_dict()
    pictures: dict[str, Any] = {
        "distribution": figures.distribution_figure(bins, means, names, colors),
        "curves": [
            figures.curve_figure(results.curves, column, title, colors)
            for column, title in CURVES.items()
            if column in results.curves and results.curves[column].notna().any()
        ],
    }
    if raced:
        pictures["race"] = figures.race_figure(
            raced,
            {"pudnet": label(results.variant), "plus": label(PLUS)} | {name: label(name) for name in raced.curves},
        )
    if results.knobs:
        across, lines = [*results.knobs, None][:2]
        pictures["search"] = figures.search_figure(results.search, results.best, across, lines)
    if moved is not None:
        classes = [_shorten(" · ".join(group)) for group in moved.classes]
        labels = [(name, f"moved {100 * share:.2f} %") for name, share in zip(classes, moved.of_first, strict=True)]
        for name, kernels in (("filters", moved.first), ("filter_differences", moved.differences)):
            shown = kernels[:GROUPS_SHOWN, :FILTERS_SHOWN]
            pictures[name] = figures.filters_figure(shown, labels[:GROUPS_SHOWN], scale(kernels))
    return pictures


def shown_methods(results: Results) -> list[str]:
    """The methods whose test groups are drawn. For training from scratch, only the longest run is."""
    longest = {method.rpartition("_")[0]: method for method in results.methods if section(method) == "scratch"}
    return [m for m in results.methods if section(m) != "scratch" or m in longest.values()]


def method_colors(results: Results) -> dict[str, str]:
    """A colour for each method. Methods with training curves come first, so that their colours differ."""
    trained = list(results.curves["method"].unique())
    names = [*trained, *results.methods]
    return series_colors([*dict.fromkeys(names)])


def scale(kernels: np.ndarray) -> float:
    """The 99th percentile of the absolute values, where the colour scale ends."""
    return float(np.quantile(np.abs(kernels), 0.99)) or 1.0


def _shorten(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def render(
    params: Params, results: Results, moved: Movement | None, raced: Race | None, pictures: Mapping[str, Any]
) -> str:
    """Render the page as one HTML file that loads nothing from the network."""
    paper = paper_figures(load_reported(), params.setting, params.target)
    run_here = {results.variant, *(method.removeprefix("scratch_") for method in results.baselines)}
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), **options)
    environment.filters |= {"label": label, "duration": duration, "plus_minus": plus_minus, "knob": knob}
    svg = {name: _inline(picture, name) for name, picture in pictures.items()}
    return environment.get_template("page.html").render(
        params=params,
        target=target_name(params.target),
        results=results,
        metrics=results.metrics,
        static=results.baselines.get("static_trunk"),
        verdict=verdict,
        answer=answer_rows(results),
        labels_note=labels_note(results, params),
        headline=headline(results, paper),
        paper=paper,
        reported=paper.get(results.variant),
        paper_only={method: row for method, row in paper.items() if method not in run_here},
        splits=split_rows(results),
        moved=moved,
        scale=scale,
        passed=passed,
        makes_weights=params.configured({})[0].makes_weights,
        filters_shown=FILTERS_SHOWN,
        sections=SECTIONS,
        race=raced,
        tuning=results.tuning,
        colors=method_colors(results),
        trained=results.curves["method"].unique(),
        palette=PALETTE,
        svg=svg,
        commit=git_commit(),
        setting=get_setting(params.setting),
    )


def _inline(picture: Any, name: str) -> Any:
    if isinstance(picture, list):
        return [_inline(part, f"{name} {i + 1}") for i, part in enumerate(picture)]
    return Markup(to_svg(picture, name.replace("_", " ")))  # we drew it, so it needs no escaping

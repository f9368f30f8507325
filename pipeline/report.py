"""The `report` stage: every number of a run on one page, beside the paper's, and the data of DVC's plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup

from pipeline import figures
from pipeline.params import CONTROLS, Params
from pipeline.reported import Reported, load_reported, paper_figures
from pipeline.stage import RESULTS, git_commit, read_result, run_stage, write
from pudnet import diagnosis
from pudnet.card import read_tensors
from pudnet.evaluation import stratified_interval
from pudnet.settings import get_setting

HERE = Path(__file__).parent

# What the page needs, and the stage that writes it.
PRODUCERS = {
    "search.csv": "search",
    "best.yaml": "search",
    "metrics.json": "evaluate",
    "timing.json": "evaluate",
    "weights": "evaluate",
    "accuracies.csv": "baselines",
    "adaptation.json": "baselines",
    "baselines.json": "baselines",
    "tuning.csv": "baselines",
    "loss_curves.csv": "baselines",
}

WEIGHTS = "split-*/group-*.safetensors"
TARGETS = {"convnet3": "ConvNet-3", "resnet18": "ResNet-18", "resnet34": "ResNet-34"}

# Method -> how the page calls it, and what it is. A method that is not listed goes by its own name.
METHODS = {
    "pudnet": ("PudNet", "weights predicted from the group’s images, in one forward pass"),
    "pudnet_plus": (
        "PudNet+",
        "one learned set of weights; filters of the last convolution and the classifier are solved for the group",
    ),
    "static_trunk": (
        "Static trunk",
        "same groups, losses of class centroids; the convolution weights are plain parameters that never see the group",
    ),
    "constant_sketch": ("Constant sketch", "the trained PudNet, fed the mean sketch of the training groups"),
    "shuffled_sketch": ("Shuffled sketch", "the trained PudNet, fed the sketch of another test group"),
    "random_weights": ("Random weights", "untrained weights, He-initialised"),
    "without_context": ("Without context", "ablation: no recurrent unit, every layer sees the sketch alone"),
    "random_hidden": ("Random hidden state", "ablation: the recurrent unit starts from noise, not the sketch"),
    "without_initial_residual": ("Without initial residual", "ablation: η = 0"),
    "metric_only": ("Metric loss only", "ablation: without the full-classification and KL losses"),
    "without_kl": ("Without KL", "ablation: without the KL loss"),
    "pretrained": (
        "Pretrained",
        "one trunk, trained with a linear head on all training classes; class centroids by cosine",
    ),
    "matchnet": ("MatchNet", "one trunk, trained on episodes; attention over the support images"),
    "protonet": ("ProtoNet", "one trunk, trained on episodes; squared distances to class means"),
    "meta_baseline": ("Meta-Baseline", "Pretrained, then episodes with class centroids by cosine"),
    "meta_deepbdc": ("Meta-DeepBDC", "the same two stages on Brownian distance covariances of a feature map"),
    "musml": ("MUSML", "weights from one of a few learned subspaces, found by gradient steps on the support images"),
    "r2d2": ("R2-D2", "one trunk, trained on episodes; a classifier by ridge regression on the support images"),
    "scratch_adam": ("Adam from scratch", ""),
    "scratch_gc": ("GC from scratch", ""),
}
SCRATCH = {"adam": "Adam", "gc": "GC"}
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


# --- What the run found -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """One test group's predicted weights, arrays (d_out, d_in, f, f) in the network's order."""

    split_seed: int
    classes: list[str]
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """What the earlier stages wrote; accuracies in %."""

    search: pd.DataFrame
    best: dict[int, dict[str, Any]]
    curves: pd.DataFrame
    metrics: dict[str, Any]
    timing: dict[str, Any]
    accuracies: pd.DataFrame
    baselines: dict[str, dict[str, Any]]
    tuning: pd.DataFrame
    adaptation: dict[str, float]  # milliseconds
    predicted: list[Predicted]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Every method's summary, PudNet's first."""
        return {"pudnet": self.metrics, **self.baselines}

    @property
    def variant(self) -> str:
        """What stands in PudNet's place: the method itself or one of its ablations."""
        return self.metrics.get("variant", "pudnet")

    @property
    def knobs(self) -> list[str]:
        """What was searched, eta and depth first: the columns between the split and what a trial gave."""
        names = self.search.columns[1 : self.search.columns.get_loc("groups")]
        return sorted(names, key=lambda name: ["eta", "depth", name].index(name))


def read_results(folder: Path) -> Results:
    """Read a results folder. `UserError` names the first missing file and the stage that writes it."""
    for name, stage in PRODUCERS.items():
        read_result(folder / name, Path.exists, stage)  # of what is missing the first is named

    def read(name: str, parse: Callable[[Path], Any]) -> Any:
        return read_result(folder / name, parse, PRODUCERS[name])

    return Results(
        search=read("search.csv", pd.read_csv),
        best=read("best.yaml", lambda path: yaml.safe_load(path.read_text())["splits"]),
        metrics=read("metrics.json", _from_json),
        timing=read("timing.json", _from_json),
        predicted=read("weights", lambda path: [*map(_read_predicted, sorted(path.glob(WEIGHTS)))]),
        accuracies=read("accuracies.csv", lambda path: pd.read_csv(path, dtype={"classes": str})),
        adaptation=read("adaptation.json", lambda path: _from_json(path)["milliseconds"]),
        baselines=read("baselines.json", lambda path: _from_json(path)["methods"]),
        tuning=read("tuning.csv", pd.read_csv),
        curves=read("loss_curves.csv", pd.read_csv),
    )


def _from_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _read_predicted(path: Path) -> Predicted:
    tensors, card = read_tensors(path)
    weights = {name: tensors[name].numpy() for name in card.predicted}
    split_seed = int(path.parent.name.removeprefix("split-"))
    return Predicted(split_seed, [*map(str, card.classes)], weights)


def histogram(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Count each method's test groups by accuracy (%), in bins that all methods share."""
    lowest = accuracies["accuracy"].min()
    width = next((w for w in (0.5, 1.0, 2.0) if (100 - lowest) / w <= 60), 2.5)
    bins = max(2, math.ceil((100 - lowest) / width))
    edges = 100 - width * np.arange(bins, -1, -1)
    rows = []
    for method, values in accuracies.groupby("method", sort=False)["accuracy"]:
        counts, _ = np.histogram(values, edges)
        rows.append(pd.DataFrame({"method": method, "accuracy": edges[:-1] + width / 2, "groups": counts}))
    return pd.concat(rows, ignore_index=True)


@dataclass(frozen=True)
class Movement:
    """How far the predicted weights of one split's groups are from their mean.

    `first` and `differences` are the first layer's kernels (groups, d_out, d_in, f, f); `relative` is
    ||w_g - mean|| / ||mean|| of a layer, a value a group, the first layer first.
    """

    split_seed: int
    classes: list[list[str]]
    first: np.ndarray
    differences: np.ndarray
    relative: dict[str, np.ndarray]

    @property
    def of_first(self) -> np.ndarray:
        """How far each group's first layer moved."""
        return next(iter(self.relative.values()))


def movement(predicted: list[Predicted]) -> Movement | None:
    """Compare the groups of the first split: another split is another hypernetwork. None without weights."""
    if not predicted:
        return None
    split = min(group.split_seed for group in predicted)
    groups = [group for group in predicted if group.split_seed == split]
    first = np.stack([next(iter(group.weights.values())) for group in groups])
    relative = diagnosis.movement([group.weights for group in groups])
    return Movement(split, [group.classes for group in groups], first, first - first.mean(axis=0), relative)


# --- What the page shows ------------------------------------------------------------------------------------


def label(method: str) -> str:
    """How the page calls a method; `scratch_adam_30`, in the paper's tables `adam_30`, is training for 30 epochs."""
    if method in METHODS:
        return METHODS[method][0]
    name, _, epochs = method.removeprefix("scratch_").rpartition("_")
    if name in SCRATCH and epochs.isdigit():
        return f"{SCRATCH[name]}, {epochs} epoch{'s' if epochs != '1' else ''}"
    return method.replace("_", " ").capitalize()


def section(method: str) -> str | None:
    """The part of the main table that a method stands in; None for PudNet."""
    if method == "pudnet":
        return None
    return "control" if method in CONTROLS else "scratch" if method.startswith("scratch_") else "learned"


def knob(name: str) -> str:
    """How the page calls a searched key of params.yaml."""
    return "η" if name == "eta" else name.replace("_", " ")


def plus_minus(value: float, ci95: float | None = None, sign: bool = False) -> str:
    """`95.10 ± 0.30`; without the interval where there is none (a single group)."""
    number = f"{value:+.2f}".replace("-", "−") if sign else f"{value:.2f}"
    return number if ci95 is None or math.isnan(ci95) else f"{number} ± {ci95:.2f}"


def duration(milliseconds: float) -> str:
    """Three digits at most, in ms below a second, else in s."""
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1000, "s")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} {unit}"


def verdict(difference: float, ci95: float | None) -> str:
    """One control against PudNet, in words; `difference` is the control minus PudNet."""
    if ci95 is None:
        return f"{plus_minus(difference, sign=True)} points to PudNet, on too few groups for an interval"
    distance = plus_minus(abs(difference), ci95)
    if abs(difference) <= ci95:
        return f"not measurably different from PudNet ({plus_minus(difference, ci95, sign=True)} points)"
    return f"{distance} points {'below' if difference < 0 else 'above'} PudNet"


def headline(results: Results, paper: Mapping[str, Reported]) -> list[dict[str, Any]]:
    """The main table, a row a method; PudNet's place may be taken by an ablation of it."""
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
    return plus_minus(row["difference"], row["difference_ci95"], sign=True) if "difference" in row else None


def _of_split(cell: Mapping[str, Any] | None) -> str | None:
    return cell and plus_minus(cell["accuracy"], cell["ci95"])


def split_rows(results: Results) -> list[dict[str, Any]]:
    """A row a class split: its classes, and what the search chose on it."""
    splits = results.metrics["splits"].items()
    return [{"seed": seed, **split, "chosen": results.best[int(seed)]} for seed, split in splits]


@dataclass(frozen=True)
class Race:
    """Training from scratch against PudNet over the same test groups. Accuracies in %, times in ms (medians).

    `curves`: optimizer -> a row a number of epochs, with epochs, accuracy, ci95, elapsed_ms and `ahead`: whether
    it is measurably above PudNet, group by group.
    """

    groups: int
    pudnet: float
    pudnet_ci95: float
    pudnet_ms: float
    curves: dict[str, pd.DataFrame]

    def passed(self, name: str) -> Mapping[str, Any] | None:
        """The first point of a curve that is above PudNet."""
        ahead = self.curves[name][self.curves[name]["ahead"]]
        return None if ahead.empty else ahead.iloc[0].to_dict()


def race(results: Results) -> Race | None:
    """What the run says of it; None where nothing was trained from scratch."""
    points: dict[str, list[dict[str, Any]]] = {}
    for method, row in results.baselines.items():
        if section(method) == "scratch":
            name, _, epochs = method.rpartition("_")
            point = {"epochs": int(epochs), "accuracy": row["accuracy"], "ci95": row["ci95"]}
            ahead = row["difference"] > (row["difference_ci95"] or 0)
            points.setdefault(name, []).append(point | {"elapsed_ms": results.adaptation[method], "ahead": ahead})
    if not points:
        return None
    first = next(method for method in results.baselines if section(method) == "scratch")
    frame = results.accuracies
    pairs = frame.loc[frame["method"] == first, ["split_seed", "group"]]
    own = frame[frame["method"] == "pudnet"].merge(pairs, on=["split_seed", "group"])
    curves = {name: pd.DataFrame(rows) for name, rows in points.items()}
    return Race(len(pairs), *interval(own), results.adaptation["pudnet"], curves)


def interval(frame: pd.DataFrame) -> tuple[float, float]:
    """Mean accuracy over test groups and its 95% half-width, the class splits held fixed."""
    return stratified_interval([part["accuracy"].to_numpy() for _, part in frame.groupby("split_seed")])


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
            raced, {"pudnet": label(results.variant)} | {name: label(name) for name in raced.curves}
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
    """The methods whose test groups are drawn: of training from scratch, the longest alone."""
    longest = {method.rpartition("_")[0]: method for method in results.methods if section(method) == "scratch"}
    return [m for m in results.methods if section(m) != "scratch" or m in longest.values()]


def method_colors(results: Results) -> dict[str, str]:
    """A colour a method; those that share the training curves first, so that they differ there."""
    trained = list(results.curves["method"].unique())
    names = [*trained, *results.methods]
    return figures.series_colors([*dict.fromkeys(names)])


def scale(kernels: np.ndarray) -> float:
    """The value at a colour scale's end: all but the largest hundredth of the values fit."""
    return float(np.quantile(np.abs(kernels), 0.99)) or 1.0


def _shorten(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def render(
    params: Params, results: Results, moved: Movement | None, raced: Race | None, pictures: Mapping[str, Any]
) -> str:
    """The page: one HTML file that asks the network for nothing."""
    paper = paper_figures(load_reported(), params.setting, params.target)
    run_here = {results.variant, *(method.removeprefix("scratch_") for method in results.baselines)}
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), **options)
    environment.filters |= {"label": label, "duration": duration, "plus_minus": plus_minus, "knob": knob}
    svg = {name: _inline(picture, name) for name, picture in pictures.items()}
    return environment.get_template("report.html").render(
        params=params,
        target=TARGETS.get(params.target, params.target),
        results=results,
        metrics=results.metrics,
        static=results.baselines.get("static_trunk"),
        verdict=verdict,
        headline=headline(results, paper),
        paper=paper,
        reported=paper.get(results.variant),
        paper_only={method: row for method, row in paper.items() if method not in run_here},
        splits=split_rows(results),
        moved=moved,
        scale=scale,
        filters_shown=FILTERS_SHOWN,
        sections=SECTIONS,
        race=raced,
        tuning=results.tuning,
        colors=method_colors(results),
        trained=results.curves["method"].unique(),
        palette=figures.PALETTE,
        svg=svg,
        commit=git_commit(),
        paper_groups=get_setting(params.setting).train_groups,
    )


def _inline(picture: Any, name: str) -> Any:
    if isinstance(picture, list):
        return [_inline(part, f"{name} {i + 1}") for i, part in enumerate(picture)]
    return Markup(figures.to_svg(picture, name.replace("_", " ")))  # our own drawing: safe as it is


def report(params: Params, folder: Path = RESULTS) -> None:
    """Write `report.html` and the files of DVC's plots from what the earlier stages left in `folder`."""
    results = read_results(folder)
    moved, raced = movement(results.predicted), race(results)
    bins = histogram(results.accuracies)
    pictures = draw(results, moved, raced, bins)
    plots = folder / "plots"
    tables = {
        "search": with_series(results.search, ["split_seed", *(k for k in results.knobs if k != "eta")]),
        "loss_curves": with_series(results.curves, ["method", "split_seed"]),
        "accuracy_histogram": with_series(bins, ["method"]),
    }
    for name, table in tables.items():
        write(plots / f"{name}.csv", table.to_csv(index=False))
    for name in ("filters", "filter_differences"):
        if name in pictures:
            write(plots / f"{name}.png", figures.to_png(pictures[name]))
    write(folder / "report.html", render(params, results, moved, raced, pictures))


def with_series(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The table with what tells its lines apart as one column, which the template of DVC's plots colours by."""
    named = [table[column].map(lambda value, column=column: f"{column} {value}") for column in columns]
    return table.assign(series=[", ".join(parts) for parts in zip(*named, strict=True)])


def log_report(params: Params) -> None:
    """Add the page and its plots to the MLflow run of the evaluation that they show."""
    from pipeline.bench import identity
    from pipeline.tracking import open_tracking

    tracking = open_tracking(params)
    run_id = tracking.find_or_create(f"evaluate/{identity(params)}", f"evaluate-{params.variant}")
    tracking.client.log_artifact(run_id, str(RESULTS / "report.html"))
    tracking.client.log_artifacts(run_id, str(RESULTS / "plots"), "plots")
    tracking.finish(run_id)


def stage(params: Params) -> None:
    """Write the report, and log it."""
    report(params)
    log_report(params)


def main() -> None:
    """Entry point of the stage."""
    run_stage(stage)


if __name__ == "__main__":
    main()

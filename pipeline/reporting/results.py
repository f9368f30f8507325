"""The results of a run: reads what the earlier stages wrote, and computes the page's numbers from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pipeline.params import CONTROLS, PLUS
from pipeline.project import read_result
from pudnet import diagnosis
from pudnet.card import read_tensors
from pudnet.evaluation import stratified_interval

# The files that the page needs, and the stages that write them.
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


@dataclass(frozen=True)
class Predicted:
    """One test group's predicted weights: arrays (d_out, d_in, f, f) in the order of the forward pass."""

    split_seed: int
    classes: list[str]
    weights: dict[str, np.ndarray]


@dataclass(frozen=True)
class Results:
    """What the earlier stages wrote. Accuracies are in %."""

    search: pd.DataFrame
    best: dict[int, dict[str, Any]]
    curves: pd.DataFrame
    metrics: dict[str, Any]
    timing: dict[str, Any]
    accuracies: pd.DataFrame
    baselines: dict[str, dict[str, Any]]
    tuning: pd.DataFrame
    adaptation: dict[str, float]  # milliseconds
    adaptation_threads: int
    predicted: list[Predicted]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Every method's summary, first those of PudNet and, if it was run, PudNet+."""
        plus = {PLUS: self.baselines[PLUS]} if PLUS in self.baselines else {}
        return {"pudnet": self.metrics, **plus, **self.baselines}

    @property
    def variant(self) -> str:
        """The variant that was run: PudNet itself, PudNet+ or an ablation."""
        return self.metrics.get("variant", "pudnet")

    @property
    def knobs(self) -> list[str]:
        """The searched keys, eta and depth first: the columns between the split and a trial's results."""
        names = self.search.columns[1 : self.search.columns.get_loc("groups")]
        return sorted(names, key=lambda name: ["eta", "depth", name].index(name))


def read_results(folder: Path) -> Results:
    """Read a results folder. `UserError` names the first missing file and the stage that writes it."""
    for name, stage in PRODUCERS.items():  # in the order of the stages
        read_result(folder / name, Path.exists, stage)

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
        adaptation_threads=read("adaptation.json", lambda path: _from_json(path)["threads"]),
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
    """Count each method's test groups by accuracy (%), in the same bins for all methods."""
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

    `first` has the first layer's kernels (groups, d_out, d_in, f, f), `differences` the same less their mean.
    `relative` has ||w_g - mean|| / ||mean|| for each layer, in their order, with one value for each group.
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
    """Compare the groups of the first split only, since each split has another hypernetwork. None without weights."""
    if not predicted:
        return None
    split = min(group.split_seed for group in predicted)
    groups = [group for group in predicted if group.split_seed == split]
    first = np.stack([next(iter(group.weights.values())) for group in groups])
    relative = diagnosis.movement([group.weights for group in groups])
    return Movement(split, [group.classes for group in groups], first, first - first.mean(axis=0), relative)


def section(method: str) -> str | None:
    """The section of the main table that a method belongs to; None for PudNet and PudNet+."""
    if method in ("pudnet", PLUS):
        return None
    return "control" if method in CONTROLS else "scratch" if method.startswith("scratch_") else "learned"


@dataclass(frozen=True)
class Race:
    """Training from scratch against PudNet on the same test groups. Accuracies are in %, times are medians in ms.

    `plus` has PudNet+'s accuracy, ci95 and time, if it was run beside another variant. `curves`: optimizer -> a row for
    each number of epochs, with epochs, accuracy, ci95, elapsed_ms and `ahead`, which says whether it is measurably
    above PudNet, paired over groups.
    """

    groups: int
    pudnet: float
    pudnet_ci95: float
    pudnet_ms: float
    plus: tuple[float, float, float] | None
    curves: dict[str, pd.DataFrame]

    def passed(self, name: str) -> Mapping[str, Any] | None:
        """The first point of a curve that is measurably above PudNet."""
        ahead = self.curves[name][self.curves[name]["ahead"]]
        return None if ahead.empty else ahead.iloc[0].to_dict()


def race(results: Results) -> Race | None:
    """Collect the race from a run's results; None if nothing was trained from scratch."""
    points: dict[str, list[dict[str, Any]]] = {}
    for method, row in results.baselines.items():
        if section(method) == "scratch":
            name, _, epochs = method.rpartition("_")
            point = {"epochs": int(epochs), "accuracy": row["accuracy"], "ci95": row["ci95"]}
            ahead = row["difference_ci95"] is not None and row["difference"] > row["difference_ci95"]
            points.setdefault(name, []).append(point | {"elapsed_ms": results.adaptation[method], "ahead": ahead})
    if not points:
        return None
    first = next(method for method in results.baselines if section(method) == "scratch")
    frame = results.accuracies
    pairs = frame.loc[frame["method"] == first, ["split_seed", "group"]]
    own, plus = (frame[frame["method"] == method].merge(pairs) for method in ("pudnet", PLUS))
    raced_plus = None if plus.empty else (*interval(plus), results.adaptation[PLUS])
    # The interval of one test group is null.
    curves = {name: pd.DataFrame(rows).astype({"ci95": float}) for name, rows in points.items()}
    return Race(len(pairs), *interval(own), results.adaptation["pudnet"], raced_plus, curves)


def interval(frame: pd.DataFrame) -> tuple[float, float]:
    """Mean accuracy over test groups and its 95% half-width, for exactly these class splits."""
    return stratified_interval([part["accuracy"].to_numpy() for _, part in frame.groupby("split_seed")])

"""The run in five rows: how accurate PudNet and PudNet+ are beside other methods, and how long each takes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.params import PLUS, Params
from pipeline.reporting.methods import label
from pipeline.reporting.results import Results, section
from pudnet.config import VARIANTS


@dataclass(frozen=True)
class Row:
    """A method of the answer. Accuracy and its 95% interval are in %."""

    method: str
    label: str
    accuracy: float
    ci95: float | None  # None: too few groups
    groups: int  # test groups
    milliseconds: float | None  # to adapt to a group; None: not timed


def answer_rows(results: Results) -> list[Row]:
    """PudNet+, PudNet, the best other learned method, the longest training from scratch, and random weights.

    Those that were not run are left out.
    """
    learned = [m for m in results.baselines if section(m) == "learned"]
    scratch = [m for m in results.baselines if section(m) == "scratch"]
    best = max(learned, key=lambda m: results.baselines[m]["accuracy"], default=None)
    longest = max(scratch, key=lambda m: int(m.rpartition("_")[2]), default=None)
    wanted = [PLUS, "pudnet", best, longest, "random_weights"]
    return [_row(results, method) for method in wanted if method in results.methods]


def labels_note(results: Results, params: Params) -> str:
    """How many labels PudNet+ uses beside another variant. (If that reads labels, too, all are given as many.)"""
    model, _ = params.configured({})
    if PLUS not in results.baselines or model.reads_labels:
        return ""
    images = VARIANTS[PLUS]["sketch_images"]
    others = f"{params.train.support_per_class} of each class"
    own = f"PudNet+ uses the labels of up to {images} images of a group, or of {others} if that is more."
    return f"{own} The other predictions use {others}."


def _row(results: Results, method: str) -> Row:
    own, name = results.methods[method], label(results.variant if method == "pudnet" else method)
    if section(method) == "scratch":
        name = name.replace(",", " from scratch,", 1)  # Adam, 50 epochs
    if name == "PudNet":
        name = "PudNet, the paper’s"
    return Row(method, name, own["accuracy"], own["ci95"], own["test_groups"], results.adaptation.get(method))

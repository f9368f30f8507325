"""Sums up accuracies on test groups: the mean, its interval, and the difference to another method."""

from __future__ import annotations

import pandas as pd

from pudnet.evaluation import stratified_interval


def summary(frame: pd.DataFrame, column: str = "accuracy") -> dict[str, object]:
    """Mean and 95% interval over test groups, for exactly these class splits; and the same for each split."""
    strata = {int(seed): part[column].to_numpy() for seed, part in frame.groupby("split_seed")}
    mean, half = stratified_interval(list(strata.values()))
    splits = {}
    for seed, values in strata.items():
        own_mean, own_half = stratified_interval([values])
        splits[str(seed)] = {"accuracy": round(own_mean, 4), "ci95": round(own_half, 4)}
    return {"accuracy": round(mean, 4), "ci95": round(half, 4), "test_groups": len(frame), "splits": splits}


def compare(own: pd.DataFrame, reference: pd.DataFrame) -> dict[str, object]:
    """A method's accuracy, and its difference to a reference method's, paired over the same test groups."""
    keys = ["split_seed", "group"]
    paired = own.merge(reference, on=keys, suffixes=("", "_reference"), validate="one_to_one")
    paired["difference"] = paired.accuracy - paired.accuracy_reference
    difference = summary(paired, "difference")
    return {**summary(own), "difference": difference["accuracy"], "difference_ci95": difference["ci95"]}

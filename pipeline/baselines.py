"""Stage `baselines`: tunes, trains and measures the methods that PudNet is compared with, on the same groups.

Every finished part is kept (`runs/finished.py`), so that the stage, run again, only does what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from mlflow.entities import DatasetInput

from pipeline.params import Params
from pipeline.project import BASELINES, RESULTS, read_result, write, write_json
from pipeline.runs import cluster
from pipeline.runs.bench import compare, images_of_a_class
from pipeline.runs.final import read_best, train_all, write_curves
from pipeline.runs.measuring import measure_all, time_all
from pipeline.runs.tuning import named, tune
from pipeline.stage import run_stage, wants_fresh
from pipeline.tracking.datasets import test_sets
from pipeline.tracking.runs import Tracking, open_tracking
from pudnet.baselines import LEARNED, SCRATCH
from pudnet.errors import UserError


def baselines(params: Params) -> None:
    """Tune, train, measure and time every method; write the tables, and log one run for each method."""
    params = params.for_baselines(images_of_a_class(params))
    fresh, methods, tracking = wants_fresh(), _possible(params), open_tracking(params, "baselines")
    pudnet = read_result(RESULTS / "pudnet.csv", pd.read_csv, "evaluate")
    with cluster.session():
        tuning, choices = tune(params, [m for m in methods if m in LEARNED or m in SCRATCH], tracking, fresh)
        curves = _train(params, methods, choices, fresh)
        measured, keys = measure_all(params, methods, choices, fresh)
        times = time_all(params, methods, choices)
    compared = {name: compare(rows, pudnet) for name, rows in measured.groupby("method", sort=False)}
    accuracies = pd.concat([pudnet, measured], ignore_index=True)
    write(RESULTS / "accuracies.csv", accuracies.to_csv(index=False, float_format="%.4f"))
    write(RESULTS / "tuning.csv", tuning.to_csv(index=False, float_format="%.6g"))
    write(RESULTS / "loss_curves.csv", write_curves(curves))
    write_json(RESULTS / "baselines.json", {"methods": compared})
    write_json(RESULTS / "adaptation.json", {"milliseconds": times})
    for method, key in keys.items():
        own = {seed: cells for (name, seed), cells in choices.items() if name == method and any(cells)}
        chosen = {f"chosen_split_{seed}": "; ".join(map(named, cells)) for seed, cells in own.items()}
        groups = params.baselines.scratch_groups if method in SCRATCH else params.baselines.test_groups
        tested = test_sets(params, groups)
        tracking.submit(partial(_log, tracking, params, method, key, measured, compared, times, chosen, tested))
    for name, numbers in compared.items():
        print(
            f"baselines: {name}: {numbers['accuracy']:.2f} +/- {numbers['ci95']:.2f} %, "
            f"{numbers['difference']:+.2f} +/- {numbers['difference_ci95']:.2f} relative to pudnet"
        )


def _possible(params: Params) -> list[str]:
    """The methods to run; without the shuffled sketch, if there is no other group to take it from."""
    methods, one = list(params.baselines.methods), 1 in (params.groups.test_groups, params.baselines.test_groups)
    if one and "shuffled_sketch" in methods:
        print("baselines: shuffled_sketch is left out: there is one test group")
        methods.remove("shuffled_sketch")
    if not methods:
        raise UserError("baselines.methods: no method is left; add another, or use more test groups")
    return methods


def _train(
    params: Params, methods: Sequence[str], choices: Mapping[tuple[str, int], list], fresh: bool
) -> pd.DataFrame:
    """Train the learned methods and write their models; returns the loss curves, PudNet's first."""
    curves = read_result(RESULTS / "train_curves.csv", pd.read_csv, "train")
    cells = {m: {seed: choices[m, seed][0] for seed in params.split_seeds} for m in methods if m in LEARNED}
    if "static_trunk" in methods:
        cells["static_trunk"] = read_best()  # the search's choice for PudNet, of which only training keys apply
    BASELINES.mkdir(parents=True, exist_ok=True)  # DVC expects this output even if nothing is trained
    return pd.concat([curves, train_all(params, "baselines", cells, fresh)]) if cells else curves


def _log(
    tracking: Tracking,
    params: Params,
    method: str,
    key: str,
    measured: pd.DataFrame,
    compared: Mapping[str, Any],
    times: Mapping[str, float],
    chosen: Mapping[str, str],
    tested: Sequence[DatasetInput],
) -> None:
    """Log a method's MLflow run: its chosen cells, results and rows. From scratch, steps are numbers of epochs."""
    run_id = tracking.find_or_create(f"baselines/{method}/{key}", f"baseline-{method}")
    note = f"Test of `{method}` on the test groups of `{params.variant}`: accuracy, the difference to it, and the time"
    note += f" for a group.{' A step is a number of epochs.' if method in SCRATCH else ''}"
    plain = {"method": method, "splits": params.splits, "seed": params.seed, **chosen}
    tracking.describe(run_id, note, plain, tested)
    epochs = {f"{method}_{count}": count for count in params.baselines.scratch_epochs} if method in SCRATCH else {}
    for name, step in (epochs or {method: 0}).items():
        numbers = compared[name]
        metrics = {"test_accuracy": numbers["accuracy"], "test_ci95": numbers["ci95"]}
        metrics |= {key: numbers[key] for key in ("difference", "difference_ci95")}
        metrics |= {f"test_accuracy_split_{seed}": part["accuracy"] for seed, part in numbers["splits"].items()}
        metrics |= {"adapt_ms": times[name]} if name in times else {}
        tracking.log_metrics(run_id, metrics, step)
    rows = measured[measured.method.isin(epochs or [method])]
    tracking.client.log_text(run_id, rows.to_csv(index=False, float_format="%.4f"), "accuracies.csv")
    tracking.finish(run_id)


if __name__ == "__main__":
    run_stage(baselines)

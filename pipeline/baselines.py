"""Stage `baselines`: what PudNet is compared with. Tuned, trained and measured as it is, on the same groups.

Every part that is finished is kept (`kept.py`): the stage, run again, does what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import cluster
from pipeline.bench import identity, summary
from pipeline.final import read_best, train_all, write_curves
from pipeline.kept import keep_table, read_table, run_missing
from pipeline.measure import OF_PUDNET, measure, measure_key, time_methods
from pipeline.params import Params
from pipeline.stage import BASELINES, RESULTS, run_stage, wants_fresh, write, write_json
from pipeline.tracking import Tracking, open_tracking
from pipeline.trial import make_spec
from pudnet.baselines import LEARNED, SCRATCH

# isort: split
import ray  # after cluster, which sets its environment

Cells = dict[str, dict[int, dict[str, Any]]]  # method -> split seed -> what was chosen for it
ACCURACY_COLUMNS = ["method", "split_seed", "group", "classes", "accuracy"]
SCRATCH_COLUMNS = [*ACCURACY_COLUMNS, "epochs", "elapsed_ms", "pudnet_ms"]


def baselines(params: Params) -> None:
    """Tune, train, measure and time every method; write the tables, log a run a method."""
    fresh, curves = wants_fresh(), [pd.read_csv(RESULTS / "train_curves.csv")]
    pudnet, methods, tracking = pd.read_csv(RESULTS / "pudnet.csv"), _possible(params), open_tracking(params)
    with cluster.session():
        tuning, cells = tune(params, [m for m in methods if m in LEARNED or m in SCRATCH], tracking, fresh)
        if "static_trunk" in methods:
            cells["static_trunk"] = read_best()
        trained = {method: own for method, own in cells.items() if method not in SCRATCH}
        if trained:
            curves.append(train_all(params, "baselines", trained, fresh))
        BASELINES.mkdir(parents=True, exist_ok=True)  # a stage's output, even where nothing is trained
        frame = pd.concat([pudnet, *_measure_all(params, methods, cells, fresh)], ignore_index=True)
        times = _time(params, [m for m in methods if m not in SCRATCH and m not in OF_PUDNET])
    scratch = frame.reindex(columns=SCRATCH_COLUMNS).dropna(subset="epochs").astype({"epochs": int})
    times |= scratch.groupby("method", sort=False)["elapsed_ms"].median().to_dict()
    compared = {name: _compare(frame, pudnet, name) for name in frame.method.unique() if name != "pudnet"}
    write(RESULTS / "accuracies.csv", frame[ACCURACY_COLUMNS].to_csv(index=False, float_format="%.4f"))
    write(RESULTS / "scratch.csv", scratch.to_csv(index=False, float_format="%.4f"))
    write(RESULTS / "tuning.csv", tuning.to_csv(index=False, float_format="%.6g"))
    write(RESULTS / "loss_curves.csv", write_curves(pd.concat(curves, ignore_index=True)))
    write_json(RESULTS / "baselines.json", {"methods": compared})
    write_json(RESULTS / "adaptation.json", {"milliseconds": times})
    for method in methods:
        names = scratch[scratch.method.str.startswith(f"{method}_")].method.unique() if method in SCRATCH else [method]
        own = frame[frame.method.isin(names)]
        _log(tracking, params, method, own, {name: compared[name] for name in names}, times)
    for method, numbers in compared.items():
        print(
            f"baselines: {method}: {numbers['accuracy']:.2f} +/- {numbers['ci95']:.2f} %, "
            f"{numbers['difference']:+.2f} +/- {numbers['difference_ci95']:.2f} to pudnet"
        )


def _possible(params: Params) -> list[str]:
    """The methods asked for, less the shuffled sketch where there is no other group to take it from."""
    if params.groups.test_groups > 1 and params.baselines.test_groups != 1:
        return list(params.baselines.methods)
    print("baselines: shuffled_sketch is left out: there is one test group")
    return [method for method in params.baselines.methods if method != "shuffled_sketch"]


def tune(params: Params, methods: list[str], tracking: Tracking, fresh: bool) -> tuple[pd.DataFrame, Cells]:
    """Every cell of every method's grid on every split, judged on validation groups: the trials, and the best cells.

    A grid of one cell has nothing to choose and is not run.
    """
    cells: Cells = {method: dict.fromkeys(params.split_seeds, params.baseline_grid(method)[0]) for method in methods}
    specs = [
        _tuning_spec(params, method, seed, cell)
        for method in methods
        for seed in params.split_seeds
        for cell in params.baseline_grid(method)
        if len(params.baseline_grid(method)) > 1
    ]
    if not specs:
        return pd.DataFrame(columns=["method", "split_seed", "cell", "groups", "accuracy", "ci95", "chosen"]), cells
    print(f"baselines: {len(specs)} trials, each method's grid on each of {params.splits} class splits")
    finished = run_missing("baselines-tuning", specs, params, tracking, "tune-baselines", fresh)
    rows = pd.DataFrame(
        {
            "method": trial.spec.kind,
            "split_seed": trial.spec.split_seed,
            "cell": _named(trial.spec.cell),
            "groups": trial.metrics["groups"],
            "accuracy": trial.metrics["validation_accuracy"],
            "ci95": trial.metrics["validation_ci95"],
        }
        for trial in finished
    )
    best = rows.groupby(["method", "split_seed"], sort=False)["accuracy"].idxmax()  # of equals, the first of the grid
    rows["chosen"] = rows.index.isin(best)
    for row in best:
        cells[finished[row].spec.kind][finished[row].spec.split_seed] = finished[row].spec.cell
    for key in {trial.run_key.rpartition("/")[0] for trial in finished}:
        tracking.finish(tracking.find_or_create(key, "tune-baselines"))
    return rows, cells


def _tuning_spec(params: Params, method: str, seed: int, cell: dict[str, Any]) -> Any:
    """A trial on the search's own groups: it reports once, and training from scratch takes fewer groups and epochs."""
    own = params.baselines
    name = f"{method}-split{seed}-{_named(cell).replace(', ', '-').replace(' ', '')}"
    validate = own.scratch_search_groups if method in SCRATCH else params.groups.validation_groups
    spec = make_spec(params, name, method, seed, cell, "search_train", validate)
    if method in SCRATCH:
        spec.model["epochs"] = own.scratch_search_epochs
    spec.train["report_every"] = params.groups.search_groups
    return spec


def _named(cell: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in cell.items())


def _measure_all(params: Params, methods: list[str], cells: Cells, fresh: bool) -> list[pd.DataFrame]:
    """Every method on every class split, side by side as Ray tasks; those that are kept are not run again."""
    folder, resources = str(Path.cwd()), cluster.share(params)
    remote = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"])(measure)
    tables: dict[tuple[str, int], pd.DataFrame] = {}
    running: dict[Any, tuple[str, int, str]] = {}
    for method in methods:
        for seed in params.split_seeds:
            cell = cells.get(method, {}).get(seed, {})
            key = measure_key(params, method, seed, cell)
            if not fresh and (kept := read_table(key)) is not None:
                tables[method, seed] = kept
            else:
                running[remote.remote(folder, params, method, seed, cell)] = method, seed, key
    if tables:
        print(f"  {len(tables)} of {len(tables) + len(running)} measurements are done already", flush=True)
    while running:
        (job,), _ = ray.wait(list(running))
        method, seed, key = running.pop(job)
        tables[method, seed] = ray.get(job)
        keep_table(key, tables[method, seed])
        print(f"  {method}, split {seed}: {tables[method, seed].group.nunique()} test groups done", flush=True)
    return [tables[method, seed] for method in methods for seed in params.split_seeds]


def _time(params: Params, methods: list[str]) -> dict[str, float]:
    """What PudNet and the others take to adapt, measured alone, once all else is done."""
    resources = cluster.share(params)
    timing = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"])(time_methods)
    return ray.get(timing.remote(str(Path.cwd()), params, ["pudnet", *methods]))


def _compare(frame: pd.DataFrame, pudnet: pd.DataFrame, method: str) -> dict[str, Any]:
    """A method's accuracy, and its difference to PudNet paired over the same test groups."""
    own = frame[frame.method == method]
    paired = own.merge(pudnet, on=["split_seed", "group"], suffixes=("", "_pudnet"), validate="one_to_one")
    paired["difference"] = paired.accuracy - paired.accuracy_pudnet
    difference = summary(paired, "difference")
    return {**summary(own), "difference": difference["accuracy"], "difference_ci95": difference["ci95"]}


def _log(
    tracking: Tracking,
    params: Params,
    method: str,
    frame: pd.DataFrame,
    compared: Mapping[str, Any],
    times: Mapping[str, float],
) -> None:
    """One MLflow run a method, with its own rows; training from scratch is a curve, a step an epoch."""
    run_id = tracking.find_or_create(f"baselines/{identity(params)}/{method}", f"baseline-{method}")
    tracking.log_params(run_id, {"method": method, "splits": params.splits, "seed": params.seed})
    for name, numbers in compared.items():
        metrics = {"test_accuracy": numbers["accuracy"], "test_ci95": numbers["ci95"]}
        metrics |= {key: numbers[key] for key in ("difference", "difference_ci95")}
        metrics |= {f"test_accuracy_split_{seed}": part["accuracy"] for seed, part in numbers["splits"].items()}
        metrics |= {"adapt_ms": times[name]} if name in times else {}
        tracking.log_metrics(run_id, metrics, step=int(name.rpartition("_")[2]) if method in SCRATCH else 0)
    tracking.client.log_text(run_id, frame.to_csv(index=False, float_format="%.4f"), "accuracies.csv")
    tracking.finish(run_id)


if __name__ == "__main__":
    run_stage(baselines)

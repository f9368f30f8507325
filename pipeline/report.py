"""The `report` stage: every number of a run on one page, beside the paper's, and the data of DVC's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.params import Params
from pipeline.project import RESULTS, write
from pipeline.reporting import figures
from pipeline.reporting.page import draw, render
from pipeline.reporting.results import histogram, movement, race, read_results
from pipeline.stage import run_stage


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
    from pipeline.runs.bench import identity
    from pipeline.tracking.runs import open_tracking

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

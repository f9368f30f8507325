"""Stage `report`: shows every number of a run beside the paper's on one page, and writes the data of DVC's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from pipeline.params import Params
from pipeline.project import RESULTS, write
from pipeline.reporting.drawing import to_png
from pipeline.reporting.page import draw, render
from pipeline.reporting.results import histogram, movement, race, read_results
from pipeline.stage import run_stage
from pipeline.tracking.evaluation import log_report
from pipeline.tracking.runs import open_tracking


def write_report(params: Params, folder: Path = RESULTS) -> None:
    """Write `report.html` and the files of DVC's plots from the earlier stages' results in `folder`."""
    results = read_results(folder)
    moved, raced = movement(results.predicted), race(results)
    bins = histogram(results.accuracies)
    pictures = draw(results, moved, raced, bins)
    plots = folder / "plots"
    searched = results.search if "eta" in results.search else results.search.assign(eta=params.configured({})[0].eta)
    tables = {
        "search": with_series(searched, ["split_seed", *(k for k in results.knobs if k != "eta")]),
        "loss_curves": with_series(results.curves, ["method", "split_seed"]),
        "accuracy_histogram": with_series(bins, ["method"]),
    }
    for name, table in tables.items():
        write(plots / f"{name}.csv", table.to_csv(index=False))
    for name, picture in pictures.items():
        if name != "curves":  # MLflow and DVC draw these themselves
            write(plots / f"{name}.png", to_png(picture))
    write(folder / "report.html", render(params, results, moved, raced, pictures))


def with_series(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Join the columns that tell a plot's lines apart into one, `series`, by which DVC's template colours them."""
    named = [table[column].map(lambda value, column=column: f"{column} {value}") for column in columns]
    return table.assign(series=[", ".join(parts) for parts in zip(*named, strict=True)])


def report(params: Params) -> None:
    """Write the report and log it."""
    write_report(params)
    tracking = open_tracking(params, "report")
    tracking.submit(lambda: log_report(tracking, params))
    print(f"report: {RESULTS / 'report.html'}; `python -m pipeline.answer` says the same in five rows")


if __name__ == "__main__":
    run_stage(report)

"""A study of weights as an initialisation (Table 5): trains each row's weights further, with a new linear head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.reporting.numbers import plus_minus
from pipeline.runs.keys import code_files
from pipeline.runs.measuring import measure_missing
from pipeline.studies.definition import Study, reported
from pipeline.studies.figures import lines_figure
from pipeline.studies.page import number, table_of, trained_on
from pipeline.studies.tasks import finetuning as tasks
from pipeline.studies.trained import TrainedColumn
from pudnet.evaluation import mean_half_width

SHOWN = (1, 5, 10, 20, 30, 50)  # epochs that the table shows, besides the last


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Measure a column: for each row and epoch, the mean accuracy over splits, and its interval over test images."""
    plan, rows = trained.study.finetune, []
    code = [Path(tasks.__file__), *code_files(["finetune", "scratch"])]
    keys = {(cell, plan): cell.key(trained.params, asdict(plan), code=code) for cell in trained.cells.values()}
    tables = measure_missing(
        trained.params, tasks.curve_of, keys, lambda one, table: f"{one[0].spec.name}: {table.epoch.max()} epochs done"
    )
    for row, own in trained.study.rows.items():
        curves = [tables[trained.cells[row, seed], plan] for seed in trained.params.split_seeds]
        for seed, of_split in zip(trained.params.split_seeds, curves, strict=True):
            points = {"test_accuracy": dict(zip(of_split.epoch, of_split.accuracy, strict=True))}
            trained.log(row, seed, {}, points, key=keys[trained.cells[row, seed], plan])
        figure = reported(trained.definition, own)
        for points in zip(*(one.itertuples() for one in curves), strict=True):
            last = points[0].epoch == plan.epochs
            rows.append(
                {
                    "row": row,
                    "column": trained.column,
                    "splits": trained.params.splits,
                    **trained.length(row),
                    "epoch": points[0].epoch,
                    "accuracy": np.mean([point.accuracy for point in points]),
                    "ci95": mean_half_width([(point.accuracy, point.test_images) for point in points]),
                    "seconds": np.median([point.seconds for point in points]),
                    "images": points[0].images,
                    "test_images": points[0].test_images,
                    "paper": figure.accuracy if figure and last else None,
                    "paper_ci95": figure.ci95 if figure and last else None,
                }
            )
    return pd.DataFrame(rows)


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw one panel for each column, with one line for each row."""
    points = table[table.epoch > 0].rename(columns={"column": "panel", "row": "line", "epoch": "x", "accuracy": "y"})
    return lines_figure(points, "epochs", "accuracy, %")


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column, of rows by some epochs."""
    page = ""
    for column, part in table.groupby("column", sort=False):
        last, first = part.epoch.max(), part.iloc[0]
        shown = sorted({epoch for epoch in SHOWN if epoch < last} | {last})
        columns = {"start": part.row.unique().tolist()}
        for epoch in shown:
            at = part[part.epoch == epoch].itertuples()
            columns["1 epoch" if epoch == 1 else f"{epoch} epochs"] = [
                plus_minus(line.accuracy, line.ci95) for line in at
            ]
        at_end = part[part.epoch == last]
        columns["the paper's"] = [plus_minus(line.paper, line.paper_ci95) for line in at_end.itertuples()]
        columns["less the paper's"] = [
            number(line.accuracy - line.paper if line.paper else None, "{:+.2f}") for line in at_end.itertuples()
        ]
        caption = (
            f"{trained_on(part)}, for methods that are trained on groups; fine-tuned on "
            f"{first.images:,} images, measured on {first.test_images:,}, {first.splits} class split(s)."
        )
        page += f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"
    return page

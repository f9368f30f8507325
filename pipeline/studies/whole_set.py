"""A study of one labelled set with far more classes than a group, such as ImageNet-1K.

Weights, and the centroids of all classes, come from one folder of images, top-k accuracy from another. Images are read
in parts, never all at once.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.project import root
from pipeline.reporting.numbers import duration, plus_minus
from pipeline.runs.keys import code_files
from pipeline.runs.measuring import measure_missing
from pipeline.studies.definition import Study, WholeSet, reported
from pipeline.studies.figures import bars_figure
from pipeline.studies.page import number, table_of, trained_on
from pipeline.studies.tasks import whole_set as tasks
from pipeline.studies.trained import TrainedColumn
from pipeline.studies.workspace import files_of
from pudnet.errors import UserError
from pudnet.evaluation import mean_half_width


def check(plan: WholeSet) -> None:
    """Raise `UserError` if one of the folders is missing."""
    for folder in (plan.images, plan.test_images):
        if not (root() / folder).is_dir():
            raise UserError(
                f"folder {folder}: not there; put images of {plan.classes:,} classes there, one folder for each class"
            )


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Measure a column: one line for each row."""
    plan, lines = trained.study.whole, []
    there = replace(plan, images=str(root() / plan.images), test_images=str(root() / plan.test_images))
    files = [files_of("folder", folder) for folder in (there.images, there.test_images)]
    code = [Path(tasks.__file__), *code_files(["data/user_images", "data/decode", "data/folders"])]
    keys = {(cell, there): cell.key(trained.params, asdict(plan), files, code=code) for cell in trained.cells.values()}
    tables = measure_missing(
        trained.params,
        tasks.accuracy_of,
        keys,
        lambda one, table: f"{one[0].spec.name}: {table.images[0]:,} test images done",
    )
    for row, definition in trained.study.rows.items():
        found = pd.concat([tables[trained.cells[row, seed], there] for seed in trained.params.split_seeds])
        for seed, accuracy in zip(trained.params.split_seeds, found.accuracy, strict=True):
            key = keys[trained.cells[row, seed], there]
            trained.log(row, seed, {f"top{plan.top}_accuracy": accuracy}, {}, key=key)
        figure = reported(trained.definition, definition)
        lines.append(
            {
                "row": row,
                "column": trained.column,
                "splits": trained.params.splits,
                **trained.length(row),
                "top": plan.top,
                "classes": found.classes.iloc[0],
                "images": found.images.iloc[0],
                "accuracy": found.accuracy.mean(),
                "ci95": np.mean([mean_half_width([own]) for own in zip(found.accuracy, found.images, strict=True)]),
                "paper": figure and figure.accuracy,
                "seconds": found.seconds.median(),
                "paper_seconds": figure and figure.seconds,
            }
        )
    return pd.DataFrame(lines)


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw each row's accuracy, with the paper's beside it."""
    return bars_figure(table, f"top-{study.whole.top} accuracy, %")


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column."""
    page = ""
    for column, part in table.groupby("column", sort=False):
        first, lines = part.iloc[0], list(part.itertuples())
        caption = (
            f"{trained_on(part)}, {first.classes:,} classes, {first.images:,} test images, "
            f"{first.splits} class split(s)."
        )
        columns = {
            "": [line.row for line in lines],
            f"top-{first.top} accuracy": [plus_minus(line.accuracy, line.ci95) for line in lines],
            "the paper's": [number(line.paper, "{:.2f}") for line in lines],
            "time": [duration(1000 * line.seconds) for line in lines],
            "the paper's, on its GPU": (1000 * part.paper_seconds.astype(float)).map(duration),
        }
        page += f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"
    return page

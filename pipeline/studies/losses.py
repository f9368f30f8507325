"""A study of training: the losses of each row over the number of groups seen (Fig. 9)."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from pipeline.studies.definition import Study
from pipeline.studies.figures import lines_figure
from pipeline.studies.page import number, table_of, trained_on
from pipeline.studies.trained import TrainedColumn

NAMES = {"metric_loss": "metric loss, L1", "loss": "total loss"}
SHOWN = 12  # about as many lines in a table


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Collect a column's reports: one line for each report of each training."""
    lines = []
    for (row, seed), ended in trained.ended.items():
        reports = ended.history
        trained.log(row, seed, {}, {loss: {int(r["groups"]): r[loss] for r in reports} for loss in NAMES})
        own = {"row": row, "column": trained.column, "seed": seed, **trained.length(row)}
        lines += [{**own, "groups": int(r["groups"]), **{loss: r[loss] for loss in NAMES}} for r in reports]
    return pd.DataFrame(lines)


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw one panel for each column, with one line for each row and loss."""
    points = _means(table).melt(["column", "row", "groups"], list(NAMES), var_name="loss", value_name="y")
    points["line"] = points.row + ": " + points.loss.map(NAMES) if len(study.rows) > 1 else points.loss.map(NAMES)
    return lines_figure(points.rename(columns={"column": "panel", "groups": "x"}), "training groups seen", "loss")


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column, of some of the reports."""
    page = ""
    for column, part in _means(table).groupby("column", sort=False):
        reports = sorted(part.groups.unique())
        shown = reports[:: max(1, len(reports) // SHOWN)]
        columns = {"groups seen": [f"{groups:,}" for groups in shown]}
        for row, own in part.set_index("groups").groupby("row", sort=False):
            for loss, name in NAMES.items():
                columns[f"{row}: {name}"] = [number(own[loss].get(groups), "{:.3f}") for groups in shown]
        caption = f"{trained_on(table[table.column == column])}, {table.seed.nunique()} class split(s)."
        page += f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"
    return page


def _means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over class splits."""
    return table.groupby(["column", "row", "groups"], sort=False, as_index=False)[list(NAMES)].mean()

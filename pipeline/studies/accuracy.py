"""A study of accuracies: each row adapted to test groups, measured on their twins, beside the paper's figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pipeline.bench import compare, summary
from pipeline.figures import bars_figure, differences_figure, lines_figure
from pipeline.reported import load_reported
from pipeline.studies.cells import Diagnosis, diagnose_cells, measure_cells, time_cells
from pipeline.studies.definition import Study, point, reported
from pipeline.studies.page import number, plus_minus, table_of
from pipeline.studies.work import Work
from pudnet.evaluation import mean_interval


def measure(work: Work) -> pd.DataFrame:
    """A line a row."""
    study, params = work.study, work.params
    cells = [cell for own in work.trainings.values() for cell in own]
    measured = dict(zip(cells, measure_cells(params, cells), strict=True))
    tables = {at: [measured[cell] for cell in own] for at, own in work.trainings.items()}
    trained = {  # of each training the rows of all splits
        row: [pd.concat(own) for own in zip(*(tables[row, seed] for seed in params.split_seeds), strict=True)]
        for row in study.rows
    }
    frames = {row: _mean(own) for row, own in trained.items()}
    times, diagnoses = _times(work), _diagnoses(work)
    for row, seed in tables:
        _log(work, row, seed, tables, times.get(row))
    return pd.DataFrame(
        [
            {
                "row": row,
                "column": work.column,
                "splits": params.splits,
                "train_groups": work.groups(row),
                **_numbers(frame, frames.get(study.reference)),
                **_over_trainings(trained[row], trained.get(study.reference)),
                **_paper(work, row),
                "milliseconds": times.get(row),
                **asdict(diagnoses.get(row, Diagnosis(math.nan, math.nan))),
            }
            for row, frame in frames.items()
        ]
    )


def _mean(trainings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Of each test group the mean accuracy over trainings."""
    return trainings[0].assign(accuracy=np.mean([one.accuracy.to_numpy() for one in trainings], axis=0))


def _over_trainings(own: Sequence[pd.DataFrame], reference: Sequence[pd.DataFrame] | None) -> dict[str, float]:
    """What a seed of training moves: the accuracies, their deviation, and the interval of the difference (Student's t).

    The n-th training of a row stands beside the reference's n-th.
    """
    accuracies, others = ([summary(one)["accuracy"] for one in frames] for frames in (own, reference or own))
    count = max(len(accuracies), len(others))  # what is not trained is there once
    differences = [accuracies[n % len(accuracies)] - others[n % len(others)] for n in range(count)]
    return {
        "trainings": len(own),
        "trainings_accuracies": " ".join(f"{one:.2f}" for one in accuracies) if len(own) > 1 else "",
        "trainings_sd": np.std(accuracies, ddof=1) if len(own) > 1 else math.nan,
        "difference_ci95_trainings": mean_interval(differences)[1] if reference else math.nan,
    }


def _times(work: Work) -> dict[str, float]:
    """What adapting to a group takes, of rows whose sketch is their own."""
    own = [row for row, cell in work.study.rows.items() if cell.sketch == "own"]
    return time_cells(work.params, {row: work.cells[row, work.params.seed] for row in own})


def _diagnoses(work: Work) -> dict[str, Diagnosis]:
    if not work.study.diagnose:
        return {}
    rows = [row for row, own in work.study.rows.items() if own.sketch == "own" and own.method == "pudnet"]
    found = diagnose_cells(work.params, [work.cells[row, work.params.seed] for row in rows])
    return dict(zip(rows, found, strict=True))


def _numbers(frame: pd.DataFrame, reference: pd.DataFrame | None) -> dict[str, Any]:
    numbers = summary(frame) if reference is None else compare(frame, reference)
    return {key: value for key, value in numbers.items() if key != "splits"}


def _paper(work: Work, row: str) -> dict[str, float | None]:
    figure = reported(work.own, work.study.rows[row])
    if figure is None:
        return dict.fromkeys(("paper", "paper_ci95", "paper_seconds"))
    return {"paper": figure.accuracy, "paper_ci95": figure.ci95, "paper_seconds": figure.seconds}


def _log(
    work: Work, row: str, seed: int, tables: dict[tuple[str, int], list[pd.DataFrame]], time: float | None
) -> None:
    """A run for each training, compared with the reference's that stands beside it."""
    reference = tables.get((work.study.reference, seed))
    for n, table in enumerate(tables[row, seed]):
        numbers = _numbers(table, reference and reference[n % len(reference)])
        named = {"accuracy": "test_accuracy", "ci95": "test_ci95"}
        metrics = {named.get(key, key): value for key, value in numbers.items() if not pd.isna(value)}
        work.log(row, seed, metrics | ({} if time is None else {"adapt_ms": time}), {}, n)


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Lines over the axis; without one, each row's difference to the reference, if there is one."""
    if study.axis is None and study.reference is not None:
        widest = table.difference_ci95_trainings.fillna(table.difference_ci95)
        return differences_figure(table.assign(difference_ci95=widest), study.reference)
    if study.axis is None:
        return bars_figure(table, "accuracy, %")
    return lines_figure(_points(study, table), study.axis_name, "accuracy, %", log=study.axis == "columns")


def _points(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Lines as `lines_figure` takes them: a panel a set of columns, a line a row, or the other way round."""
    named = table.row if study.axis == "rows" else table.column
    panels, places = zip(*map(point, named), strict=True)
    other = table.column if study.axis == "rows" else table.row
    parts = {"panel": other, "line": panels} if study.axis == "rows" else {"panel": panels, "line": other}
    numbers = table[["paper", "paper_ci95"]].rename(columns={"paper": "reference", "paper_ci95": "reference_ci95"})
    return pd.DataFrame({**parts, "x": places, "y": table.accuracy, "ci95": table.ci95}).join(numbers)


def tables(study: Study, table: pd.DataFrame) -> str:
    """A table a column, or where columns are an axis a table a panel."""
    if study.axis == "columns":
        panels = table.column.map(lambda column: point(column)[0])
        return "".join(_grid(study, panel, part) for panel, part in table.groupby(panels, sort=False))
    columns = [_table(study, column, part) for column, part in table.groupby("column", sort=False)]
    return (f"\n{overview(study, table)}" if len(columns) > 1 else "") + "".join(columns)


def overview(study: Study, table: pd.DataFrame) -> str:
    """Rows by columns: accuracies, and in brackets the differences to the reference."""
    lines = {(line.row, line.column): line for line in table.itertuples()}
    columns = {"": table.row.unique().tolist()}
    for column in table.column.unique():
        columns[column] = [_overview_cell(study, lines[row, column]) for row in columns[""]]
    return table_of(columns)


def _overview_cell(study: Study, line: Any) -> str:
    accuracy = plus_minus(line.accuracy, line.ci95)
    if study.reference in (None, line.row):
        return accuracy
    return f"{accuracy} ({plus_minus(line.difference, line.difference_ci95, '+')})"


def _table(study: Study, column: str, part: pd.DataFrame) -> str:
    first, hardware = part.iloc[0], load_reported()["hardware"]
    told = (
        f"{part.train_groups.max():,} training groups, {part.test_groups.max():,} test groups, "
        f"{first.splits} class split(s)."
    )
    columns = {
        study.axis_name if study.axis == "rows" else "": part.row,
        "accuracy": [plus_minus(line.accuracy, line.ci95) for line in part.itertuples()],
        "the paper's": [plus_minus(line.paper, line.paper_ci95) for line in part.itertuples()],
        "less the paper's": _to_the_papers(part),
        "groups": part.test_groups.map("{:,}".format) if part.test_groups.nunique() > 1 else None,
        f"less {study.reference}": _differences(study, part),
        "± over trainings": _but_of_the_reference(study, part, part.difference_ci95_trainings, "± {:.2f}"),
        "deviation of a training": part.trainings_sd.map(lambda value: number(value, "{:.2f}")),
        f"the paper's, less {study.reference}": _papers_differences(study, part),
        "time a group": part.milliseconds.map(lambda value: number(value, "{:,.0f} ms")),
        f"the paper's ({hardware})": part.paper_seconds.map(lambda value: number(value, "{:,.2f} s")),
        "weights move": part.movement.map(lambda value: number(value, "{:.1f} %")),
        "probe": part.probe.map(lambda value: number(value, "{:.0f}")),
    }
    return f"\n## {column}\n\n{told}\n\n{table_of(columns)}"


def _to_the_papers(part: pd.DataFrame) -> pd.Series:
    return (part.accuracy - part.paper.astype(float)).map(lambda value: number(value, "{:+.2f}"))


def _differences(study: Study, part: pd.DataFrame) -> list[str] | None:
    if study.reference is None:
        return None
    return [
        "" if line.row == study.reference else plus_minus(line.difference, line.difference_ci95, "+")
        for line in part.itertuples()
    ]


def _but_of_the_reference(study: Study, part: pd.DataFrame, values: pd.Series, form: str) -> list[str]:
    return [number(value, form) for value in values.where(part.row != study.reference)]


def _papers_differences(study: Study, part: pd.DataFrame) -> list[str] | None:
    """What `_differences` are in the paper, where it has the reference."""
    reference = part.paper[part.row == study.reference].astype(float)
    if reference.empty or reference.isna().all():
        return None
    return _but_of_the_reference(study, part, part.paper.astype(float) - reference.item(), "{:+.2f}")


def _grid(study: Study, panel: str, part: pd.DataFrame) -> str:
    """Places on the axis by rows, each with the paper's figure and the difference to it beside."""
    columns = {study.axis_name: [f"{point(column)[1]:,.0f}" for column in part.column.unique()]}
    for row, own in part.groupby("row", sort=False):
        columns[row] = [plus_minus(line.accuracy, line.ci95) for line in own.itertuples()]
        columns[f"{row}, the paper's"] = [plus_minus(line.paper, line.paper_ci95) for line in own.itertuples()]
        columns[f"{row}, less the paper's"] = _to_the_papers(own)
    told = f"{part.test_groups.iloc[0]:,} test groups, {part.splits.iloc[0]} class split(s)."
    return f"\n## {panel or 'All'}\n\n{told}\n\n{table_of(columns)}"

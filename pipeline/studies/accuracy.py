"""A study of accuracies: adapts each row to test groups, measures it on their twins, and compares with the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import stdtrit

from pipeline.params import Params
from pipeline.reporting.numbers import duration, plus_minus
from pipeline.reporting.paper import load_reported
from pipeline.runs import cluster
from pipeline.runs.summary import compare, summary
from pipeline.studies.cells import diagnose_cells, measure_cells, time_cells
from pipeline.studies.definition import Study, point, reported
from pipeline.studies.figures import bars_figure, differences_figure, lines_figure, times_figure
from pipeline.studies.page import number, table_of, trained_on
from pipeline.studies.trained import TrainedColumn
from pudnet.config import passed
from pudnet.evaluation import mean_interval
from pudnet.settings import get_setting


def measure(trained: TrainedColumn) -> pd.DataFrame:
    """Measure a column: one line for each row."""
    study, params = trained.study, trained.params
    setting = get_setting(params.setting)
    cells = [cell for own in trained.trainings.values() for cell in own]
    measured = dict(zip(cells, measure_cells(params, cells), strict=True))
    tables = {at: [measured[cell] for cell in own] for at, own in trained.trainings.items()}
    by_training = {  # row -> for each training, the accuracies on all splits
        row: [pd.concat(own) for own in zip(*(tables[row, seed] for seed in params.split_seeds), strict=True)]
        for row in study.rows
    }
    frames = {row: _mean(own) for row, own in by_training.items()}
    accuracies = {row: [summary(one)["accuracy"] for one in own] for row, own in by_training.items()}
    spread = Spread.of(accuracies, {row: _models(trained, row) for row in study.rows})
    times, diagnoses = _times(trained, params), _diagnoses(trained)
    everything = replace(params, resources=replace(params.resources, cpus=cluster.largest_node(params)))
    fast_times = _times(trained, everything) if study.axis == "time" else {}
    for row, seed in tables:
        _log(trained, row, seed, tables, times.get(row))
    return pd.DataFrame(
        [
            {
                "row": row,
                "column": trained.column,
                "splits": params.splits,
                **trained.length(row),
                "paper_groups": None if setting.ours else setting.train_groups,
                **_numbers(frame, frames.get(study.reference_of(row))),
                **_over_trainings(trained, row, accuracies, spread),
                **_paper(trained, row),
                "milliseconds": times.get(row),
                "threads": params.resources.cpus,
                "milliseconds_all_threads": fast_times.get(row),
                "all_threads": everything.resources.cpus,
                **diagnoses.get(row, {"movement": math.nan, "probe": math.nan}),
            }
            for row, frame in frames.items()
        ]
    )


def _mean(trainings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean accuracy over trainings, for each test group."""
    return trainings[0].assign(accuracy=np.mean([one.accuracy.to_numpy() for one in trainings], axis=0))


@dataclass(frozen=True)
class Spread:
    """How much a seed changes a training's accuracy: one standard deviation for all rows of a column."""

    deviation: float
    freedom: int

    @classmethod
    def of(cls, accuracies: Mapping[str, Sequence[float]], models: Mapping[str, tuple[Path | None, ...]]) -> Spread:
        """Pool the deviation over the rows that were trained more than once.

        Rows of the same models share their degrees of freedom: they are one training, measured in several ways.
        """
        several = [row for row, own in accuracies.items() if len(own) > 1]
        freedom = sum(len(trainings) - 1 for trainings in {models[row] for row in several})
        variances = [np.var(accuracies[row], ddof=1) for row in several]
        return cls(math.sqrt(np.mean(variances)) if several else math.nan, freedom)

    def half_width(self, *counts: int) -> float:
        """Half-width of the 95% interval (Student's t) of a mean over trainings, or of two means' difference."""
        parts = sum(1 / count for count in counts if count > 1)  # a row without training has no such uncertainty
        return float(stdtrit(self.freedom, 0.975)) * self.deviation * math.sqrt(parts) if parts else math.nan


def _models(trained: TrainedColumn, row: str) -> tuple[Path | None, ...]:
    """The trained models of a row, on the first class split."""
    return tuple(cell.checkpoint for cell in trained.trainings[row, trained.params.seed])


def _over_trainings(
    trained: TrainedColumn, row: str, accuracies: Mapping[str, Sequence[float]], spread: Spread
) -> dict[str, Any]:
    """What the training seed changes: a row's accuracies, their deviation, and intervals.

    If a row uses the reference's own models, its difference to the reference is paired over trainings; else it is a
    difference of means.
    """
    own, reference = accuracies[row], trained.study.reference_of(row)
    several, half = len(own) > 1, math.nan
    if reference is not None and row != reference:
        others, shared = accuracies[reference], several and _models(trained, row) == _models(trained, reference)
        half = mean_interval(np.subtract(own, others))[1] if shared else spread.half_width(len(own), len(others))
    return {
        "trainings": len(own),
        "trainings_accuracies": " ".join(f"{one:.2f}" for one in own) if several else "",
        "trainings_sd": np.std(own, ddof=1) if several else math.nan,
        "trainings_ci95": spread.half_width(len(own)),
        "difference_ci95_trainings": half,
    }


def _over_both(table: pd.DataFrame) -> pd.DataFrame:
    """Combine the intervals over test groups and over trainings, which are independent of each other."""
    pairs = (("ci95", "trainings_ci95"), ("difference_ci95", "difference_ci95_trainings"))
    return table.assign(
        **{groups: np.hypot(table[groups], table[own].fillna(0)) for groups, own in pairs if groups in table}
    )


def _times(trained: TrainedColumn, params: Params) -> dict[str, float]:
    """Milliseconds of adapting to a group, for the rows that use each group's own sketch."""
    own = [row for row, cell in trained.study.rows.items() if cell.sketch == "own"]
    return time_cells(params, {row: trained.cells[row, params.seed] for row in own})


def _diagnoses(trained: TrainedColumn) -> dict[str, dict[str, float]]:
    if not trained.study.diagnose:
        return {}
    rows = [
        row
        for row, own in trained.study.rows.items()
        if own.sketch == "own" and own.method == "pudnet" and own.finetune is None
    ]
    found = diagnose_cells(trained.params, [trained.cells[row, trained.params.seed] for row in rows])
    return {row: table.iloc[0].to_dict() for row, table in zip(rows, found, strict=True)}


def _numbers(frame: pd.DataFrame, reference: pd.DataFrame | None) -> dict[str, Any]:
    numbers = summary(frame) if reference is None else compare(frame, reference)
    return {key: value for key, value in numbers.items() if key != "splits"}


def _paper(trained: TrainedColumn, row: str) -> dict[str, float | None]:
    figure = reported(trained.definition, trained.study.rows[row])
    if figure is None:
        return dict.fromkeys(("paper", "paper_ci95", "paper_seconds"))
    return {"paper": figure.accuracy, "paper_ci95": figure.ci95, "paper_seconds": figure.seconds}


def _log(
    trained: TrainedColumn, row: str, seed: int, tables: dict[tuple[str, int], list[pd.DataFrame]], time: float | None
) -> None:
    """Log a run for each training, with its difference to the reference's training of the same number."""
    reference = tables.get((trained.study.reference_of(row), seed))
    for n, table in enumerate(tables[row, seed]):
        numbers = _numbers(table, reference and reference[n % len(reference)])
        named = {"accuracy": "test_accuracy", "ci95": "test_ci95"}
        metrics = {named.get(key, key): value for key, value in numbers.items() if not pd.isna(value)}
        timed = time is not None and (seed, n) == (trained.params.seed, 0)  # only this training was timed
        trained.log(row, seed, metrics | ({"adapt_ms": time} if timed else {}), {}, n)


def figure(study: Study, table: pd.DataFrame) -> Figure:
    """Draw lines over the study's axis; without an axis, differences to the reference, or else accuracies."""
    table = _over_both(table)
    if study.axis == "time":
        reference = next(iter(study.references), None)
        return times_figure(on_all_groups(table, reference), reference)
    if study.axis is None and study.references:
        return differences_figure(table, study.references)
    if study.axis is None:
        return bars_figure(table, "accuracy, %")
    return lines_figure(_points(study, table), study.axis_name, "accuracy, %", log=study.axis == "columns")


def on_all_groups(table: pd.DataFrame, reference: str | None) -> pd.DataFrame:
    """Estimate what rows that were measured on fewer groups than the reference would have on all of its groups.

    It is the reference's accuracy plus their difference to it, which is paired over the groups that both have.
    """
    if reference is None:
        return table
    of_reference = table[table.row == reference].set_index("column").loc[table.column].set_axis(table.index)
    fewer = table.test_groups < of_reference.test_groups
    estimate = of_reference.accuracy + table.difference
    half = np.hypot(of_reference.ci95, table.difference_ci95)
    return table.assign(accuracy=estimate.where(fewer, table.accuracy), ci95=half.where(fewer, table.ci95))


def _points(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """The points for `lines_figure`: the axis's part has the panel and the place, the other part gives the lines."""
    named = table.row if study.axis == "rows" else table.column
    panels, places = zip(*map(point, named), strict=True)
    other = table.column if study.axis == "rows" else table.row
    parts = {"panel": other, "line": panels} if study.axis == "rows" else {"panel": panels, "line": other}
    return pd.DataFrame({**parts, "x": places, "y": table.accuracy, "ci95": table.ci95, "reference": table.paper})


def tables(study: Study, table: pd.DataFrame) -> str:
    """One table for each column; if the columns are the axis, one table for each panel."""
    table = _over_both(table)
    if study.axis == "columns":
        panels = table.column.map(lambda column: point(column)[0])
        return "".join(_grid(study, panel, part) for panel, part in table.groupby(panels, sort=False))
    columns = [_table(study, column, part) for column, part in table.groupby("column", sort=False)]
    return (f"\n{overview(study, table)}" if len(columns) > 1 else "") + "".join(columns)


def overview(study: Study, table: pd.DataFrame) -> str:
    """A table of rows by columns with accuracies and, in brackets, differences to the reference."""
    lines = {(line.row, line.column): line for line in table.itertuples()}
    rows = table.row.unique().tolist()
    columns = {study.axis_name if study.axis == "rows" else "": rows}
    for column in table.column.unique():
        columns[column] = [_overview_cell(study, lines[row, column]) for row in rows]
    return table_of(columns)


def _overview_cell(study: Study, line: Any) -> str:
    accuracy = plus_minus(line.accuracy, line.ci95)
    if not study.references or line.row in study.references:
        return accuracy
    return f"{accuracy} ({plus_minus(line.difference, line.difference_ci95, '+')})"


def _table(study: Study, column: str, part: pd.DataFrame) -> str:
    first, hardware = part.iloc[0], load_reported()["hardware"]
    less = f"less {study.references[0]}" if len(study.references) == 1 else "difference"
    papers = "" if pd.isna(first.paper_groups) else f" (the paper: {first.paper_groups:,.0f} groups)"
    classes = (study.over | study.columns[column].changes).get("groups.test_classes_per_group")
    tested = f"{part.test_groups.max():,} test groups" + (f" of {classes} classes" if classes else "")
    caption = f"{trained_on(part)}{papers}, {tested}, {first.splits} class split(s)."
    given = [study.rows[row].images for row in part.row]
    columns = {
        study.axis_name if study.axis == "rows" else "": part.row,
        "accuracy": [plus_minus(line.accuracy, line.ci95) for line in part.itertuples()],
        "the paper's": [plus_minus(line.paper, line.paper_ci95) for line in part.itertuples()],
        "less the paper's": _to_the_papers(part),
        "groups": part.test_groups.map("{:,}".format) if part.test_groups.nunique() > 1 else None,
        "passes": part.passes.map(lambda value: number(value, "{:.3g}")) if part.passes.nunique() > 1 else None,
        "labels, at most": [f"{images:,}" if images else "" for images in given] if any(given) else None,
        less: _differences(study, part),
        "deviation of a training": part.trainings_sd.map(lambda value: number(value, "{:.2f}")),
        f"the paper's, {less}": _papers_differences(study, part),
        "time a group": part.milliseconds.map(duration),
        f"with {first.all_threads} threads": part.milliseconds_all_threads.map(duration),
        f"the paper's ({hardware})": (1000 * part.paper_seconds.astype(float)).map(duration),
        "weights move": part.movement.map(lambda value: number(value, "{:.1f} %")),
        "probe": part.probe.map(lambda value: number(value, "{:.0f}")),
    }
    return f"\n## {column}\n\n{caption}\n\n{table_of(columns)}"


def _to_the_papers(part: pd.DataFrame) -> pd.Series:
    return (part.accuracy - part.paper.astype(float)).map(lambda value: number(value, "{:+.2f}"))


def _differences(study: Study, part: pd.DataFrame) -> list[str] | None:
    if not study.references:
        return None
    return [
        "" if line.row in study.references else plus_minus(line.difference, line.difference_ci95, "+")
        for line in part.itertuples()
    ]


def _papers_differences(study: Study, part: pd.DataFrame) -> list[str] | None:
    """The paper's own differences to the references, if it reports them."""
    paper = part.set_index("row").paper.astype(float)
    references = part.row.map(study.reference_of)
    if paper.reindex(references).isna().all():
        return None
    differences = paper - paper.reindex(references).to_numpy()
    return [number(value, "{:+.2f}") for value in differences.where(~paper.index.isin(study.references))]


def _grid(study: Study, panel: str, part: pd.DataFrame) -> str:
    """A table of places on the axis by rows, with the paper's result and the difference to it beside each."""
    columns = {study.axis_name: [f"{point(column)[1]:,.10g}" for column in part.column.unique()]}
    for row, own in part.groupby("row", sort=False):
        columns[row] = [plus_minus(line.accuracy, line.ci95) for line in own.itertuples()]
        columns[f"{row}, the paper's"] = [plus_minus(line.paper, line.paper_ci95) for line in own.itertuples()]
        columns[f"{row}, less the paper's"] = _to_the_papers(own)
    caption = f"{part.test_groups.iloc[0]:,} test groups, {part.splits.iloc[0]} class split(s)."
    passes = part.passes.dropna()
    caption += f" Training groups are {passed(*passes)}." if len(passes) else ""
    return f"\n## {panel or 'All'}\n\n{caption}\n\n{table_of(columns)}"

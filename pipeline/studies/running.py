"""Runs one study: trains, measures and writes one column after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.params import PARAMS, Params
from pipeline.project import Busy, write
from pipeline.reporting.drawing import to_png
from pipeline.studies import accuracy, correlation, finetuning, losses, page, trained, whole_set, workspace
from pipeline.studies.definition import STUDIES, Study
from pudnet.errors import UserError

KINDS = {
    "accuracy": accuracy,
    "losses": losses,
    "finetune": finetuning,
    "correlation": correlation,
    "whole": whole_set,
}


def run_study(name: str, study: Study, columns: Mapping[str, Params], left_out: Mapping[str, str]) -> None:
    """Run a study. A column whose data is missing is left out, and the page says what is missing.

    Raises `UserError` if no column is left, or, after the other columns have run, if a column does not fit its data;
    and at once if another process runs the same trainings.
    """
    frames, left_out, waiting, unfit = [], dict(left_out), dict.fromkeys(columns, "not yet"), None
    for column, params in columns.items():
        del waiting[column]
        try:
            workspace.get_data(params)
            if study.whole is not None:
                whole_set.check(study.whole)
        except UserError as error:
            again = (
                f"then `python -m pipeline.study {name}` runs it (for a copy elsewhere set study.sources in {PARAMS})"
            )
            left_out[column] = f"{error}; {again}"
            print(f"study: {name}, {column}: not run: {left_out[column]}", flush=True)
            continue
        try:
            with workspace.workspace(params):
                frames.append(KINDS[study.measure].measure(trained.train(name, study, column, params)))
        except Busy:  # another study has some of the same trainings
            raise
        except UserError as error:
            left_out[column], unfit = str(error), unfit or f"study: {name}, {column}: {error}"
            print(f"study: {name}, {column}: not run: {error}", flush=True)
        if waiting and frames:  # write what there is so far; after the last column it is written below
            _write(name, study, frames, left_out | waiting, params)
    if not frames:
        raise UserError(f"study: {name}: no column can be run, for the reasons above")
    _write(name, study, frames, left_out, params)
    if unfit:
        raise UserError(unfit)
    print(f"study: {name}: {sum(map(len, frames))} lines in {STUDIES / 'results' / name}.md")


def _write(
    name: str, study: Study, frames: Sequence[pd.DataFrame], left_out: Mapping[str, str], params: Params
) -> None:
    """Write the study as measured so far: a table, a figure, a page. `params` are those of any column."""
    table, kind, folder = pd.concat(frames, ignore_index=True), KINDS[study.measure], STUDIES / "results"
    table.insert(0, "study", name)
    write(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    write(folder / f"{name}.png", to_png(kind.figure(study, table)))
    write(folder / f"{name}.md", page.render(name, study, kind.tables(study, table), left_out, params))

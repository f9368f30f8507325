"""Studies: a table or figure of rows (methods, variants) by columns (settings, budgets), from one YAML file.

`python -m pipeline.study NAME ...` reads studies/NAME.yaml, trains and measures every cell that is not done yet, on
every class split, and writes studies/results/NAME.csv, NAME.md and NAME.png. Each training is a Ray trial; each cell
has one MLflow run for each class split.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from pipeline.params import Params, StudyParams
from pipeline.project import locked, write
from pipeline.reporting.figures import to_png
from pipeline.runs import cluster
from pipeline.studies import accuracy, correlation, finetuning, losses, page, trained, whole_set
from pipeline.studies.definition import STUDIES, Study, check_rows, column_params, load_study, wanted
from pudnet.errors import UserError, exit_code

KINDS = {
    "accuracy": accuracy,
    "losses": losses,
    "finetune": finetuning,
    "correlation": correlation,
    "whole": whole_set,
}


def run(names: Sequence[str]) -> None:
    """Check all studies, then run what is not done of them, one study after the other."""
    studies = {name: load_study(name) for name in names}
    chosen = {}
    for name, study in studies.items():
        with _of(name):
            chosen[name] = wanted(study, {column: column_params(study, column) for column in study.columns})
    for name, (columns, _) in chosen.items():
        for column in columns.values():
            with _of(name):
                check_rows(studies[name], column)
    with cluster.session():
        for name, (columns, left_out) in chosen.items():
            with locked(Path(".pud") / f"study-{name}.lock"):
                _run(name, studies[name], columns, left_out)


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    """Name the study's file in errors from the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{STUDIES / name}.yaml: {error}") from None


def _run(name: str, study: Study, columns: Mapping[str, Params], left_out: Mapping[str, str]) -> None:
    """Run one study. A column whose data is missing is left out, and the page says what is missing.

    Raises `UserError` if no column is left, or, after the other columns have run, if a column does not fit its data.
    """
    frames, left_out, waiting, unfit = [], dict(left_out), dict.fromkeys(columns, "not yet"), None
    for column, params in columns.items():
        del waiting[column]
        try:
            trained.get_data(params)
            if study.whole is not None:
                whole_set.check(study.whole)
        except UserError as error:
            left_out[column] = str(error)
            print(f"study: {name}, {column}: not run: {error}", flush=True)
            continue
        try:
            with trained.workspace(params):
                frames.append(KINDS[study.measure].measure(trained.train(name, study, column, params)))
        except UserError as error:
            left_out[column], unfit = str(error), unfit or f"study: {name}, {column}: {error}"
            print(f"study: {name}, {column}: not run: {error}", flush=True)
        if waiting and frames:  # write what there is so far; after the last column it is written below
            _write(name, study, frames, left_out | waiting, params.study)
    if not frames:
        raise UserError(f"study: {name}: no column can be run: {next(iter(left_out.values()))}")
    _write(name, study, frames, left_out, params.study)
    if unfit:
        raise UserError(unfit)
    print(f"study: {name}: {sum(map(len, frames))} lines in {STUDIES / 'results' / name}.md")


def _write(
    name: str, study: Study, frames: Sequence[pd.DataFrame], left_out: Mapping[str, str], asked: StudyParams
) -> None:
    """Write the study as measured so far: a table, a figure, a page."""
    table, kind, folder = pd.concat(frames, ignore_index=True), KINDS[study.measure], STUDIES / "results"
    table.insert(0, "study", name)
    write(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    write(folder / f"{name}.png", to_png(kind.figure(study, table)))
    write(folder / f"{name}.md", page.render(name, study, kind.tables(study, table), left_out, asked))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exit code 2: a mistake in the study or params.yaml; 1: a failed run."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.study", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="run the study of the file studies/NAME.yaml")
    names = parser.parse_args(arguments).names
    sys.exit(exit_code(lambda: run(names)))


if __name__ == "__main__":
    main()

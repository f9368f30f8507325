"""Studies: a table or figure of rows (methods, variants) by columns (settings, budgets), from one YAML file.

`python -m pipeline.study NAME ...` reads studies/NAME.yaml, trains and measures every cell that is not done yet, on
every class split, and writes studies/results/NAME.csv, NAME.md and NAME.png. Each training is a Ray trial; each cell
has one MLflow run for each class split.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence

from pipeline.params import load_params
from pipeline.project import folder_locked
from pipeline.runs import cluster
from pipeline.studies.columns import check_rows, column_params, wanted
from pipeline.studies.definition import STUDIES, load_study
from pipeline.studies.running import run_study
from pudnet.errors import RunFailed, UserError, exit_code


def run(names: Sequence[str]) -> None:
    """Check all studies, then run what is not done of them, one study after the other."""
    studies = {name: load_study(name) for name in names}
    chosen = {}
    for name, study in studies.items():
        with _naming_file(name):
            chosen[name] = wanted(study, {column: column_params(study, column) for column in study.columns})
    for name, (columns, _) in chosen.items():
        for column in columns.values():
            with _naming_file(name):
                check_rows(studies[name], column)
    with _at_most(load_params().study.hours):
        for name, (columns, left_out) in chosen.items():
            with folder_locked(f"study-{name}"):
                run_study(name, studies[name], columns, left_out)


@contextlib.contextmanager
def _at_most(hours: float | None) -> Iterator[None]:
    """Open Ray for the block. After so many hours (None: no limit) end it with `RunFailed`.

    (DVC would take a study that ends without an error to be done.)
    """
    end = time.monotonic() + 3600 * hours if hours else math.inf
    try:
        with cluster.session(hours and 3600 * hours):
            yield
    except KeyboardInterrupt:
        if time.monotonic() < end:
            raise
        line = f"study.hours: {hours:g} hours are over; the pages show what is done, and the same command continues"
        raise RunFailed(line) from None


@contextlib.contextmanager
def _naming_file(name: str) -> Iterator[None]:
    """Name the study's file in errors from the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{STUDIES / name}.yaml: {error}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command. Exit code 2: a mistake in the study or params.yaml; 1: a failed run."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.study", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="run the study of the file studies/NAME.yaml")
    names = parser.parse_args(arguments).names
    sys.exit(exit_code(lambda: run(names)))


if __name__ == "__main__":
    main()

"""Studies: a table of rows (methods, variants, ingredients) by columns (settings, budgets), from one YAML file.

`python -m pipeline.study NAME` reads studies/NAME.yaml, trains and measures every cell that is not done yet on every
class split, and writes studies/results/NAME.csv, NAME.md and NAME.png. A training is a Ray trial, a cell an MLflow run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline import cluster
from pipeline.bench import compare
from pipeline.cells import SKETCHES, Cell, Diagnosis, diagnose_cells, measure_cells, time_cells
from pipeline.dependencies import digest, trial_key
from pipeline.experiment import Experiment, run_missing
from pipeline.figures import differences_figure, to_png
from pipeline.groups import build
from pipeline.kept import Finished
from pipeline.params import PARAMS, Params, changed, read_yaml, resolve
from pipeline.prepare import prepare
from pipeline.stage import GROUPS, PREPARED, root, write
from pipeline.tracking import Tracking, open_tracking
from pipeline.trial import TrialSpec, make_spec
from pudnet.baselines import LEARNED
from pudnet.config import STRICT, VARIANTS, ModelConfig, TrainConfig, parse
from pudnet.errors import UserError, exit_code

STUDIES = Path("studies")


@dataclass(frozen=True, config=STRICT)
class Row:
    """One line of the table: a method, and what of it is not as `params.yaml` and the study's `over` say."""

    method: Literal[("pudnet", *LEARNED, "static_trunk", "random_weights")] = "pudnet"
    variant: Literal[tuple(VARIANTS)] = "pudnet"
    changes: dict[str, Any] = field(default_factory=dict)  # keys of `model` and `train`, or of the baseline
    sketch: Literal[("own", *SKETCHES)] = "own"
    sketch_images: Annotated[int, Field(ge=1)] | None = None  # at prediction
    support_per_class: Annotated[int, Field(ge=1)] | None = None  # at prediction

    @property
    def trained(self) -> bool:
        """Whether it is measured after a training, not as it is initialised."""
        return self.method != "random_weights"


@dataclass(frozen=True, config=STRICT)
class Study:
    """studies/NAME.yaml. `over` and each column change keys of params.yaml, named with dots."""

    title: str
    columns: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    rows: Annotated[dict[str, Row], Field(min_length=1)]
    reference: str  # the row that others are compared with, paired over test groups
    over: dict[str, Any] = field(default_factory=dict)
    text: str = ""  # what a reader should know, above the table


def load_study(name: str) -> Study:
    """Read and check a study. Raises `UserError` with one line for whatever is wrong in it."""
    path = STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml") if file.stem != "dvc"))
        raise UserError(f"study: unknown name {name!r}; known: {known}")
    raw = read_yaml(path)
    rows = raw.get("rows")
    if isinstance(rows, dict):
        for row, values in rows.items():
            if not isinstance(values, dict):
                raise UserError(f"{path}: rows.{row}: must be a block of keys, got {values!r}")
        raw["rows"] = {row: parse(Row, values, f"{path}: rows.{row}") for row, values in rows.items()}
    study = parse(Study, raw, f"{path}:")
    if study.reference not in study.rows:
        raise UserError(f"{path}: reference: no row is called {study.reference!r}")
    for what, cells in (("rows", study.rows), ("columns", study.columns)):
        seen: list[Any] = []
        for key, cell in cells.items():
            if cell in seen:
                raise UserError(f"{path}: {what}.{key}: stands twice")
            seen.append(cell)
    return study


def column_params(study: Study, column: str) -> Params:
    """params.yaml with the study's and the column's keys changed."""
    raw = read_yaml(PARAMS)
    for where, changes in (("over", study.over), (f"columns.{column}", study.columns[column])):
        for key, value in changes.items():
            block, _, name = key.rpartition(".")
            place = raw.get(block) if block else raw
            if not isinstance(place, dict) or name not in place:
                raise UserError(f"{where}: {key}: no such key in {PARAMS}")
            place[name] = value
    return resolve(raw)


def row_spec(params: Params, name: str, row: Row, seed: int) -> TrialSpec:
    """The training that a row's cell takes on one class split. Its own changes win over its variant's."""
    where = f"rows.{name}.changes"
    params = dataclasses.replace(params, variant=row.variant)
    kind = row.method if row.trained else "static_trunk"
    learned = kind in LEARNED
    slug = re.sub("[^a-z0-9+]+", "-", f"{name} split{seed}".lower())  # a folder is called so
    spec = make_spec(params, slug, kind, seed, row.changes if learned else {}, "train", 0)
    parts = {"model": ModelConfig, "train": TrainConfig}
    known = {**spec.model, **spec.train}
    for key in row.changes:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key; known: {', '.join(known)}")
    if learned:
        return spec
    own = {part: asdict(changed(kind(**getattr(spec, part)), row.changes, where)) for part, kind in parts.items()}
    return dataclasses.replace(spec, train=own["train"], model=own["model"] if spec.model else {})


def run(name: str) -> None:
    """Run a study: what is not done of it."""
    study = load_study(name)
    params = {column: column_params(study, column) for column in study.columns}
    frames = []
    with cluster.session():
        for column, own in params.items():
            with _workspace(own):
                frames.append(_run_column(name, study, column, own))
    table = pd.concat(frames, ignore_index=True)
    folder = STUDIES / "results"
    write(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    write(folder / f"{name}.png", to_png(differences_figure(table, study.reference)))
    write(folder / f"{name}.md", render(name, study, table))
    print(f"study: {name}: {len(table)} cells in {folder / name}.md")


@contextlib.contextmanager
def _workspace(params: Params) -> Iterator[None]:
    """A folder of its own for the data and groups of a column, prepared; the working directory meanwhile."""
    project, here = root(), Path.cwd()
    plain = [asdict(params.prepare), asdict(params.groups), params.split_seeds]
    folder = project / ".pud" / "studies" / digest(plain, [])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    if not (folder / "data" / "raw").is_symlink():
        (folder / "data" / "raw").symlink_to(project / "data" / "raw")
    before = os.environ.get("DVC_ROOT")
    os.environ["DVC_ROOT"] = str(project)
    os.chdir(folder)
    try:
        if not PREPARED.is_dir():
            prepare(params)
        if not GROUPS.is_dir():
            build(params)
        yield
    finally:
        os.chdir(here)
        if before is None:
            del os.environ["DVC_ROOT"]


def _run_column(name: str, study: Study, column: str, params: Params) -> pd.DataFrame:
    """Train and measure a column's cells; a line a row."""
    tracking = open_tracking(params)
    specs = {
        (row, seed): row_spec(params, row, own, seed) for row, own in study.rows.items() for seed in params.split_seeds
    }
    trained = _train(name, study, specs, params, tracking)
    cells = {at: _cell(study.rows[at[0]], spec, trained.get(trial_key(spec))) for at, spec in specs.items()}
    tables = dict(zip(cells, measure_cells(params, list(cells.values())), strict=True))
    frames = {row: pd.concat([tables[row, seed] for seed in params.split_seeds]) for row in study.rows}
    timed = {row: cells[row, params.seed] for row, own in study.rows.items() if own.sketch == "own"}
    times = time_cells(params, timed)
    diagnosed = [row for row in timed if study.rows[row].method == "pudnet"]
    diagnoses = dict(zip(diagnosed, diagnose_cells(params, [timed[row] for row in diagnosed]), strict=True))
    lines = []
    for row, frame in frames.items():
        numbers = compare(frame, frames[study.reference])
        lines.append(
            {
                "study": name,
                "row": row,
                "column": column,
                "splits": params.splits,
                "train_groups": params.groups.train_groups if study.rows[row].trained else 0,
                "test_groups": numbers["test_groups"],
                **{key: numbers[key] for key in ("accuracy", "ci95", "difference", "difference_ci95")},
                "milliseconds": times.get(row),
                **asdict(diagnoses.get(row, Diagnosis(math.nan, math.nan))),
            }
        )
        _log(tracking, lines[-1], cells[row, params.seed].key(params), study.rows[row])
    return pd.DataFrame(lines)


def _train(
    name: str, study: Study, specs: Mapping[tuple[str, int], TrialSpec], params: Params, tracking: Tracking
) -> dict[str, Finished]:
    """Every training that is not done, each once, whatever number of rows it serves."""
    wanted: dict[str, TrialSpec] = {}
    for (row, _), spec in specs.items():
        if study.rows[row].trained:
            wanted.setdefault(trial_key(spec), spec)
    print(f"study: {name}: {len(wanted)} training(s) on {params.groups.train_groups:,} groups")
    finished = run_missing(Experiment(f"study-{name}", list(wanted.values())), params, tracking)
    return dict(zip(wanted, finished, strict=True))


def _cell(row: Row, spec: TrialSpec, trained: Finished | None) -> Cell:
    checkpoint = trained.checkpoint if trained and row.trained else None
    return Cell(spec, checkpoint, row.sketch, row.sketch_images, row.support_per_class)


def _log(tracking: Tracking, line: Mapping[str, Any], key: str, row: Row) -> None:
    """A cell's MLflow run."""
    study, name, column = (line[part] for part in ("study", "row", "column"))
    run_id = tracking.find_or_create(f"study/{digest([study, name, column], [])}/{key}", f"{study}: {name}, {column}")
    tracking.log_tags(run_id, {"study": study, "row": name, "column": column})
    tracking.log_params(run_id, {"method": row.method, "variant": row.variant, **row.changes})
    metrics = {"test_accuracy": line["accuracy"], "test_ci95": line["ci95"], "difference": line["difference"]}
    metrics["difference_ci95"] = line["difference_ci95"]
    tracking.log_metrics(run_id, metrics | ({"adapt_ms": line["milliseconds"]} if line["milliseconds"] else {}))
    tracking.finish(run_id)


PAGE = """# {title}

{text}

Made by `python -m pipeline.study {name}`. Accuracy in percent, with its 95% interval over test groups; differences to
the row “{reference}” are paired over the same test groups. *Weights move*: how far predicted weights are from their
mean over groups, relative to its size, mean over layers. *Probe*: how well a linear probe reads from the sketch which
classes a group has (area under the ROC curve; 50 is chance).

![Each row's difference to {reference}]({name}.png)
"""
COLUMN = """
## {column}

{train_groups:,} training groups, {test_groups:,} test groups, {splits} class split(s).

| | accuracy | difference | time a group | weights move | probe |
|---|---|---|---|---|---|
"""


def render(name: str, study: Study, table: pd.DataFrame) -> str:
    """The study as Markdown: a table a column."""
    page = PAGE.format(title=study.title, text=study.text.strip(), name=name, reference=study.reference)
    for column, part in table.groupby("column", sort=False):
        first = part.iloc[0]
        page += COLUMN.format(
            column=column, train_groups=part.train_groups.max(), test_groups=first.test_groups, splits=first.splits
        )
        for line in part.itertuples():
            cells = (
                line.row,
                f"{line.accuracy:.2f} ± {line.ci95:.2f}",
                f"{line.difference:+.2f} ± {line.difference_ci95:.2f}" if line.row != study.reference else "",
                _number(line.milliseconds, "{:.0f} ms"),
                _number(line.movement, "{:.1f} %"),
                _number(line.probe, "{:.0f}"),
            )
            page += f"| {' | '.join(cells)} |\n"
    return page


def _number(value: float, form: str) -> str:
    return form.format(value) if pd.notna(value) else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: exit code 2 for a mistake in the study or params.yaml, 1 for a failed run."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.study", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a file studies/NAME.yaml")
    name = parser.parse_args(arguments).name
    sys.exit(exit_code(lambda: run(name)))


if __name__ == "__main__":
    main()

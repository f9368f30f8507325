"""Trains a column of a study: runs its trainings, and makes cells to measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from mlflow.entities import DatasetInput

from pipeline.digests import digest
from pipeline.params import Params
from pipeline.project import group_folder
from pipeline.runs.class_split import images_of_a_class
from pipeline.runs.executor import Experiment, run_missing
from pipeline.runs.keys import trial_key
from pipeline.runs.trial import TrialSpec
from pipeline.runs.trial_folder import Finished
from pipeline.runs.trial_log import datasets
from pipeline.studies.columns import check_labels, row_spec
from pipeline.studies.definition import IN_PREDICTIONS, Column, Row, Study
from pipeline.studies.tasks.cell import StudyCell
from pipeline.tracking.datasets import test_sets
from pipeline.tracking.runs import Tracking, open_tracking
from pudnet.data.groups import open_groups

T = TypeVar("T")


@dataclass(frozen=True)
class TrainedColumn:
    """A trained column of a study: one cell for each row, class split and training (mostly there is one training)."""

    name: str  # the study's
    study: Study
    column: str
    params: Params
    trainings: Mapping[tuple[str, int], Sequence[StudyCell]]  # (row, split seed) -> a cell for each training
    ended: Mapping[tuple[str, int], Finished]  # (row, split seed) -> the first training, if the row is trained
    tracking: Tracking

    @property
    def cells(self) -> dict[tuple[str, int], StudyCell]:
        """The cell of the first training, for each row and class split."""
        return {at: first for at, (first, *_) in self.trainings.items()}

    @property
    def definition(self) -> Column:
        """The column as it is in the study's file."""
        return self.study.columns[self.column]

    def length(self, row: str) -> dict[str, float]:
        """The number of groups that a row is trained on, and how often it passes them (mean over its trainings)."""
        if not self.study.rows[row].trained:
            return {"train_groups": 0, "passes": math.nan}
        cells = [cell for seed in self.params.split_seeds for cell in self.trainings[row, seed]]
        passes = [cell.spec.train["passes"] for cell in cells]
        return {"train_groups": self.params.groups.train_groups, "passes": sum(passes) / len(passes)}

    def log(
        self,
        row: str,
        seed: int,
        metrics: Mapping[str, float],
        curve: Mapping[str, Mapping[int, float]],
        training: int = 0,
        key: str = "",
    ) -> None:
        """Log a cell's MLflow run: its metrics, its curves by step. `key`: of the measurement, if not the cell's."""
        key = key or self.trainings[row, seed][training].key(self.params)  # now: it hashes files of this folder
        used = self._datasets(row, seed)
        self.tracking.submit(lambda: self._log(key, row, seed, metrics, curve, training, used))

    def _datasets(self, row: str, seed: int) -> list[DatasetInput]:
        """What a row is trained on, if it is, and tested on, unless only its losses are of interest."""
        trained = datasets(self.trainings[row, seed][0].spec) if self.study.rows[row].trained else []
        if self.study.measure == "losses":
            return trained
        return trained + test_sets(replace(self.params, seed=seed, splits=1))

    def _log(
        self,
        key: str,
        row: str,
        seed: int,
        metrics: Mapping[str, float],
        curve: Mapping[str, Mapping[int, float]],
        training: int,
        used: Sequence[DatasetInput],
    ) -> None:
        label = f"{self.name}: {row}, {self.column}" + (f", split {seed}" if self.params.splits > 1 else "")
        label += f", training {training}" if len(self.trainings[row, seed]) > 1 else ""
        run_id = self.tracking.find_or_create(f"study/{digest([self.name, row, self.column], [])}/{key}", label)
        tags = {"study": self.name, "row": row, "column": self.column, "seed": str(seed), "training": str(training)}
        own, spec = self.study.rows[row], self.trainings[row, seed][training].spec
        self.tracking.log_tags(run_id, tags | {"variant": own.variant, "target": spec.target})
        plain = {"method": own.method, "variant": own.variant, **own.changes, **self.length(row)}
        note = f"Study `{self.name}`, row *{row}*, column *{self.column}*, class split {seed}."
        self.tracking.describe(run_id, note, plain, used)
        self.tracking.log_metrics(run_id, metrics)
        for metric, points in curve.items():
            last = self.tracking.last_step(run_id, metric)
            for step in sorted(step for step in points if step > last):
                self.tracking.log_metrics(run_id, {metric: points[step]}, step)
        self.tracking.finish(run_id)


def train(name: str, study: Study, column: str, params: Params) -> TrainedColumn:
    """Run all trainings of a column that are not done yet. A training that several rows share is run once."""
    tracking = open_tracking(params, "study", f"studies/results/{name}.md")
    rows = study.rows.items()
    if params.groups.test_whole and study.measure == "accuracy":  # now its classes are known
        check_labels(study, params, len(open_groups(group_folder(params.seed))[0].test_classes))
    images, seeds = images_of_a_class(params), params.study.trainings or 1
    specs = {
        (row, split, n): _seeded(row_spec(params, row, own, split, images), n)
        for row, own in rows
        for split in params.split_seeds
        for n in range(seeds if own.trained and study.measure == "accuracy" else 1)
    }
    finals = {at: spec for at, spec in specs.items() if study.rows[at[0]].trained}
    passes: dict[tuple[str, int, int], dict[str, float]] = {}
    if validating := {at: _validating(spec, params) for at, spec in finals.items() if spec.patience}:
        validated = _run_once(f"study: {name}, {column}: {{}} validation run(s)", name, validating, params, tracking)
        passes = {at: trial.passes(params.groups.search_groups) for at, trial in validated.items()}
    for at, spec in finals.items():
        finals[at] = replace(spec, train={**spec.train, **passes.get(at, {}), "patience": None})
    what = f"study: {name}, {column}: {{}} training(s) on {params.groups.train_groups:,} groups"
    trainings_of = {at: _training(spec) for at, spec in finals.items()}
    trained = _run_once(what, name, trainings_of, params, tracking, params.resources.workers)
    specs |= finals
    trainings: dict[tuple[str, int], list[StudyCell]] = {}
    for (row, split, n), spec in specs.items():
        trainings.setdefault((row, split), []).append(_cell(study.rows[row], spec, trained.get((row, split, n))))
    first = {(row, split): ended for (row, split, n), ended in trained.items() if n == 0}
    return TrainedColumn(name, study, column, params, trainings, first, tracking)


def _run_once(
    what: str, name: str, specs: Mapping[T, TrialSpec], params: Params, tracking: Tracking, workers: int = 1
) -> dict[T, Finished]:
    """Run trainings, each once even if several rows share it. `what` is printed, with their number."""
    # Once: a key hashes the code, which may be edited while the trainings run.
    keys = {at: trial_key(spec) for at, spec in specs.items()}
    wanted: dict[str, TrialSpec] = {}
    for at, key in keys.items():
        wanted.setdefault(key, specs[at])
    print(what.format(len(wanted)))
    experiment = Experiment(f"study-{name}", list(wanted.values()), workers=workers)
    ended = run_missing(experiment, params, tracking) if wanted else []
    of_key = dict(zip(wanted, ended, strict=True))
    return {at: of_key[key] for at, key in keys.items()}


def _validating(spec: TrialSpec, params: Params) -> TrialSpec:
    """A trial as in the search, without some training classes, which tells how many passes a training is to have."""
    train, validate = {**spec.train, "report_every": params.search.report_every}, params.groups.validation_groups
    return replace(spec, name=f"{spec.name}-validation", table="search_train", validate=validate, train=train)


def _training(spec: TrialSpec) -> TrialSpec:
    """A row's training, which is the same for rows that differ only in how they predict.

    With `patience` they may differ: each row has its own validation run, which predicts, and so its own passes.
    """
    model = spec.model | {key: value for key, value in IN_PREDICTIONS.items() if key in spec.model}
    cell = {key: value for key, value in spec.cell.items() if key not in IN_PREDICTIONS}
    return replace(spec, model=model, cell=cell)


def _seeded(spec: TrialSpec, n: int) -> TrialSpec:
    """The n-th training of a row, with another seed on the same groups."""
    return replace(spec, name=f"{spec.name}-training{n}", seed=spec.seed + n) if n else spec


def _cell(row: Row, spec: TrialSpec, trained: Finished | None) -> StudyCell:
    return StudyCell(spec, trained and trained.checkpoint, row.sketch, row.images, row.head, row.finetune)
